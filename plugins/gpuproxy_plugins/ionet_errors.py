"""What io.net means by an answer that is no success.

It is a FastAPI service: 422 with a list of places in the body, else ``{"detail": "message"}``. Which status means that
capacity or credit is short is not documented, so the words decide; a 4xx to a deploy that says nothing known is a
refusal. A 409 is none: the name that is taken is our tag, so an order of ours is there.
"""

import re

import msgspec
from msgspec import Struct

from gpuproxy.plugin import (
    CapacityGone,
    InstanceGone,
    InsufficientFunds,
    InvalidAnswer,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    SpecRefused,
    Unauthorized,
)
from gpuproxy_plugins.provider_http import CHANGING, Answer

CAPACITY = re.compile(r"not available|unavailable|no available|sold out|capacity|not enough (gpu|replica|resource)")
FUNDS = re.compile(r"insufficient|not enough (credit|balance|fund)|balance|payment")
RETRY_S = 10.0  # no limit is documented, nor what a 429 carries


class Told(Struct):
    """The part of an error body that means something."""

    detail: object = None
    message: object = None


def words_of(body: bytes) -> str:
    """Return what an error body says: its detail, with the places of a 422 in front of their messages."""
    try:
        told = msgspec.json.decode(body, type=Told)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        is_html = b"<html" in body[:200].lower()
        return "a web page" if is_html else body[:500].decode(errors="replace")
    detail = told.detail if told.detail is not None else told.message
    if not isinstance(detail, list):
        return str(detail) if detail is not None else ""
    return "; ".join(_place(each) for each in detail[:5])


def _place(fault: object) -> str:
    if not isinstance(fault, dict):
        return str(fault)
    place = fault.get("loc")
    return f"{'.'.join(map(str, place)) if isinstance(place, list) else place}: {fault.get('msg')}"


def failure(name: str, answer: Answer, words: str, shown: str, is_of_one: bool) -> ProviderError:
    """Return the error an unsuccessful answer stands for.

    `shown` is its text, safe to show; `is_of_one` tells that the call was about one deployment.
    """
    phase, status, said = answer.phase, answer.status, words.lower()
    is_doubtful = phase in CHANGING
    if status in (401, 403) or (status == 400 and ("api key" in said or "project" in said)):
        return Unauthorized(name, phase, f"it refuses the credential ({shown}); make one for project io-cloud")
    if status == 429:
        wait_s = _seconds(answer.headers.get("retry-after"))
        message = f"too many calls ({shown}); come back in {wait_s:.0f} s"
        return RateLimited(name, phase, message, may_have_worked=is_doubtful, retry_after_s=wait_s)
    if status >= 500 or status == 408:
        message = f"it fails with {status} ({shown}); try later"
        return ProviderUnavailable(name, phase, message, may_have_worked=is_doubtful)
    if status == 402 or (phase == "create" and 400 <= status < 500 and FUNDS.search(said)):
        return InsufficientFunds(name, phase, f"our account there has no money ({shown}); add credit")
    if phase == "create" and 400 <= status < 500 and status != 409 and said != "a web page":
        if CAPACITY.search(said):
            return CapacityGone(name, phase, f"there is no capacity ({shown}); try the next offer")
        return SpecRefused(name, phase, f"it does not accept this ({shown}); change the request")
    if status == 404 and is_of_one and said and said != "a web page":
        return InstanceGone(name, phase, f"there is no such deployment ({shown}); list them to see those there are")
    message = f"it answers {status} ({shown}), which means nothing here; its API may have changed"
    return InvalidAnswer(name, phase, message, may_have_worked=is_doubtful)


def _seconds(text: str | None) -> float:
    return min(float(text), 86_400.0) if text and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) else RETRY_S

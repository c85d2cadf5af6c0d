"""What the gateway's own refusals say about coming back, and that OpenAI's SDK heeds it."""

from collections.abc import Iterator

import httpx2
import openai
import pytest

from gpuproxy.errors import CODES, GatewayError
from gpuproxy.proxy.refusal import fields_of


@pytest.fixture(scope="module")
def sdk() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="gp_", base_url="http://127.0.0.1:1/v1") as client:
        yield client


def answer(error: GatewayError, attempt_count: int = 1) -> httpx2.Response:
    """Return the refusal as an SDK sees it."""
    lines = fields_of(error, attempt_count).split(b"\r\n")[:-1]
    return httpx2.Response(error.status, headers=[tuple(line.split(b": ", 1)) for line in lines])


@pytest.mark.parametrize("code", CODES)
def test_an_sdk_repeats_only_what_may_go_well_the_next_time(sdk: openai.OpenAI, code: str) -> None:
    refused = answer(GatewayError(code, "no"))
    assert sdk._should_retry(refused) is CODES[code].is_retryable
    assert "retry-after" not in refused.headers


@pytest.mark.parametrize("code", ["UPSTREAM_TIMEOUT", "UPSTREAM_INVALID", "UPSTREAM_UNREACHABLE"])
def test_what_was_tried_elsewhere_in_vain_is_not_multiplied_by_the_sdk(sdk: openai.OpenAI, code: str) -> None:
    assert sdk._should_retry(answer(GatewayError(code, "no"), 1))
    assert not sdk._should_retry(answer(GatewayError(code, "no"), 2))


@pytest.mark.parametrize(
    ("wait_s", "shown", "milliseconds", "heeded_s"),
    [(5, "5", None, 5.0), (0.25, "1", "250", 0.25), (2.0004, "3", "2001", 2.001), (119.5, "120", "119500", 119.5)],
)
def test_an_sdk_waits_exactly_as_long_as_it_is_told(
    sdk: openai.OpenAI, wait_s: float, shown: str, milliseconds: str | None, heeded_s: float
) -> None:
    refused = answer(GatewayError("RATE_LIMITED", "no", wait_s))
    assert (refused.headers["retry-after"], refused.headers.get("retry-after-ms")) == (shown, milliseconds)
    assert refused.headers["x-should-retry"] == "true"
    assert sdk._parse_retry_after_header(refused.headers) == heeded_s


def test_a_wait_that_no_sdk_would_sit_out_is_no_reason_to_try_at_once(sdk: openai.OpenAI) -> None:
    assert not sdk._should_retry(answer(GatewayError("RATE_LIMITED", "no", 3_600)))

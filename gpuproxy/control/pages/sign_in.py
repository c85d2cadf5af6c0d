"""Sign in, register, sign out, and the account: what begins and ends the cookie."""

import re
from typing import Any

from aiohttp import web

from gpuproxy.access import tokens
from gpuproxy.control import auth, credits, quota, user
from gpuproxy.control.cookie import forget_cookie, set_cookie
from gpuproxy.control.pages.render import page
from gpuproxy.control.pages.serve import PREFIX, see_other
from gpuproxy.control.pages.visit import Visit
from gpuproxy.control.parts import CONFIG, KEYRING
from gpuproxy.errors import GatewayError

_is_ours = re.compile(r"/dashboard(/[\w./-]*)?(\?[\w.&=%:+-]*)?", re.ASCII).fullmatch  # never another host's


async def show_sign_in(visit: Visit) -> web.StreamResponse:
    """Ask for address and password."""
    if visit.caller is not None:
        return see_other(PREFIX)
    next_path = visit.text("next") or visit.request.query.get("next", "")
    may_register = visit.request.app[CONFIG].auth.allow_registration
    shown: dict[str, Any] = {"email": visit.text("email"), "next": next_path, "may_register": may_register}
    return page(visit, "sign_in.html", **shown)


async def sign_in(visit: Visit) -> web.StreamResponse:
    """Begin a session."""
    told = await visit.ask(auth.log_in, {"email": visit.text("email"), "password": visit.form.get("password", "")})
    return _begun(visit, told, visit.text("next"))


async def show_register(visit: Visit) -> web.StreamResponse:
    """Ask for what an account needs."""
    return see_other(PREFIX) if visit.caller is not None else page(visit, "register.html", email=visit.text("email"))


async def register(visit: Visit) -> web.StreamResponse:
    """Open an account and begin a session."""
    told = await visit.ask(auth.register, {"email": visit.text("email"), "password": visit.form.get("password", "")})
    return _begun(visit, told, "")


async def sign_out(visit: Visit) -> web.StreamResponse:
    """End the session, with all its tokens."""
    await visit.ask(auth.log_out)
    response = see_other(f"{PREFIX}/sign-in?done=out")
    forget_cookie(visit.request, response)
    return response


async def show_account(visit: Visit) -> web.StreamResponse:
    """Show who is signed in, their limits, and how to change the password."""
    profile, limits = await visit.ask(user.profile), await visit.ask(quota.show)
    credit = (await visit.ask(credits.show))["data"]
    return page(visit, "account.html", profile=profile["data"], quota=limits["data"], credits=credit)


async def set_low_credit(visit: Visit) -> web.StreamResponse:
    """Say below how much credit the account wants to be told."""
    await visit.ask(credits.set_low_threshold, {"threshold": visit.text("threshold")})
    return see_other(f"{PREFIX}/account?done=changed")


async def change_password(visit: Visit) -> web.StreamResponse:
    """Set a new password; the session goes on as a new one."""
    current, wished = visit.form.get("current_password", ""), visit.form.get("new_password", "")
    if wished != visit.form.get("again", ""):
        raise GatewayError("UNPROCESSABLE", "the new password is not the same twice", param="again")
    told = await visit.ask(auth.change_password, {"current_password": current, "new_password": wished})
    return _begun(visit, told, f"{PREFIX}/account?done=password")


def _begun(visit: Visit, told: Any, next_path: str) -> web.Response:
    """Go on as who has logged in."""
    claims = tokens.read(visit.request.app[KEYRING], told["tokens"]["access_token"])
    response = see_other(next_path if _is_ours(next_path) else PREFIX)
    set_cookie(visit.request, response, claims.sub, claims.sid)
    return response

"""Registering, logging in and staying so: ``/api/v1/auth/…``."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct

from gpuproxy.access import logins, tokens
from gpuproxy.access.accounts import User, user_by_id
from gpuproxy.access.logins import Login
from gpuproxy.access.passwords import Hasher
from gpuproxy.access.sessions import Session, continue_session, end_session
from gpuproxy.control.cookie import forget_cookie, is_trusted_page, set_cookie
from gpuproxy.control.identify import address_of
from gpuproxy.control.parts import ATTEMPTS, CALLER, CONFIG, HASHER, KEYRING, STORE
from gpuproxy.control.respond import success
from gpuproxy.errors import GatewayError
from gpuproxy.store.engine import Store

WRONG_CODES = ("UNAUTHORIZED", "CONFLICT")  # a wrong password; an address that is taken, which others might collect

Email = Annotated[str, Meta(max_length=254, examples=["you@example.com"])]
Password = Annotated[str, Meta(max_length=1_024, description="8 to 256 characters when it is a new one")]


class Credentials(Struct, forbid_unknown_fields=True):
    """An e-mail address and a password."""

    email: Email
    password: Password


class LogIn(Credentials, forbid_unknown_fields=True):
    """An e-mail address and a password; with `cookie` the browser gets one too, which opens ``/ws`` for its pages."""

    cookie: bool = False


class Refresh(Struct, forbid_unknown_fields=True):
    """A refresh token, good once."""

    refresh_token: Annotated[str, Meta(max_length=1_024)]


class PasswordChange(Struct, forbid_unknown_fields=True):
    """The password that is, and the one that shall be."""

    current_password: Password
    new_password: Password


class Tokens(Struct):
    """What opens the API, and what renews it. `expires_at` is the access token's end."""

    access_token: str
    refresh_token: str
    expires_at: datetime


class LoggedIn(Struct):
    """Who is logged in, and their tokens."""

    user: User
    tokens: Tokens


class LoggedOut(Struct):
    """The session that has ended."""

    session_id: str


async def register(request: web.Request, body: Credentials) -> web.Response:
    """Open an account and log in."""
    if not request.app[CONFIG].auth.allow_registration:
        raise GatewayError("FORBIDDEN", "registration is closed; ask the operator for an account")
    store, hasher, lifetime_s = _parts(request)
    async with _attempt(request, body.email):
        login = await logins.register(store, hasher, body.email, body.password, lifetime_s)
    return success(_logged_in(request, login), 201)


async def log_in(request: web.Request, body: LogIn) -> web.Response:
    """Log in; too many wrong passwords make the next attempt wait."""
    if body.cookie and not is_trusted_page(request):  # else any page could log a visitor in as somebody else
        message = "only pages of the gateway and of [auth] cookie_origins log in with a cookie; leave cookie out"
        raise GatewayError("FORBIDDEN", message)
    store, hasher, lifetime_s = _parts(request)
    async with _attempt(request, body.email):
        login = await logins.log_in(store, hasher, body.email, body.password, lifetime_s)
    response = success(_logged_in(request, login))
    if body.cookie:
        set_cookie(request, response, login.user.id, login.session.id)
    return response


async def refresh(request: web.Request, body: Refresh) -> web.Response:
    """Take a refresh token for new tokens; using one twice ends the session."""
    store, _, lifetime_s = _parts(request)
    session = await continue_session(store, body.refresh_token, lifetime_s)
    async with store.reading() as connection:
        user = await user_by_id(connection, session.user_id)
    return success(_logged_in(request, Login(user, session)))


async def log_out(request: web.Request) -> web.Response:
    """End the session of the access token, with all its tokens."""
    session_id = request[CALLER].session_id
    if not session_id:
        raise GatewayError("FORBIDDEN", "an API key has no session; revoke it with DELETE /api/v1/auth/apikey/ID")
    async with request.app[STORE].writing() as connection:
        await end_session(connection, session_id)
    response = success(LoggedOut(session_id))
    forget_cookie(request, response)
    return response


async def change_password(request: web.Request, body: PasswordChange) -> web.Response:
    """Set a new password; ends every session of the account and begins one."""
    store, hasher, lifetime_s = _parts(request)
    email, current, wished = request[CALLER].email, body.current_password, body.new_password
    async with _attempt(request, email):
        login = await logins.change_password(store, hasher, email, current, wished, lifetime_s)
    return success(_logged_in(request, login))


@asynccontextmanager
async def _attempt(request: web.Request, email: str) -> AsyncIterator[None]:
    """Let the caller try unless there were too many failures; count this one if it fails by being wrong."""
    account, address, attempts = email.lower(), address_of(request), request.app[ATTEMPTS]
    attempts.begin(account, address)
    try:
        yield
    except Exception as error:
        if not isinstance(error, GatewayError) or error.code not in WRONG_CODES:
            attempts.undo(account, address)
        raise
    attempts.forgive(account, address)


def _parts(request: web.Request) -> tuple[Store, Hasher, float]:
    return request.app[STORE], request.app[HASHER], request.app[CONFIG].auth.refresh_token_s


def _logged_in(request: web.Request, login: Login) -> LoggedIn:
    return LoggedIn(login.user, _tokens(request, login.session))


def _tokens(request: web.Request, session: Session) -> Tokens:
    claims = tokens.claims_for(session.user_id, session.id, request.app[CONFIG].auth.access_token_s)
    expires_at = datetime.fromtimestamp(claims.exp, UTC)
    return Tokens(tokens.sign(request.app[KEYRING], claims), session.refresh_token, expires_at)

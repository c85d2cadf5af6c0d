"""Access tokens: only what we signed, for what we signed it, while it lasts."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import msgspec
import pytest

from gpuproxy.access.keyring import Keyring, fresh_keyring
from gpuproxy.access.tokens import Claims, claims_for, looks_like_token, read, sign
from gpuproxy.errors import GatewayError

SECRET = b"s" * 32
RING = Keyring((SECRET,))
Forge = Callable[[], str]


def fields() -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(claims_for("user", "session", 900))
    return made


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(payload: str | dict[str, Any], secret: bytes = SECRET, **header: Any) -> str:
    """Sign anything, whatever it says, as a token of ours would be."""
    text = payload if isinstance(payload, str) else json.dumps(payload)
    head = json.dumps({"alg": "HS256", "typ": "JWT", "kid": RING.newest} | header)
    signing = f"{encoded(head.encode())}.{encoded(text.encode())}"
    return f"{signing}.{encoded(hmac.digest(secret, signing.encode(), hashlib.sha256))}"


def without(name: str) -> str:
    return signed({key: value for key, value in fields().items() if key != name})


def unsigned(algorithm: str) -> str:
    return signed(fields(), alg=algorithm).rpartition(".")[0] + "."


def twice(claim: str) -> str:
    return json.dumps(fields())[:-1] + f', "{claim}": {json.dumps(fields()[claim])}}}'


def replaced(name: str, value: str) -> str:
    return json.dumps({**fields(), name: "HERE"}).replace('"HERE"', value)


def now_s() -> int:
    return int(time.time())


FORGED: dict[str, Forge] = {
    **{f"algorithm {name!r}": (lambda name=name: unsigned(name)) for name in ("none", "None", "nOnE", "", "HS256")},
    "no algorithm": lambda: signed(fields(), alg=None),
    "another algorithm": lambda: jwt.encode(fields(), SECRET * 2, "HS512", headers={"kid": RING.newest}),
    "signed with our public name": lambda: signed(fields(), RING.newest.encode()),
    "signed with another secret": lambda: signed(fields(), b"t" * 32),
    "signed with nothing": lambda: signed(fields(), b""),
    "no kid": lambda: signed(fields(), kid=None),
    "kid that is a path": lambda: signed(fields(), b"", kid="../../../../dev/null"),
    "kid that is SQL": lambda: signed(fields(), b"x", kid="' UNION SELECT 'x"),
    "kid that is a number": lambda: signed(fields(), kid=0),
    "kid that is a list": lambda: signed(fields(), kid=[RING.newest]),
    "own key in the header": lambda: signed(
        fields(), b"x" * 32, kid="x", jwk={"kty": "oct", "k": encoded(b"x" * 32)}
    ),
    "address of a key in the header": lambda: signed(fields(), b"x" * 32, kid="x", jku="https://evil.example/keys"),
    "critical header": lambda: signed(fields(), crit=["b64"], b64=False),
    "another audience": lambda: signed({**fields(), "aud": "other"}),
    "a list of audiences": lambda: signed({**fields(), "aud": [fields()["aud"], "other"]}),
    "another issuer": lambda: signed({**fields(), "iss": "other"}),
    "another kind": lambda: signed({**fields(), "typ": "refresh"}),
    "exp in the past": lambda: signed({**fields(), "exp": now_s() - 31}),
    "nbf in the future": lambda: signed({**fields(), "nbf": now_s() + 300}),
    "exp as text": lambda: signed({**fields(), "exp": str(now_s() + 900)}),
    "exp as truth": lambda: signed({**fields(), "exp": True}),
    "exp as null": lambda: signed({**fields(), "exp": None}),
    "exp as list": lambda: signed({**fields(), "exp": [now_s() + 900]}),
    **{f"exp {value}": (lambda value=value: signed(replaced("exp", value))) for value in ("NaN", "1e400", "Infinity")},
    "sub as number": lambda: signed({**fields(), "sub": 1}),
    **{f"no {name}": (lambda name=name: without(name)) for name in Claims.__struct_fields__},
    **{f"{name} twice": (lambda name=name: signed(twice(name))) for name in ("exp", "sub")},
    "no object": lambda: signed("[]"),
    "no JSON": lambda: signed("{"),
    "nested without end": lambda: signed("[" * 900),
    "a megabyte": lambda: signed({**fields(), "jti": "x" * 1_000_000}),
    "two parts": lambda: signed(fields()).rpartition(".")[0],
    "nothing": lambda: "..",
    "no base64": lambda: "§.§.§",
    "changed": lambda: signed(fields())[:-2] + "AA",
}  # fmt: skip


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_what_we_did_not_sign_for_this_is_refused(forge: Forge) -> None:
    with pytest.raises(GatewayError) as caught:
        read(RING, forge())
    assert caught.value.code == "UNAUTHORIZED"


def test_the_forger_of_this_test_could_sign_a_good_one() -> None:
    assert read(RING, signed(fields())).sub == "user"


def test_what_we_signed_is_read() -> None:
    claims = claims_for("user", "session", 900)
    token = sign(RING, claims)
    assert read(RING, token) == claims
    assert claims.exp - claims.iat == 900
    assert looks_like_token(token)
    assert len(token) < 600


def test_no_two_tokens_are_the_same() -> None:
    assert len({claims_for("user", "session", 900).jti for _ in range(10)}) == 10


def test_clocks_may_differ_by_half_a_minute() -> None:
    assert read(RING, signed({**fields(), "exp": now_s() - 5})).sub == "user"
    assert read(RING, signed({**fields(), "nbf": now_s() + 20})).sub == "user"


def test_a_secret_is_replaced_without_logging_anybody_out() -> None:
    token = sign(RING, claims_for("user", "session", 900))
    both = Keyring((b"n" * 32, SECRET))
    assert read(both, token).sub == "user"
    assert jwt.get_unverified_header(sign(both, claims_for("u", "s", 9)))["kid"] == both.newest != RING.newest
    with pytest.raises(GatewayError):
        read(fresh_keyring(), token)

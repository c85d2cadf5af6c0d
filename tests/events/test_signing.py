"""Signatures: a receiver with a library verifies, one with six lines of its own does too."""

import base64
import hmac
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from gpuproxy.errors import GatewayError
from gpuproxy.events.signing import body_of, check_secret, headers_of, new_secret

README = (Path(__file__).parents[2] / "README.md").read_text()
SHOWN: dict[str, Any] = {}
exec(next(b for b in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if "def is_ours" in b), SHOWN)
SECRET = "webhook-secret-for-verification"
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def verifies(raw: bytes, secret: str) -> bool:
    """Tell whether a body is from here, as README shows it."""
    return bool(SHOWN["is_ours"](raw, secret))


def test_a_body_has_the_fields_of_the_guide() -> None:
    at = datetime(2024, 1, 12, 10, 30, tzinfo=UTC)
    body = json.loads(body_of("instance.created", at, {"instance_id": "vast-12345"}, "u1", SECRET))
    signature = body.pop("signature")
    assert len(bytes.fromhex(signature)) == 32
    assert body == {
        "event": "instance.created",
        "timestamp": "2024-01-12T10:30:00Z",
        "data": {"instance_id": "vast-12345", "user_id": "u1"},
    }


@given(st.dictionaries(st.text(), values, max_size=4))
def test_any_data_verifies_by_parsing_and_by_cutting(data: dict[str, object]) -> None:
    raw = body_of("instance.created", datetime.now(UTC), data, "u1", SECRET)
    assert verifies(raw, SECRET)
    assert not verifies(raw, SECRET + "x")
    cut, _, rest = raw.rpartition(b',"signature":"')
    digest = hmac.new(SECRET.encode(), cut + b"}", "sha256").hexdigest()
    assert rest == f'{digest}"}}'.encode()


@pytest.mark.parametrize("secret", [new_secret(), SECRET], ids=["ours", "theirs"])
def test_the_library_of_standard_webhooks_verifies(secret: str) -> None:
    raw = body_of("instance.created", datetime.now(UTC), {"a": "ü"}, "u1", secret)
    headers = headers_of("evt_1", datetime.now(UTC), raw, [secret])
    theirs = secret if secret.startswith("whsec_") else base64.b64encode(secret.encode()).decode()
    assert Webhook(theirs).verify(raw, headers)["event"] == "instance.created"
    with pytest.raises(WebhookVerificationError):
        Webhook(theirs).verify(raw + b" ", headers)
    late = headers_of("evt_1", datetime.now(UTC) - timedelta(minutes=6), raw, [secret])
    with pytest.raises(WebhookVerificationError):
        Webhook(theirs).verify(raw, late)


def test_two_secrets_both_verify_while_they_overlap() -> None:
    old, new = new_secret(), new_secret()
    raw = body_of("instance.created", datetime.now(UTC), {}, "u1", new)
    headers = headers_of("evt_1", datetime.now(UTC), raw, [new, old])
    for secret in (old, new):
        Webhook(secret).verify(raw, headers)


@pytest.mark.parametrize("secret", ["", "short", "whsec_", "whsec_!!!", "whsec_YWJj", "ü" * 20, "x" * 129, "a\nb" * 9])
def test_a_secret_that_cannot_sign_is_refused(secret: str) -> None:
    with pytest.raises(GatewayError, match="secret: cannot be used") as caught:
        check_secret(secret)
    assert len(secret) < 8 or secret not in caught.value.message


def test_a_fresh_secret_is_accepted() -> None:
    check_secret(new_secret())
    check_secret(SECRET)

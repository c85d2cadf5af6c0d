"""The guard by itself; what it does to calls is tested with the envelope, to webhooks with their sender."""

import ipaddress

import pytest

from gpuproxy import guard
from gpuproxy.guard import Guard, is_own


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_address_of_this_machine_is_known(address: str) -> None:
    assert is_own(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_an_address_of_another_machine_is_none(address: str) -> None:
    assert not is_own(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_public_address_of_this_machine_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What listens on all addresses may be shut off from outside by a firewall, which is not asked from here."""
    monkeypatch.setattr(guard, "_DENIED", ())  # or the table refuses before
    assert not Guard().is_allowed(address)
    assert Guard([address]).is_allowed(address)
    assert Guard().is_allowed("192.0.2.1")

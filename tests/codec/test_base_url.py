"""How clients reach the gateway."""

import pytest

from gpuproxy.codec.base_url import base_url, origin_of


@pytest.mark.parametrize(
    ("public_url", "scheme", "host", "expected"),
    [
        ("", "", "gw:8080", "http://gw:8080"),
        ("", "HTTPS", "gw", "https://gw"),
        ("", "gopher", "gw", "http://gw"),
        ("https://pub.example/gpu/", "http", "gw", "https://pub.example/gpu"),
    ],
    ids=range(4),
)
def test_the_configuration_goes_before_the_call(public_url: str, scheme: str, host: str, expected: str) -> None:
    assert base_url(public_url, scheme, host) == expected


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("", ""),
        ("https://Pub.Example/x", "https://pub.example"),
        ("https://pub.example:443", "https://pub.example"),
        ("http://pub.example:443", "http://pub.example:443"),
        ("http://[::1]:80/", "http://[::1]"),
    ],
    ids=range(5),
)
def test_an_origin_is_written_as_browsers_write_it(url: str, origin: str) -> None:
    assert origin_of(url) == origin

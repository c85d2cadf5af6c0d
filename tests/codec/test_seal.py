"""Sealed text: read by whoever has the key, by nobody else, in the context it was made for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuproxy.codec.seal import SEALED_BYTES_MAX, Seal
from gpuproxy.errors import GatewayError

OLD, NEW = b"o" * 32, b"n" * 32


@given(st.binary(max_size=300))
def test_what_one_seals_another_with_the_same_keys_reads(plain: bytes) -> None:
    text = Seal((OLD,)).seal(plain, b"a")
    assert all(0x21 <= character <= 0x7E for character in text)
    assert Seal((OLD,)).unseal(text, b"a") == plain


def test_a_key_that_was_replaced_still_reads_and_the_new_one_seals() -> None:
    both = Seal((NEW, OLD))
    assert both.unseal(Seal((OLD,)).seal(b"x", b"a"), b"a") == b"x"
    assert Seal((NEW,)).unseal(both.seal(b"x", b"a"), b"a") == b"x"


def test_keys_can_be_taken_anew() -> None:
    seal = Seal((OLD,))
    text = seal.seal(b"x", b"a")
    seal.take((NEW,))
    assert seal.unseal(text, b"a") is None


def test_another_context_or_key_reads_nothing() -> None:
    text = Seal((OLD,)).seal(b"x", b"a")
    assert Seal((OLD,)).unseal(text, b"b") is None
    assert Seal((NEW,)).unseal(text, b"a") is None


@given(st.integers(-63, 62), st.integers(1, 255))
def test_one_changed_character_is_noticed(position: int, change: int) -> None:
    text = bytearray(Seal((OLD,)).seal(b"x" * 19, b"a"))
    text[position] ^= change
    assert Seal((OLD,)).unseal(bytes(text), b"a") is None


@given(st.binary(max_size=100))
def test_what_was_not_sealed_is_not_read(text: bytes) -> None:
    assert Seal((OLD,)).unseal(text, b"a") is None


def test_what_is_too_long_is_not_even_tried() -> None:
    assert Seal((OLD,)).unseal(b"A" * (SEALED_BYTES_MAX + 1), b"a") is None


def test_the_same_is_never_sealed_alike() -> None:
    seal = Seal((OLD,))
    assert len({seal.seal(b"x", b"a") for _ in range(100)}) == 100


def test_without_keys_nobody_is_told_that_a_text_is_wrong() -> None:
    with pytest.raises(GatewayError, match="not known yet") as refused:
        Seal().unseal(b"x", b"a")
    assert refused.value.code == "UNAVAILABLE"

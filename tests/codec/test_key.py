"""API keys as text."""

import hashlib
import re

from hypothesis import given
from hypothesis import strategies as st

from gpuproxy.codec.key import ALPHABET, digest_of, generate, is_well_formed


def test_a_key_has_its_form() -> None:
    assert re.fullmatch(r"gp_[0-9A-Za-z]{49}", generate())


def test_every_generated_key_is_well_formed() -> None:
    assert all(is_well_formed(generate().encode()) for _ in range(500))


def test_keys_do_not_repeat() -> None:
    assert len({generate() for _ in range(1_000)}) == 1_000


@given(st.integers(0, 51), st.sampled_from(ALPHABET))
def test_a_key_with_one_other_character_is_refused(position: int, character: int) -> None:
    key = bytearray(generate().encode())
    is_other = key[position] != character
    key[position] = character
    assert is_well_formed(bytes(key)) is not is_other


@given(st.binary(max_size=64))
def test_noise_is_refused(noise: bytes) -> None:
    assert not is_well_formed(noise)


@given(st.text(alphabet=ALPHABET.decode(), min_size=49, max_size=49))
def test_a_guess_of_the_right_form_is_refused(body: str) -> None:
    assert not is_well_formed(f"gp_{body}".encode())


def test_a_key_with_a_newline_is_refused() -> None:
    assert not is_well_formed(generate().encode() + b"\n")


def test_the_digest_is_sha256_of_the_whole_key() -> None:
    key = generate().encode()
    assert digest_of(key) == hashlib.sha256(key).digest()

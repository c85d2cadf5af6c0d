"""API keys as text: making one, telling a forged one at a glance, its digest.

``gp_``, 43 base62 characters (256 random bits), 6 base62 characters of CRC-32 over all before them. The
checksum lets a worker refuse typing errors and guesses without asking, and lets scanners find leaked keys.
"""

import re
import secrets
from hashlib import sha256
from zlib import crc32

ALPHABET = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PREFIX = b"gp_"
BODY_CHARACTERS = 43  # 62**43 is just over 2**256
CHECK_CHARACTERS = 6
KEY_BYTES = len(PREFIX) + BODY_CHARACTERS + CHECK_CHARACTERS
SHOWN_CHARACTERS = 12  # of a key, kept in clear so that people can tell their keys apart

_matches_form = re.compile(rb"gp_[0-9A-Za-z]{%d}" % (BODY_CHARACTERS + CHECK_CHARACTERS)).fullmatch


def generate() -> str:
    """Return a new key."""
    head = PREFIX + _base62(secrets.randbits(256), BODY_CHARACTERS)
    return (head + _base62(crc32(head), CHECK_CHARACTERS)).decode()


def is_well_formed(key: bytes) -> bool:
    """Tell whether `key` has the form and checksum of a key; says nothing about whether it is known."""
    if len(key) != KEY_BYTES or _matches_form(key) is None:
        return False
    return key[-CHECK_CHARACTERS:] == _base62(crc32(key[:-CHECK_CHARACTERS]), CHECK_CHARACTERS)


def digest_of(key: bytes) -> bytes:
    """Return the 32 bytes under which the key is stored. A key has 256 random bits: no salt, no slow hash."""
    return sha256(key).digest()


def _base62(number: int, length: int) -> bytes:
    characters = bytearray(length)
    for position in range(length - 1, -1, -1):
        number, digit = divmod(number, 62)
        characters[position] = ALPHABET[digit]
    return bytes(characters)

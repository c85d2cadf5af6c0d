"""Transcripts of the forwarder: bytes in, bytes out, then the receipt."""

import pytest

pytest.register_assert_rewrite(f"{__name__}.harness", f"{__name__}.wire")

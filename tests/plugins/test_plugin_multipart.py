"""Form fields are found wherever they stand, and only real ones."""

import pytest
from gpuproxy_plugins.multipart import form_fields, is_form
from hypothesis import given
from hypothesis import strategies as st

TYPE = b"multipart/form-data; boundary=b0"


def part(disposition: bytes, value: bytes, extra: bytes = b"") -> bytes:
    return b"--b0\r\nContent-Disposition: form-data; " + disposition + b"\r\n" + extra + b"\r\n" + value + b"\r\n"


AUDIO = part(b'name="file"; filename="a.wav"', b"\x00--b0\r\n\xff" * 999, b"Content-Type: audio/wav\r\n")
MODEL = part(b'name="model"', b"whisper-1")
END = b"--b0--\r\n"


@pytest.mark.parametrize("body", [MODEL + AUDIO + END, AUDIO + MODEL + END, b"preamble\r\n" + AUDIO + MODEL + END])
def test_a_field_may_come_before_or_after_the_file(body: bytes) -> None:
    assert form_fields(body, TYPE, (b"model", b"stream")) == {b"model": b"whisper-1"}


@pytest.mark.parametrize(
    "content_type",
    [
        b'multipart/form-data; boundary="b0"',
        b"Multipart/Form-Data;charset=utf-8;BOUNDARY=b0",
    ],
)
def test_the_boundary_may_be_quoted_and_in_any_case(content_type: bytes) -> None:
    assert is_form(content_type)
    assert form_fields(MODEL + END, content_type, (b"model",)) == {b"model": b"whisper-1"}


def test_a_file_name_cannot_pretend_to_be_a_field_name() -> None:
    body = part(b'filename="; name=model; x="; name="file"', b"cheap") + MODEL + END
    assert form_fields(body, TYPE, (b"model",)) == {b"model": b"whisper-1"}


def test_a_field_sent_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'model' twice"):
        form_fields(MODEL + MODEL + END, TYPE, (b"model",))


def test_a_repeated_field_that_is_not_wanted_is_no_concern() -> None:
    assert form_fields(part(b"name=x", b"1") * 2 + END, TYPE, (b"model",)) == {}


@pytest.mark.parametrize(
    ("body", "content_type", "fault"),
    [
        (MODEL, TYPE, "does not end"),
        (b"nothing", TYPE, "does not occur"),
        (MODEL + END, b"multipart/form-data", "names no boundary"),
        (part(b"name=model", b"x" * 5_000) + END, TYPE, "over 4096 bytes"),
        (part(b"name=x", b"") * 300 + END, TYPE, "more than 256 parts"),
    ],
)
def test_a_malformed_form_is_refused_with_its_fault(body: bytes, content_type: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        form_fields(body, content_type, (b"model",))


@given(value=st.binary(max_size=60).filter(lambda value: b"--b0" not in value))
def test_a_value_comes_out_byte_for_byte(value: bytes) -> None:
    assert form_fields(AUDIO + part(b'name="model"', value) + END, TYPE, (b"model",)) == {b"model": value}

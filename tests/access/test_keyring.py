"""The gateway's own secrets: where they come from, how they are replaced, what they seal."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gpuproxy.access.keyring import FILE_NAME, Keyring, fresh_keyring, load_keyring
from gpuproxy.errors import ConfigError

OLD, NEW = "o" * 32, "n" * 32


def test_the_file_is_made_once_and_only_for_the_owner(tmp_path: Path) -> None:
    first = load_keyring("", tmp_path / "data", {})
    path = tmp_path / "data" / FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_keyring("", tmp_path / "data", {}).secrets == first.secrets
    assert list((tmp_path / "data").iterdir()) == [path]


def test_a_file_that_others_can_read_is_told_of(tmp_path: Path) -> None:
    load_keyring("", tmp_path, {})
    (tmp_path / FILE_NAME).chmod(0o640)
    with capture_logs() as logs:
        load_keyring("", tmp_path, {})
    ((level, event),) = [(line["log_level"], line["event"]) for line in logs]
    assert (level, "chmod 600" in event) == ("warning", True)


def test_processes_that_start_at_once_share_one_secret(tmp_path: Path) -> None:
    code = (
        "import gpuproxy.access.keyring as k, pathlib, sys; print(k.load_keyring('', pathlib.Path(sys.argv[1])).newest)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate()[0] for process in started}) == 1


def test_a_variable_goes_before_the_file(tmp_path: Path) -> None:
    keyring = load_keyring("SECRET", tmp_path, {"SECRET": f"{NEW} {OLD}"})
    assert list(keyring.secrets.values()) == [NEW.encode(), OLD.encode()]
    assert keyring.secrets[keyring.newest] == NEW.encode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", " ", "secret", "x" * 31, f"{NEW} short", " ".join([NEW] * 9)])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"jwt_secret_env: SECRET holds") as caught:
        load_keyring("SECRET", tmp_path, {"SECRET": value})
    assert "short" not in str(caught.value).replace("too short", "")
    (tmp_path / FILE_NAME).write_text(value)
    with pytest.raises(ConfigError, match=FILE_NAME):
        load_keyring("", tmp_path, {})


def test_what_is_sealed_opens_in_its_context_only() -> None:
    keyring = fresh_keyring()
    sealed = keyring.seal(b"plain", b"here")
    assert b"plain" not in sealed
    assert keyring.unseal(sealed, b"here") == b"plain"
    assert keyring.unseal(sealed, b"there") is None
    assert keyring.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), b"here") is None
    assert fresh_keyring().unseal(sealed, b"here") is None


def test_what_an_old_secret_sealed_opens_while_it_is_kept() -> None:
    sealed = Keyring((OLD.encode(),)).seal(b"plain", b"")
    assert Keyring((NEW.encode(), OLD.encode())).unseal(sealed, b"") == b"plain"


def test_session_keys_are_the_same_wherever_the_secrets_are_and_do_not_give_them_away() -> None:
    first, second = Keyring((NEW.encode(), OLD.encode())), Keyring((NEW.encode(), OLD.encode()))
    assert first.session_keys() == second.session_keys()
    assert Keyring((OLD.encode(),)).session_keys() == first.session_keys()[1:]
    assert {len(key) for key in first.session_keys()} == {32}
    assert not {NEW.encode(), OLD.encode()} & set(first.session_keys())

"""The command line: what it prints, where, and how it ends."""

import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from gpuproxy import __version__
from gpuproxy.cli import main
from gpuproxy.codec.key import is_well_formed
from gpuproxy.store.migrate import NEWEST

Run = Callable[..., tuple[int, str, str]]
EMAIL = "ann@example.com"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPUPROXY_CONFIG", raising=False)

    def command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return command


def test_a_user_and_a_key_in_two_commands(run: Run) -> None:
    code, user_id, _ = run("user", "create", EMAIL, "--credits", "12.50")
    assert (code, len(user_id.strip())) == (0, 36)
    code, key, err = run("key", "create", "--user", EMAIL)
    assert (code, err) == (0, "")
    assert is_well_formed(key.rstrip("\n").encode())


def test_only_the_key_is_printed(run: Run) -> None:
    run("user", "create", EMAIL)
    _, out, _ = run("key", "create", "--user", EMAIL, "--name", "laptop", "--expires", "7", "--models", "a, b")
    assert out.count("\n") == 1
    _, listed, _ = run("key", "list", "--user", EMAIL, "--json")
    (key,) = json.loads(listed)
    assert (key["name"], key["models"], key["prefix"]) == ("laptop", ["a", "b"], out[:12])
    assert key["expires_at"] is not None


def test_a_key_is_made_with_scopes_and_a_limit(run: Run) -> None:
    run("user", "create", EMAIL, "--admin")
    words = ("--scopes", "inference, admin", "--rpm", "0", "--tools", "web/*, docs/read", "--json")
    made = json.loads(run("key", "create", "--user", EMAIL, *words)[1])
    assert (made["scopes"], made["rpm"], made["tools"]) == (["inference", "admin"], 0, ["web/*", "docs/read"])
    code, _, err = run("key", "create", "--user", EMAIL, "--scopes", "all")
    assert (code, err) == (1, "error: no scope 'all'; known: inference, account, read, admin\n")


def test_a_password_is_set_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("user", "create", EMAIL)
    for typed, code in (("correct horse battery\n", 0), ("password\n", 1)):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert run("user", "password", EMAIL)[:2] == (code, "")


def test_scripts_get_json(run: Run) -> None:
    user = json.loads(run("user", "create", EMAIL, "--admin", "--credits", "1", "--json")[1])
    assert (user["email"], user["is_admin"], user["credits"]) == (EMAIL, True, "1.00")
    key = json.loads(run("key", "create", "--user", EMAIL, "--json")[1])
    assert key["api_key"].startswith(key["prefix"])
    assert json.loads(run("key", "revoke", key["id"], "--json")[1]) == {"id": key["id"], "was_live": True}
    assert json.loads(run("key", "revoke", key["id"], "--json")[1])["was_live"] is False
    assert [each["email"] for each in json.loads(run("user", "list", "--json")[1])] == [EMAIL]
    assert json.loads(run("version", "--json")[1]) == {"version": __version__}
    assert json.loads(run("migrate", "--json")[1]) == {"schema": NEWEST, "was_changed": False}
    assert json.loads(run("check-config", "--json")[1])["is_valid"] is True


def test_lists_are_tab_separated_when_piped(run: Run) -> None:
    run("user", "create", EMAIL)
    assert run("user", "list")[1].split("\t")[1:4] == [EMAIL, "False", "True"]


def test_a_user_is_blocked_and_let_in_again(run: Run) -> None:
    run("user", "create", EMAIL)
    for command, is_active in (("block", False), ("unblock", True)):
        assert run("user", command, EMAIL)[0] == 0
        assert json.loads(run("user", "list", "--json")[1])[0]["is_active"] is is_active


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("user", "create", "nobody"), "error: 'nobody' is not an e-mail address; write name@host"),
        (("key", "create", "--user", "x@y"), "error: no user x@y; create one with: gpuproxy user create x@y"),
        (("key", "revoke", "nix"), "error: no key 'nix'; list them with: gpuproxy key list"),
        (("user", "block", "x@y"), "error: no user x@y; create one with: gpuproxy user create x@y"),
    ],
)
def test_a_fault_of_what_was_asked_is_one_line_and_exit_1(run: Run, words: tuple[str, ...], message: str) -> None:
    assert run(*words) == (1, "", message + "\n")


@pytest.mark.parametrize("credits_usd", ["x", "0", "-1", "1.0000000001"])
def test_a_bad_amount_is_a_fault_of_usage_and_creates_nobody(run: Run, credits_usd: str) -> None:
    code, _, err = run("user", "create", EMAIL, f"--credits={credits_usd}")
    assert (code, "--credits" in err) == (2, True)
    assert run("user", "list")[1] == ""


@pytest.mark.parametrize("words", [("nix",), ("key", "create"), ("user", "create"), ("serve", "--nix")])
def test_wrong_usage_ends_with_2(run: Run, words: tuple[str, ...]) -> None:
    assert run(*words)[0] == 2


@pytest.mark.parametrize("words", [("check-config",), ("serve",), ("user", "list"), ("migrate",)])
def test_every_fault_of_the_configuration_is_a_line_and_ends_with_2(run: Run, words: tuple[str, ...]) -> None:
    Path("bad.toml").write_text('[server]\nport = "x"\nnix = 1\n')
    code, out, err = run(*words, "-c", "bad.toml")
    assert (code, out, len(err.splitlines())) == (2, "", 2)
    assert not Path("gpuproxy.db").exists()


def test_faults_of_the_configuration_as_json(run: Run) -> None:
    Path("bad.toml").write_text('[server]\nport = "x"\nnix = 1\n')
    code, out, _ = run("check-config", "-c", "bad.toml", "--json")
    assert (code, len(json.loads(out)["faults"])) == (2, 2)


def test_what_is_probably_not_meant_is_a_warning_and_no_fault(run: Run) -> None:
    Path("config.toml").write_text(
        '[[upstreams]]\nname = "a"\nprotocol = "https"\nurls = ["https://x"]\nverify_tls = false\n'
    )
    code, out, _ = run("check-config")
    first, last = out.splitlines()
    assert (code, last) == (0, "config.toml: no fault")
    assert first.startswith("warning: upstreams[0].verify_tls: ")
    told = json.loads(run("check-config", "--json")[1])
    assert (told["is_valid"], told["faults"], told["warnings"]) == (True, [], [first.removeprefix("warning: ")])


def test_credit_is_added_and_what_is_there_is_taken_back(run: Run) -> None:
    run("user", "create", EMAIL)
    assert run("credits", "add", EMAIL, "12.50") == (0, f"{EMAIL} has 12.50 USD\n", "")
    assert run("credits", "take", EMAIL, "2.50") == (0, f"{EMAIL} has 10.00 USD\n", "")
    assert run("credits", "take", EMAIL, "11") == (1, "", f"error: {EMAIL} has 10.00 USD; take no more than that\n")
    assert json.loads(run("credits", "take", EMAIL, "10", "--json")[1])["taken"] == "10.00"


def test_a_user_whose_credit_cannot_be_posted_is_not_created(run: Run) -> None:
    run("migrate")
    with closing(sqlite3.connect("gpuproxy.db")) as database:
        database.execute("ALTER TABLE transfers RENAME TO away")
    code, out, err = run("user", "create", EMAIL, "--credits", "5")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert run("user", "list")[1] == ""
    with closing(sqlite3.connect("gpuproxy.db")) as database:
        database.execute("ALTER TABLE away RENAME TO transfers")
    assert run("user", "create", EMAIL, "--credits", "5")[0] == 0


def test_a_missing_configuration_file_is_told(run: Run) -> None:
    code, _, err = run("check-config", "-c", "none.toml")
    assert (code, "none.toml" in err) == (2, True)


@pytest.mark.parametrize("how", ["option", "environment", "folder"])
def test_the_configuration_is_found(run: Run, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "config.toml" if how == "folder" else "other.toml"
    Path(name).write_text('[store]\nurl = "sqlite:///./chosen.db"\n')
    if how == "environment":
        monkeypatch.setenv("GPUPROXY_CONFIG", name)
    words = ("-c", name) if how == "option" else ()
    assert run("user", "create", EMAIL, *words)[0] == 0
    assert Path("chosen.db").exists()


def test_without_a_configuration_the_defaults_hold(run: Run) -> None:
    assert run("migrate")[0] == 0
    assert Path("gpuproxy.db").exists()


def test_a_store_that_cannot_be_opened_is_one_line(run: Run) -> None:
    Path("gpuproxy.db").mkdir()
    code, out, err = run("user", "list")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "unable to open database file; see [store] url" in err


def test_a_bad_store_url_is_one_line_with_the_remedy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUPROXY_STORE__URL", "mysql://h/n")
    code, _, err = run("user", "list")
    assert (code in (1, 2), len(err.splitlines())) == (True, 1)


def test_help_does_not_load_what_it_does_not_need() -> None:
    code = (
        "import sys\nfrom gpuproxy.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('sqlalchemy', 'aiohttp', 'alembic', 'rich', 'structlog', 'uvloop') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_commands_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "gpuproxy.cli", "user", "create", f"u{number}@example.com"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    assert [(process.communicate()[1], process.returncode) for process in started] == [("", 0)] * 3


def test_credit_is_added_and_prices_are_set_and_listed(run: Run) -> None:
    run("user", "create", EMAIL, "--credits", "1")
    assert run("credits", "add", EMAIL, "12.50")[:2] == (0, f"{EMAIL} has 13.50 USD\n")
    assert run("credits", "add", EMAIL, "-1")[0] == 2
    assert run("credits", "add", "nobody@example.com", "1")[0] == 1
    assert run("price", "set", "m", "--request", "0.10", "--input", "0.15")[0] == 0
    (told,) = json.loads(run("price", "list", "--json")[1])
    assert (told["model"], told["request_nanousd"], told["input_nanousd_per_million"]) == ("m", 10**8, 15 * 10**7)
    assert run("price", "set", "search", "--tool", "--upstream", "tools", "--request", "0.01")[0] == 0
    told, _ = json.loads(run("price", "list", "--json")[1])
    assert (told["tool"], told["upstream"], told["request_nanousd"]) == ("search", "tools", 10**7)
    code, _, err = run("price", "set", "m", "--request", "ten")
    assert (code, "per_request_usd" in err) == (2, True)
    code, _, err = run("price", "set", "m")
    assert (code, "no price is given for m" in err) == (2, True), "a forgotten option must not make it free"
    assert run("price", "set", "m", "--request", "0")[0] == 0


def test_a_database_that_is_away_is_named_with_its_key(run: Run) -> None:
    Path("config.toml").write_text('[store]\nurl = "postgresql://u:hunter2@127.0.0.1:9/x"\n')
    code, out, err = run("user", "list")
    assert (code, out) == (1, "")
    assert "the store postgresql://u:***@127.0.0.1:9/x cannot be used" in err
    assert "see [store] url" in err
    assert "hunter2" not in err

"""What is written down is true and complete: configuration, errors, commands, paths, the plugin example."""

import os
import re
from pathlib import Path

import click
import msgspec
import pytest
from msgspec import Struct

from gpuproxy.cli import cli
from gpuproxy.config import Config, Model, Payment, Price, Provider, Upstream, load
from gpuproxy.config.mcp import McpGroup
from gpuproxy.control.pages.table import PAGES
from gpuproxy.control.table import TABLE
from gpuproxy.errors import CODES
from gpuproxy.observe.series import COUNTERS, GAUGES, HISTOGRAMS, MANAGEMENT
from gpuproxy.plugin import Call, Registry, Usage, check_plugins, load_plugins

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIG = (ROOT / "config.toml").read_text()
BLOCKS: dict[str, type[Struct]] = {
    "upstreams": Upstream,
    "models": Model,
    "mcp_groups": McpGroup,
    "prices": Price,
    "providers": Provider,
    "payments": Payment,
}
SECTIONS = {field.name: field.type for field in msgspec.structs.fields(Config) if field.name not in BLOCKS}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """Return all commands by their full names."""
    found = {}
    for name, command in group.commands.items():
        is_group = isinstance(command, click.Group)
        found |= commands(command, f"{prefix}{name} ") if is_group else {prefix + name: command}
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_section_is_explained_where_it_stands(section: str) -> None:
    text = re.split(r"^\[", CONFIG.partition(f"\n[{section}]\n")[2], flags=re.MULTILINE)[0]
    kind: type[Struct] = SECTIONS[section]
    for key in kind.__struct_fields__:
        assert re.search(rf"^{key} = .+  # \S+", text, re.MULTILINE), f"{section}.{key}"


@pytest.mark.parametrize("block", BLOCKS)
def test_every_key_of_a_block_is_explained(block: str) -> None:
    text = CONFIG.partition(f"# [[{block}]]\n")[2].partition("# [[")[0]
    for key in BLOCKS[block].__struct_fields__:
        assert re.search(rf"^# {key} = .+ # \S+", text, re.MULTILINE), key


def test_the_readme_names_every_section() -> None:
    for section in SECTIONS:
        assert f"| `[{section}]` |" in README
    for block in BLOCKS:
        assert f"| `[[{block}]]` |" in README


def test_the_readme_lists_every_error_as_the_table_has_it() -> None:
    written = re.findall(r"^\| `([A-Z_]+)` \| (\d+) \| (\w+) \| (yes|no) \| (.+) \|$", README, re.MULTILINE)
    table = [
        (name, str(code.status), code.source, "yes" if code.is_retryable else "no", code.meaning)
        for name, code in CODES.items()
    ]
    assert written == table


def test_the_readme_names_every_command() -> None:
    for command in commands(cli):
        assert re.search(rf"`[^`]*\b{command}\b[^`]*`", README), command


@pytest.mark.parametrize("command", [pytest.param(each, id=name) for name, each in commands(cli).items()])
def test_the_readme_names_every_option(command: click.Command) -> None:
    for option in command.params:
        if isinstance(option, click.Option):
            assert any(re.search(rf"[ `]{each}[ `]", README) for each in option.opts), option.opts


def test_the_readme_names_every_path_of_the_control_plane() -> None:
    for route in TABLE:
        assert re.search(rf"`({route.method} )?{re.escape(route.path)}`", README), f"{route.method} {route.path}"


def test_the_readme_names_every_page() -> None:
    for page in PAGES:
        place = "/".join(page.path.split("/")[:3])
        assert f"`{place}`" in README or place.rpartition("/")[2] in ("static", "sign-out", "offers"), page.path


def test_the_first_commands_are_the_two_a_newcomer_needs() -> None:
    demo, test = (block.strip() for block in blocks("sh")[:2])
    assert demo.endswith("&& .venv/bin/gpuproxy demo")
    assert test.endswith("&& .venv/bin/pytest -q -n 2 --dist loadfile")
    assert README.index(test) < 1_000


def test_ci_runs_the_test_command_of_the_readme_and_nothing_after_it() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert script.splitlines()[-1] == blocks("sh")[1].strip()
    assert "set -euo pipefail" in script
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_configuration_shown_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(blocks("toml")[0])
    assert [upstream.name for upstream in load(path, {}).upstreams] == ["llm", "tools"]


def test_the_providers_shown_are_those_there_are(tmp_path: Path) -> None:
    shown = next(block for block in blocks("toml") if 'name = "vast.ai"' in block)
    path = tmp_path / "config.toml"
    path.write_text(shown.replace('"ionet"]', '"ionet", "simulated"]'))
    config = load(path, {})
    check_plugins(config, {})
    kinds = load_plugins(config.plugins.enabled).providers
    rows = re.findall(r"^\| `([a-z.]+)` \| `(vast|ionet|simulated)` \| `([a-z]+)` \| (.+?) \|", README, re.MULTILINE)
    assert {name for name, *_ in rows} == set(kinds)
    for name, _, alias, billed in rows:
        assert alias in kinds[name].aliases
        assert ("in advance" in billed) is (kinds[name].basis == "prepaid")


FEATURES = re.findall(r"^\| (.+?) \|$", README.partition("## What is proven\n")[2].partition("\n## ")[0], re.MULTILINE)


def test_every_cell_of_the_table_of_features_names_a_test_that_exists() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    collected = {
        name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    head, _, *rows = ([cell.strip() for cell in row.split("|")] for row in FEATURES)
    assert head == ["feature", "https", "openinference", "mcp", "websocket"]
    assert len(rows) > 20
    for feature, *cells in rows:
        assert len(cells) == 4, feature
        assert any(cell != "–" for cell in cells), feature
        for cell in cells:
            assert cell == "–" or cell[1:-1] in collected, f"{feature}: {cell}"


@pytest.mark.parametrize("name", [*COUNTERS, *HISTOGRAMS, *GAUGES, *MANAGEMENT])
def test_every_series_is_explained_with_its_labels(name: str) -> None:
    labels = {**COUNTERS, **HISTOGRAMS}.get(name, ("", *GAUGES.get(name, MANAGEMENT.get(name, ("", ())))[1:]))
    named = next(part for part in labels[1:] if isinstance(part, tuple))
    assert f"| `{name}` | {', '.join(named)}".rstrip() in README


def test_the_plugin_shown_works() -> None:
    source = next(block for block in blocks("python") if "def register" in block)
    module: dict[str, object] = {"__name__": "tgi"}
    exec(compile(source, "README.md", "exec"), module)
    registry = Registry()
    registry.run("tgi", module["register"])  # type: ignore[arg-type]
    handler = registry.mounts["tgi"]
    call = Call(b"POST", b"/tgi/big/generate", [])
    assert (handler.inspect(call).upstream, handler.inspect(call).path) == ("big", b"/generate")
    reader = handler.reader(call, 200, b"application/json")
    assert reader is not None
    reader.feed(b'{"details": {"prefill": [1, 2],')
    reader.feed(b' "generated_tokens": 7}}')
    assert reader.finish() == Usage(input_tokens=2, output_tokens=7)

"""check-config and reload look at plugins and providers too."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuproxy.cli import cli
from gpuproxy.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        ('[plugins]\nenabled = ["telex"]', None, "no plugin 'telex' is installed"),
        ('\n[[providers]]\nname = "moon"', 2, 'providers[0]: no provider "moon"; known: none; is its plugin in'),
        (
            '[plugins]\nenabled = ["simulated"]\n[[providers]]\nname = "sim"\noptions = { sed = "1" }',
            3,
            'providers[0]: options: "sed" is unknown',
        ),
        ('[[upstreams]]\nname = "a"\nprotocol = "telex"\nurls = ["http://a"]', 3, "upstreams[0].protocol: no plugin"),
    ],
)
def test_what_plugins_cannot_do_is_a_fault_with_its_line(
    tmp_path: Path, text: str, line: int | None, fault: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    result = CliRunner().invoke(cli, ["check-config", "-c", str(path), "--json"])
    assert result.exit_code == 2
    (told,) = json.loads(result.stdout)["faults"]
    assert told.startswith(fault if line is None else f"{path}:{line}: {fault}")
    with pytest.raises(ConfigError) as refused:
        CliRunner().invoke(cli, ["reload", "-c", str(path)], catch_exceptions=False)
    assert refused.value.faults == [told]

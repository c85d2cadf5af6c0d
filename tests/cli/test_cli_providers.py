"""check-config looks at plugins and providers too."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuproxy.cli import cli


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[plugins]\nenabled = ["telex"]', "no plugin 'telex' is installed"),
        ('[[providers]]\nname = "moon"', 'providers[0]: no provider "moon"; known: none; is its plugin in'),
        (
            '[plugins]\nenabled = ["simulated"]\n[[providers]]\nname = "sim"\noptions = { sed = "1" }',
            'providers[0]: options: "sed" is unknown',
        ),
    ],
)
def test_a_provider_that_cannot_be_made_is_a_fault(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    result = CliRunner().invoke(cli, ["check-config", "-c", str(path), "--json"])
    assert result.exit_code == 2
    (told,) = json.loads(result.stdout)["faults"]
    assert fault in told

"""What the plugins cannot do is said before anything starts, with the remedy."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpuproxy.cli import cli
from gpuproxy.config import build
from gpuproxy.errors import ConfigError
from gpuproxy.plugin import check_plugins, load_plugins, routing_faults

PLAIN = {"name": "a", "protocol": "https", "urls": ["http://127.0.0.1:1"]}


def faults(protocol: str, *models: dict[str, Any], **upstream: Any) -> list[str]:
    config = build({"upstreams": [{**PLAIN, "protocol": protocol, **upstream}], "models": list(models)})
    return routing_faults(config, load_plugins(config.plugins.enabled))


RENAMED: list[tuple[str, dict[str, Any]]] = [
    ("targets[1].as", {"targets": [{"upstream": "a"}, {"upstream": "a", "as": "there"}]}),
    ("aliases", {"targets": [{"upstream": "a"}], "aliases": ["other"]}),
    ("fallback", {"targets": [{"upstream": "a"}], "fallback": ["spare"]}),
]


@pytest.mark.parametrize(("key", "model"), RENAMED, ids=[key for key, _ in RENAMED])
def test_a_protocol_that_cannot_rename_gets_no_other_name_to_send(key: str, model: dict[str, Any]) -> None:
    spare = {"name": "spare", "targets": [{"upstream": "a"}]}
    (fault,) = faults("https", {"name": "m", **model}, spare)
    assert fault.startswith(f"models[0].{key}: calls of protocol 'https' cannot name a model otherwise; take it out")
    assert "openinference" in fault, "who can is named"
    assert faults("openinference", {"name": "m", **model}, spare) == []


def test_the_short_form_and_its_own_name_need_no_renaming() -> None:
    assert faults("https", {"name": "m", "targets": [{"upstream": "a", "as": "m"}]}) == []
    assert faults("https", {"name": "m"}, models=["m"]) == []
    assert len(faults("https", {"name": "m", "aliases": ["n"]}, models=["m"])) == 1


def test_an_upstream_of_a_protocol_nobody_speaks_is_refused() -> None:
    (fault,) = faults("smtp")
    assert fault.startswith("upstreams[0].protocol: no plugin speaks 'smtp'; known: https, ")
    with pytest.raises(ConfigError, match="no plugin speaks 'smtp'"):
        check_plugins(build({"upstreams": [{**PLAIN, "protocol": "smtp"}]}), {})


def test_check_config_tells_it(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[[upstreams]]\nname = "a"\nprotocol = "https"\nurls = ["http://127.0.0.1:1"]\n'
        '[[models]]\nname = "m"\naliases = ["n"]\ntargets = [{ upstream = "a" }]\n'
    )
    done = CliRunner().invoke(cli, ["check-config", "--json", "-c", str(path)])
    assert done.exit_code == 2
    assert "models[0].aliases" in done.output

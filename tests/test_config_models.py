"""Models and their targets in the configuration: what fits together, and each fault with its line."""

from pathlib import Path

import msgspec
import pytest

from gpuproxy.config import Config, load, warnings
from gpuproxy.errors import ConfigError

UPSTREAMS = """[[upstreams]]
name = "a"
protocol = "openinference"
urls = ["http://a"]
models = ["short"]
[[upstreams]]
name = "tools"
protocol = "mcp"
urls = ["http://t"]
"""
LINES = UPSTREAMS.count("\n")
MODEL = '[[models]]\nname = "m"\n'


def read(directory: Path, text: str) -> Config:
    path = directory / "config.toml"
    path.write_text(UPSTREAMS + text)
    return load(path, {})


def faults(directory: Path, text: str) -> list[str]:
    """Return the faults, with lines counted from the end of the upstreams."""
    with pytest.raises(ConfigError) as raised:
        read(directory, text)
    told = [fault.removeprefix(f"{directory}/config.toml:").partition(": ") for fault in raised.value.faults]
    return [f"{int(line) - LINES}: {rest}" for line, _, rest in told]


def test_the_commented_model_of_the_shipped_file_is_valid(tmp_path: Path) -> None:
    shipped = (Path(__file__).parent.parent / "config.toml").read_text()
    text = shipped.partition("can. Repeat the block for each one.\n#\n")[2].partition("\n\n")[0].replace("\n# ", "\n")
    llm = text.removeprefix("# ").replace("\n#\n", "\n") + '\n[[upstreams]]\nname = "llm"\nprotocol = "openinference"\n'
    config = read(tmp_path, llm + 'urls = ["http://127.0.0.1:8000"]\n')
    (model,) = config.models
    assert [(target.upstream, target.priority, target.name_there) for target in model.targets] == [
        ("llm", 0, "name-there"),
        ("spare", 1, ""),
    ]
    (said,) = warnings(config, {})
    assert said.startswith("models[0].targets[0].api_key_env: LLM_KEY is not set")


def test_targets_may_be_tables_of_their_own(tmp_path: Path) -> None:
    text = MODEL + '[[models.targets]]\nupstream = "a"\nweight = 2\n[[models.targets]]\nupstream = "a"\nas = "x"\n'
    (model,) = read(tmp_path, text).models
    assert [(target.weight, target.name_there) for target in model.targets] == [(2, ""), (1, "x")]


def test_a_model_of_the_short_form_may_be_described_further(tmp_path: Path) -> None:
    (model,) = read(tmp_path, '[[models]]\nname = "short"\nstrategy = "affinity"').models
    assert (model.strategy, model.targets) == ("affinity", ())


def test_a_model_survives_the_way_to_a_child_process(tmp_path: Path) -> None:
    config = read(tmp_path, MODEL + 'targets = [{ upstream = "a", as = "x" }]')
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("", '1: models[0]: no upstream serves "m"; write targets = [{ upstream = "NAME" }]'),
        ("targets = []", '3: models[0].targets: is empty; write at least one of { upstream = "NAME" }'),
        (
            'targets = [{ upstream = "b" }]',
            '3: models[0].targets[0].upstream: unknown upstream "b"; known: a, tools',
        ),
        (
            'targets = [\n{ upstream = "a" },\n{ upstream = "tools" }]',
            '5: models[0].targets[1].upstream: "tools" speaks mcp, the targets before it openinference; '
            "all must speak one",
        ),
        (
            'targets = [{ upstream = "a" }, { upstream = "a" }]',
            '3: models[0].targets[1].upstream: "a" is the target of targets[0] already; give that one more weight',
        ),
        (
            'targets = [{ upstream = "a", wieght = 2 }]',
            '3: models[0].targets[0].wieght: unknown key "wieght"; did you mean "weight"?',
        ),
        (
            'targets = [{ upstream = "a", weight = 0 }]',
            "3: models[0].targets[0].weight: 0 does not fit: expected int >= 1",
        ),
        (
            'targets = [{ upstream = "a" }]\nstrategy = "random"',
            '4: models[0].strategy: "random" is unknown; known: round_robin, least_connections, power_of_two, '
            "cheapest, affinity",
        ),
        (
            'targets = [{ upstream = "a" }]\nretry_on = ["404"]',
            '4: models[0].retry_on[0]: "404" is unknown; known: 429, 502, 503, 504, lost, first_byte',
        ),
        (
            'targets = [{ upstream = "a" }]\naliases = ["x",\n"short"]',
            '5: models[0].aliases[1]: "short" stands at upstreams[0].models already; rename one',
        ),
        (
            'targets = [{ upstream = "a" }]\naliases = ["m"]',
            '4: models[0].aliases[0]: "m" stands at models[0] already; rename one',
        ),
        (
            f'targets = [{{ upstream = "a" }}]\n{MODEL}targets = [{{ upstream = "a" }}]',
            '5: models[1].name: "m" stands at models[0] already; rename one',
        ),
        (
            'targets = [{ upstream = "a" }]\nfallback = ["shrot"]',
            '4: models[0].fallback[0]: unknown model "shrot"; did you mean "short"?',
        ),
        (
            'targets = [{ upstream = "a" }]\nfallback = ["m"]',
            '4: models[0].fallback[0]: "m" is the model itself; name another one',
        ),
        (
            'targets = [{ upstream = "tools" }]\nfallback = ["short"]',
            '4: models[0].fallback[0]: "short" speaks openinference, "m" mcp',
        ),
        (
            'targets = [{ upstream = "a" }]\naffinity_header = "a b"',
            "4: models[0].affinity_header: is no header name (RFC 9110 §5.1)",
        ),
    ],
)
def test_a_wrong_model_is_refused_with_its_line(tmp_path: Path, lines: str, fault: str) -> None:
    assert faults(tmp_path, MODEL + lines) == [fault]


def test_all_faults_of_models_are_told_at_once(tmp_path: Path) -> None:
    text = MODEL + 'targets = [{ upstream = "b" }]\nfallback = ["x"]\ntotal_s = 0\n'
    assert [fault.partition(": ")[0] for fault in faults(tmp_path, text)] == ["3", "4", "5"]


def test_a_probe_path_is_a_path(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, '[[upstreams]]\nname="x"\nprotocol="mcp"\nurls=["http://x"]\nprobe_path="health"')
    assert fault == '5: upstreams[2].probe_path: "health" is no path; write /PATH'

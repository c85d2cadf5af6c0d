"""How providers enter: by class, under names nobody else has, made from the configuration without asking anyone."""

import pytest

from gpuproxy.config import Provider
from gpuproxy.errors import ConfigError, PluginError
from gpuproxy.plugin import ProviderAdapter, ProviderSettings, Registry, build_providers


def kind(name: str, prefix: str, *aliases: str) -> type[ProviderAdapter]:
    """Return an adapter class with these names that only keeps its settings."""

    class Adapter(ProviderAdapter):
        basis = "per_second"

        def __init__(self, settings: ProviderSettings) -> None:
            if settings.options:
                raise ValueError(f"unknown option {sorted(settings.options)}")
            self.settings = settings

    Adapter.name, Adapter.id_prefix, Adapter.aliases = name, prefix, aliases
    return Adapter


def registry(*kinds: type[ProviderAdapter]) -> Registry:
    """Return a registry in which these are registered."""
    made = Registry()
    for each in kinds:
        made.provider(each)
    return made


def test_a_provider_answers_to_its_name_and_aliases() -> None:
    made = registry(kind("moon.gpu", "moon", "moon"))
    assert set(made.provider_names) == {"moon.gpu", "moon"}
    assert set(made.providers) == {"moon.gpu"}


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (kind("moon.gpu", "m2"), "provider name 'moon.gpu' is taken"),
        (kind("moon", "m2"), "provider name 'moon' is taken"),
        (kind("luna", "m2", "moon.gpu"), "provider name 'moon.gpu' is taken"),
        (kind("all", "m2"), "provider name 'all' is taken"),
        (kind("luna", "moon"), "id prefix 'moon' is taken"),
    ],
)
def test_a_taken_name_or_prefix_stops_the_start(second: type[ProviderAdapter], complaint: str) -> None:
    made = registry(kind("moon.gpu", "moon", "moon"))
    with pytest.raises(PluginError, match=complaint):
        made.run("other", lambda registry: registry.provider(second))


def test_a_half_made_adapter_is_refused_with_what_it_lacks() -> None:
    class Half:
        name = "half"
        aliases = ()

    with pytest.raises(PluginError, match=r"'half'.*lacks basis, charges, check"):
        Registry().run("half", lambda registry: registry.provider(Half))  # type: ignore[arg-type]


def test_an_adapter_is_made_from_its_block_with_the_credential_of_the_environment() -> None:
    block = Provider(name="moon", api_key_env="MOON_KEY", base_url="http://127.0.0.1:1", spacing_s=0.0)
    built = build_providers((block,), registry(kind("moon.gpu", "moon", "moon")), {"MOON_KEY": "hunter2\n"})
    settings = built["moon.gpu"].settings  # type: ignore[attr-defined]
    assert (settings.api_key, settings.base_url, settings.spacing_s) == ("hunter2", "http://127.0.0.1:1", 0.0)
    assert "hunter2" not in f"{settings!r} {settings}"


def test_a_provider_switched_off_is_not_made() -> None:
    assert build_providers((Provider(name="moon", enabled=False),), registry(), {}) == {}


def test_every_wrong_block_is_named_with_the_remedy() -> None:
    blocks = (
        Provider(name="sun"),
        Provider(name="moon.gpu", options={"x": "1"}),
        Provider(name="moon.gpu"),
        Provider(name="moon"),
    )
    with pytest.raises(ConfigError) as raised:
        build_providers(blocks, registry(kind("moon.gpu", "moon", "moon")), {})
    assert raised.value.faults == [
        'providers[0]: no provider "sun"; known: moon.gpu; is its plugin in [plugins] enabled?',
        "providers[1]: unknown option ['x']",
        'providers[3]: "moon" is another name of "moon.gpu", which is there already; keep one',
    ]

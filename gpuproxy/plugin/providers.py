"""From `[[providers]]` blocks to adapters. Control makes and keeps them; workers make none."""

from collections.abc import Iterable, Mapping

from gpuproxy.config import Config, Provider
from gpuproxy.errors import ConfigError, PluginError
from gpuproxy.plugin.provider import ProviderAdapter, ProviderSettings
from gpuproxy.plugin.registry import Registry, load_plugins
from gpuproxy.plugin.routing import routing_faults


def build_providers(
    blocks: Iterable[Provider], registry: Registry, environment: Mapping[str, str]
) -> dict[str, ProviderAdapter]:
    """Return the adapters that are switched on, by their proper name. Raises ConfigError with every fault.

    Nothing is asked of a provider here; one that has no credential is made all the same and says so when used.
    """
    built: dict[str, ProviderAdapter] = {}
    faults: list[str] = []
    for index, block in enumerate(blocks):
        try:
            if block.enabled:
                _add(built, block, registry, environment)
        except ValueError as error:
            faults.append(f"providers[{index}]: {error}")
    if faults:
        raise ConfigError(faults)
    return built


def _add(
    built: dict[str, ProviderAdapter], block: Provider, registry: Registry, environment: Mapping[str, str]
) -> None:
    kind = registry.provider_names.get(block.name)
    if kind is None:
        known = ", ".join(sorted(registry.providers)) or "none"
        raise ValueError(f'no provider "{block.name}"; known: {known}; is its plugin in [plugins] enabled?')
    if kind.name in built:
        raise ValueError(f'"{block.name}" is another name of "{kind.name}", which is there already; keep one')
    built[kind.name] = kind(_settings(block, environment))


def _settings(block: Provider, environment: Mapping[str, str]) -> ProviderSettings:
    key = environment.get(block.api_key_env, "").strip() if block.api_key_env else ""
    return ProviderSettings(key, block.base_url, block.spacing_s, block.timeout_s, block.options)


def check_plugins(config: Config, environment: Mapping[str, str]) -> None:
    """See whether plugins can be loaded, can do what models want, and providers be made. Raises ConfigError."""
    try:
        registry = load_plugins(config.plugins.enabled)
    except PluginError as error:
        raise ConfigError([str(error)]) from error
    if faults := routing_faults(config, registry):
        raise ConfigError(faults)
    build_providers(config.providers, registry, environment)

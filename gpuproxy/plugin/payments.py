"""From `[[payments]]` blocks to payment providers. Called by control alone; workers make none."""

from collections.abc import Iterable, Mapping

from gpuproxy.config import Payment
from gpuproxy.errors import ConfigError
from gpuproxy.plugin.payment import PaymentProvider, PaymentSettings
from gpuproxy.plugin.registry import Registry


def build_payments(
    blocks: Iterable[Payment], registry: Registry, environment: Mapping[str, str]
) -> dict[str, PaymentProvider]:
    """Return the configured providers by name. Raises ConfigError with every fault. Nothing is asked of them here."""
    built: dict[str, PaymentProvider] = {}
    faults: list[str] = []
    for index, block in enumerate(blocks):
        try:
            built[block.name] = _built(block, registry, environment)
        except ValueError as error:
            faults.append(f"payments[{index}]: {error}")
    if faults:
        raise ConfigError(faults)
    return built


def _built(block: Payment, registry: Registry, environment: Mapping[str, str]) -> PaymentProvider:
    kind = registry.payments.get(block.name)
    if kind is None:
        known = ", ".join(sorted(registry.payments)) or "none"
        raise ValueError(f'no payment provider "{block.name}"; known: {known}; is its plugin in [plugins] enabled?')
    key, secrets = (_secret(variable, environment) for variable in (block.api_key_env, block.webhook_secret_env))
    return kind(PaymentSettings(key, tuple(secrets.split()), block.base_url, block.return_url, block.options))


def _secret(variable: str, environment: Mapping[str, str]) -> str:
    """Return what the variable holds, without the newline a file may have left; nothing for no variable."""
    found = environment.get(variable, "").strip() if variable else ""
    if variable and not found:
        raise ValueError(f"{variable} is not set; export it")
    return found

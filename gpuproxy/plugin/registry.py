"""What plugins have registered, and how they are found."""

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from gpuproxy.errors import PluginError
from gpuproxy.plugin.payment import PaymentProvider
from gpuproxy.plugin.protocol import ProtocolHandler
from gpuproxy.plugin.provider import ProviderAdapter

GROUP = "gpuproxy.plugins"


class Registry:
    """What plugins have registered. Refuses duplicates, unknown kinds and half-made handlers."""

    def __init__(self) -> None:
        self.protocols: dict[str, ProtocolHandler] = {}
        self.mounts: dict[str, ProtocolHandler] = {}
        self.payments: dict[str, type[PaymentProvider]] = {}
        self.providers: dict[str, type[ProviderAdapter]] = {}  # by name
        self.provider_names: dict[str, type[ProviderAdapter]] = {}  # by name and alias
        self._plugin = "?"

    def protocol(self, handler: ProtocolHandler) -> None:
        """Add a protocol handler."""
        if not isinstance(handler, ProtocolHandler):
            lacking = sorted(name for name in _members(ProtocolHandler) if not hasattr(handler, name))
            raise PluginError(f"plugin {self._plugin!r}: its protocol handler lacks {', '.join(lacking)}")
        if handler.name in self.protocols:
            raise PluginError(f"plugin {self._plugin!r}: protocol {handler.name!r} is registered already; rename one")
        for mount in handler.mounts:
            if mount in self.mounts or mount in ("upstreams", "instances"):
                raise PluginError(f"plugin {self._plugin!r}: mount {mount!r} is taken; choose another")
        self.protocols[handler.name] = handler
        self.mounts.update(dict.fromkeys(handler.mounts, handler))

    def provider(self, adapter: type[ProviderAdapter]) -> None:
        """Add a kind of GPU provider: the class, which is made later, in control, if the configuration names it."""
        if lacking := sorted(name for name in _members(ProviderAdapter) if not hasattr(adapter, name)):
            raise PluginError(f"plugin {self._plugin!r}: its provider adapter lacks {', '.join(lacking)}")
        names = (adapter.name, *adapter.aliases)
        for name in names:
            if name in self.provider_names or name == "all":
                raise PluginError(f"plugin {self._plugin!r}: provider name {name!r} is taken; choose another")
        if adapter.id_prefix in (known.id_prefix for known in self.providers.values()):
            raise PluginError(f"plugin {self._plugin!r}: id prefix {adapter.id_prefix!r} is taken; choose another")
        self.providers[adapter.name] = adapter
        self.provider_names.update(dict.fromkeys(names, adapter))

    def payment(self, provider: type[PaymentProvider]) -> None:
        """Add a payment provider: the class, for only the control process makes one of it."""
        lacking = sorted(name for name in _members(PaymentProvider) if not hasattr(provider, name))
        if lacking:
            raise PluginError(f"plugin {self._plugin!r}: its payment provider lacks {', '.join(lacking)}")
        if provider.name in self.payments:
            message = f"plugin {self._plugin!r}: payment provider {provider.name!r} is registered already; rename one"
            raise PluginError(message)
        self.payments[provider.name] = provider

    def run(self, name: str, register: Callable[["Registry"], None]) -> None:
        """Let the plugin `name` register itself; any failure names it."""
        self._plugin = name
        try:
            register(self)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"plugin {name!r} failed to register: {type(error).__name__}: {error}") from error


def _members(contract: Any) -> set[str]:
    return {name for name in (*contract.__annotations__, *vars(contract)) if not name.startswith("_")}


def load_plugins(enabled: Iterable[str], found: Iterable[EntryPoint] | None = None) -> Registry:
    """Load the enabled plugins, in the order given, and return what they registered. Raises PluginError."""
    by_name = {point.name: point for point in (entry_points(group=GROUP) if found is None else found)}
    registry = Registry()
    for name in enabled:
        if name not in by_name:
            known = ", ".join(sorted(by_name)) or "none"
            raise PluginError(
                f"no plugin {name!r} is installed; installed: {known}. Install it or take it out of [plugins] enabled"
            )
        try:
            module = by_name[name].load()
        except Exception as error:
            raise PluginError(f"plugin {name!r} cannot be imported: {type(error).__name__}: {error}") from error
        register = getattr(module, "register", None)
        if register is None:
            raise PluginError(f"plugin {name!r}: module {by_name[name].value} has no register(registry) function")
        registry.run(name, register)
    return registry

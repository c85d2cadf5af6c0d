"""The one door for plugins: the contracts they fill, the nouns they see, and the registry.

A plugin is a module with ``def register(registry: Registry) -> None``, named by an entry point of the group
``gpuproxy.plugins`` and switched on in config.toml under ``[plugins] enabled``. Plugins import this module
and nothing else of gpuproxy. A wrong one stops the start with its name and the remedy.
"""

from gpuproxy.codec import mcp as mcp_codec
from gpuproxy.codec import origins as web_origins
from gpuproxy.codec.events import EventCutter, with_data
from gpuproxy.codec.paths import has_dot_segments
from gpuproxy.codec.seal import Seal
from gpuproxy.codec.sse import EVENT_BYTES_MAX, TAIL_BYTES, EventFilter, event_payloads
from gpuproxy.codec.tools import may_use
from gpuproxy.errors import CODES, Code, GatewayError, PluginError
from gpuproxy.plugin.models import ModelLister, ModelOffer, ModelRenamer
from gpuproxy.plugin.offers import best_offers, is_fitting, is_same_model, short_model
from gpuproxy.plugin.payment import (
    Checkout,
    EventKind,
    Order,
    Outcome,
    PaymentEvent,
    PaymentProvider,
    PaymentSettings,
    RefundOrder,
)
from gpuproxy.plugin.payments import build_payments
from gpuproxy.plugin.protocol import (
    AnswerEditor,
    BodySparer,
    Call,
    HeaderList,
    Intent,
    ProtocolHandler,
    Sequel,
    ToolReader,
    UpstreamRequest,
    UsageReader,
)
from gpuproxy.plugin.provider import (
    SHELL,
    Basis,
    ChargeKind,
    InstanceSpec,
    InstanceState,
    Offer,
    OfferQuery,
    Phase,
    ProviderAdapter,
    ProviderCharge,
    ProviderInstance,
    ProviderSettings,
)
from gpuproxy.plugin.provider_errors import (
    CapacityGone,
    InstanceGone,
    InsufficientFunds,
    InvalidAnswer,
    NotSupported,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    SpecRefused,
    Unauthorized,
)
from gpuproxy.plugin.providers import build_providers, check_plugins
from gpuproxy.plugin.registry import GROUP, Registry, load_plugins
from gpuproxy.plugin.routing import routing_faults
from gpuproxy.plugin.sessions import PROXY_PREFIX, Attached, HeadEditor, Pin, Station
from gpuproxy.plugin.visits import Receptionist, Visit
from gpuproxy.types import Usage

__all__ = [
    "CODES",
    "EVENT_BYTES_MAX",
    "GROUP",
    "PROXY_PREFIX",
    "SHELL",
    "TAIL_BYTES",
    "AnswerEditor",
    "Attached",
    "Basis",
    "BodySparer",
    "Call",
    "CapacityGone",
    "ChargeKind",
    "Checkout",
    "Code",
    "EventCutter",
    "EventFilter",
    "EventKind",
    "GatewayError",
    "HeadEditor",
    "HeaderList",
    "InstanceGone",
    "InstanceSpec",
    "InstanceState",
    "InsufficientFunds",
    "Intent",
    "InvalidAnswer",
    "ModelLister",
    "ModelOffer",
    "ModelRenamer",
    "NotSupported",
    "Offer",
    "OfferQuery",
    "Order",
    "Outcome",
    "PaymentEvent",
    "PaymentProvider",
    "PaymentSettings",
    "Phase",
    "Pin",
    "PluginError",
    "ProtocolHandler",
    "ProviderAdapter",
    "ProviderCharge",
    "ProviderError",
    "ProviderInstance",
    "ProviderSettings",
    "ProviderUnavailable",
    "RateLimited",
    "Receptionist",
    "RefundOrder",
    "Registry",
    "Seal",
    "Sequel",
    "SpecRefused",
    "Station",
    "ToolReader",
    "Unauthorized",
    "UpstreamRequest",
    "Usage",
    "UsageReader",
    "Visit",
    "best_offers",
    "build_payments",
    "build_providers",
    "check_plugins",
    "event_payloads",
    "has_dot_segments",
    "is_fitting",
    "is_same_model",
    "load_plugins",
    "may_use",
    "mcp_codec",
    "routing_faults",
    "short_model",
    "web_origins",
    "with_data",
]

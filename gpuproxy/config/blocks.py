"""The blocks of which there may be several, but for models: upstreams, prices, providers, payments."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from gpuproxy.config import checks
from gpuproxy.config.kinds import Name, PositiveSeconds, ReadableFile, Text, Usd, VariableName
from gpuproxy.config.reader import Faults

BaseUrl = Annotated[str, Meta(extra={"check": checks.base_url})]
BaseUrls = Annotated[tuple[BaseUrl, ...], Meta(extra={"required": "http://HOST[:PORT][/PATH]"})]
Headers = Annotated[dict[str, str], Meta(extra={"check": checks.header, "secret": True})]
Percent = Annotated[str, Meta(extra={"check": checks.percent})]
Options = Annotated[dict[str, str], Meta(extra={"check": checks.option})]


class Upstream(Struct, forbid_unknown_fields=True, frozen=True):
    """A configured destination; its address is trusted and passes no guard.

    ``api_key_env`` names an environment variable whose value is sent as Bearer. ``verify_tls`` and
    ``ca_file`` concern https URLs. A ``urls`` list of several is used in turn. ``probe_path`` is asked now and then
    by every worker: an endpoint that does not answer it with 2xx gets no calls.
    """

    name: Name
    protocol: Text
    urls: BaseUrls
    models: tuple[Text, ...] = ()
    include_usage: bool = True
    api_key_env: VariableName = ""
    headers: Headers = {}
    preserve_host: bool = False
    verify_tls: bool = True
    ca_file: ReadableFile = ""
    first_byte_s: PositiveSeconds | None = None
    idle_s: PositiveSeconds | None = None
    probe_path: Annotated[str, Meta(extra={"check": checks.optional_path})] = ""


class Price(Struct, forbid_unknown_fields=True, frozen=True):
    """What calls of a model, or of a tool, cost, in dollars as text, for no float can hold them exactly; "" is nothing.

    ``model`` may be "*" for every model, ``tool`` for every tool; one of them is given. An empty ``upstream`` means
    all. Cached input costs what input costs unless it has a price.
    """

    model: Annotated[str, Meta(extra={"check": checks.optional_text})] = ""
    upstream: Annotated[str, Meta(extra={"check": checks.optional_upstream_name})] = ""
    input_usd_per_million: Usd = ""
    cached_input_usd_per_million: Usd = ""
    output_usd_per_million: Usd = ""
    per_request_usd: Usd = ""
    per_second_usd: Usd = ""
    tool: Annotated[str, Meta(extra={"check": checks.optional_text})] = ""


class Provider(Struct, forbid_unknown_fields=True, frozen=True):
    """A marketplace to rent GPUs at, by the name of an enabled plugin's provider.

    ``api_key_env`` names the environment variable with the credential. ``spacing_s`` is the least time between two
    calls of one kind, None what the provider asks for. ``markup_percent`` is what customers pay on top of the
    provider's prices. ``options`` are what only this provider knows.
    """

    name: Text
    api_key_env: VariableName = ""
    base_url: Annotated[str, Meta(extra={"check": checks.optional_base_url})] = ""
    spacing_s: Annotated[float, Meta(ge=0, le=60)] | None = None
    timeout_s: PositiveSeconds = 30.0
    enabled: bool = True
    markup_percent: Percent = ""
    options: Options = {}


class Payment(Struct, forbid_unknown_fields=True, frozen=True):
    """A way to take money, by the name of an enabled plugin's payment provider.

    ``api_key_env`` and ``webhook_secret_env`` name environment variables; the second may hold several secrets,
    separated by spaces. ``return_url`` is where customers come back to. ``options`` are what only this provider knows.
    """

    name: Text
    api_key_env: VariableName = ""
    webhook_secret_env: VariableName = ""
    base_url: Annotated[str, Meta(extra={"check": checks.optional_base_url})] = ""
    return_url: Annotated[str, Meta(extra={"check": checks.optional_base_url})] = ""
    options: Options = {}


def check_prices(prices: Any, faults: Faults) -> None:
    """Note prices that are for nothing, or for the same as another; `prices` is what was written, right or wrong."""
    first: dict[tuple[str, str, str], int] = {}
    for index, price in enumerate(prices if isinstance(prices, list) else ()):
        if not isinstance(price, dict):
            continue
        model, upstream, tool = (price.get(name, "") for name in ("model", "upstream", "tool"))
        if not isinstance(model, str) or not isinstance(upstream, str) or not isinstance(tool, str):
            continue
        place = ("prices", index, "tool" if tool else "model")
        if complaint := checks.priced(model, tool, price):
            faults.add(place, complaint)
        before = first.setdefault((model, upstream, tool), index)
        if before != index:
            faults.add(place, f"{checks.show(model or tool)} has its price in prices[{before}]; keep one")

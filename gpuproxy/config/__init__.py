"""The configuration: Structs that are the defaults, and the strict way from TOML to them."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_origin

import msgspec
from msgspec import Meta, Struct

from gpuproxy.config import checks
from gpuproxy.config.blocks import Payment as Payment
from gpuproxy.config.blocks import Price as Price
from gpuproxy.config.blocks import Provider as Provider
from gpuproxy.config.blocks import Upstream as Upstream
from gpuproxy.config.blocks import check_prices
from gpuproxy.config.kinds import Positive, PositiveSeconds, ReadableFile, Text, Usd, VariableName
from gpuproxy.config.mcp import Mcp, McpGroup, check_groups, unknown_servers
from gpuproxy.config.models import Model as Model
from gpuproxy.config.models import Target as Target
from gpuproxy.config.models import check_models
from gpuproxy.config.reader import Faults, bare, read_struct, unknown
from gpuproxy.config.routing import Routing
from gpuproxy.config.toml_lines import key_lines
from gpuproxy.errors import ConfigError

StoreUrl = Annotated[str, Meta(extra={"check": checks.store_url, "secret": True})]
RedisUrl = Annotated[str, Meta(extra={"check": checks.redis_url, "secret": True})]
Network = Annotated[str, Meta(extra={"check": checks.network})]
PageOrigin = Annotated[str, Meta(extra={"check": checks.page_origin})]
Level = Annotated[str, Meta(extra={"check": checks.one_of(checks.LOG_LEVELS)})]
Format = Annotated[str, Meta(extra={"check": checks.one_of(checks.LOG_FORMATS)})]
Connections = Annotated[dict[str, str], Meta(extra={"check": checks.connection})]


class Server(Struct, forbid_unknown_fields=True, frozen=True):
    """Where the gateway listens and how it runs."""

    host: Text = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    workers: Annotated[int, Meta(ge=1, le=256)] = 2
    data_dir: Text = "./gpuproxy-data"
    drain_s: PositiveSeconds = 30.0
    trusted_proxies: tuple[Network, ...] = ()
    watch_config: bool = True
    public_url: Annotated[str, Meta(extra={"check": checks.optional_base_url})] = ""

    @property
    def is_local(self) -> bool:
        """Tell whether it listens for its own machine only."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


class Limits(Struct, forbid_unknown_fields=True, frozen=True):
    """Bounds on what a client may send and hold."""

    head_bytes_max: Positive = 65_536
    header_count_max: Positive = 128
    body_bytes_max: Positive = 67_108_864
    buffered_body_bytes_max: Positive = 33_554_432
    envelope_answer_bytes_max: Positive = 67_108_864
    write_buffer_bytes: Positive = 65_536
    connections_max: Positive = 16_384
    upstream_connections_max: Positive = 4_096


class Timeouts(Struct, forbid_unknown_fields=True, frozen=True):
    """Every wait has a bound; all in seconds."""

    head_s: PositiveSeconds = 10.0
    body_idle_s: PositiveSeconds = 30.0
    keepalive_s: PositiveSeconds = 75.0
    dns_s: PositiveSeconds = 2.0
    connect_s: PositiveSeconds = 5.0
    first_byte_s: PositiveSeconds = 120.0
    idle_s: PositiveSeconds = 330.0
    upstream_keepalive_s: PositiveSeconds = 4.0
    linger_s: PositiveSeconds = 2.0


class Store(Struct, forbid_unknown_fields=True, frozen=True):
    """Where accounts, ledger and receipts are kept."""

    url: StoreUrl = "sqlite:///./gpuproxy.db"


class Redis(Struct, forbid_unknown_fields=True, frozen=True):
    """What several nodes count together; empty: this is the only one."""

    url: RedisUrl = ""


class Auth(Struct, forbid_unknown_fields=True, frozen=True):
    """Who may have an account, how long tokens last, how long workers trust what they know about a key."""

    grant_ttl_s: PositiveSeconds = 60.0
    unknown_key_ttl_s: PositiveSeconds = 5.0
    stale_grant_s: PositiveSeconds = 3_600.0
    authorize_timeout_s: PositiveSeconds = 2.0
    allow_registration: bool = True
    access_token_s: Annotated[float, Meta(ge=1, le=900)] = 900.0  # what is signed is believed until it ends
    refresh_token_s: PositiveSeconds = 2_592_000.0
    jwt_secret_env: VariableName = ""
    cookie_origins: tuple[PageOrigin, ...] = ()


class Rates(Struct, forbid_unknown_fields=True, frozen=True):
    """What a user may do with all keys that have no limit of their own, in a minute and at once; 0 is no limit."""

    requests_per_minute: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 100
    tokens_per_minute: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0
    streams: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0


class Credit(Struct, forbid_unknown_fields=True, frozen=True):
    """What calls of models with a price reserve where the caller bounds nothing, and below what customers are told."""

    output_tokens_default: Positive = 4_096
    reserved_s: PositiveSeconds = 60.0
    low_usd: Usd = "1.00"


class Journal(Struct, forbid_unknown_fields=True, frozen=True):
    """The receipts on their way from workers to the store."""

    bytes_max: Positive = 1_073_741_824
    segment_bytes: Positive = 67_108_864
    sync_s: PositiveSeconds = 0.005
    ingest_s: PositiveSeconds = 0.1


class Ledger(Struct, forbid_unknown_fields=True, frozen=True):
    """How long receipts are kept one by one, and when credit that a lost machine had leased is free again.

    ``retention_days`` 0 keeps them for ever. ``lost_node_s`` is at least twice `Auth.stale_grant_s`: for so long a
    machine that is only cut off spends what it has leased, and nobody else can know what.
    """

    retention_days: Annotated[int, Meta(ge=0, le=36_500)] = 0
    lost_node_s: PositiveSeconds = 7_200.0


class Events(Struct, forbid_unknown_fields=True, frozen=True):
    """What happened: how soon ``/ws`` tells it, how long it is kept, who may hear what all may hear.

    ``kept_s`` is at least five days, for a webhook is tried for over three.
    """

    poll_s: PositiveSeconds = 0.25
    kept_s: Annotated[float, Meta(ge=432_000, le=315_360_000)] = 2_592_000.0
    gpu_updates_public: bool = True
    sockets_max: Positive = 16_384
    usage_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 10.0


class Webhooks(Struct, forbid_unknown_fields=True, frozen=True):
    """How deliveries are sent; each bound is of one node."""

    timeout_s: Annotated[float, Meta(gt=0, le=30)] = 15.0  # Standard Webhooks wants 15 to 30
    connect_s: PositiveSeconds = 5.0
    sends_max: Annotated[int, Meta(ge=2, le=4_096)] = 128
    endpoint_sends_max: Annotated[int, Meta(ge=1, le=64)] = 4
    per_account_max: Annotated[int, Meta(ge=0, le=1_000)] = 32


class Egress(Struct, forbid_unknown_fields=True, frozen=True):
    """What user-given targets may reach beyond public addresses.

    ``allow`` lists networks (CIDR). ``connect_to`` maps "host:port" to "host:port" as curl's option of that
    name does: the name stays in Host, SNI and certificate check, only the address dialled changes.
    """

    allow: tuple[Network, ...] = ()
    connect_to: Connections = {}
    ca_file: ReadableFile = ""


class Log(Struct, forbid_unknown_fields=True, frozen=True):
    """Log lines on standard error. LOG_LEVEL and LOG_FORMAT override."""

    level: Level = "info"
    format: Format = "text"
    access: bool = True


class Traces(Struct, forbid_unknown_fields=True, frozen=True):
    """Where spans of calls are sent, in OTLP over HTTP; without an ``endpoint`` there are none.

    ``headers_env`` names the environment variable with header fields for the receiver, as OpenTelemetry writes them:
    ``name=value``, separated by commas. ``sample_ratio`` holds for calls whose caller has not decided.
    """

    endpoint: Annotated[str, Meta(extra={"check": checks.optional_base_url})] = ""
    headers_env: VariableName = ""
    service_name: Text = "gpuproxy"
    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 1.0
    queue_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 8_192
    batch_max: Annotated[int, Meta(ge=1, le=10_000)] = 512
    interval_s: PositiveSeconds = 1.0
    timeout_s: PositiveSeconds = 10.0


class Fleet(Struct, forbid_unknown_fields=True, frozen=True):
    """How rented machines are looked after; where they are rented stands in ``[[providers]]``."""

    reconcile_s: Annotated[float, Meta(ge=1, le=300)] = 60.0  # at most what is left after the last warning
    poll_s: Annotated[float, Meta(ge=0.1, le=300)] = 5.0
    offers_s: Annotated[float, Meta(ge=1, le=86_400)] = 60.0
    offers_stale_s: Annotated[float, Meta(ge=1, le=86_400)] = 300.0
    provision_s: PositiveSeconds = 1_800.0
    pending_s: PositiveSeconds = 600.0
    rentals_max: Annotated[int, Meta(ge=1, le=10_000)] = 100


class Plugins(Struct, forbid_unknown_fields=True, frozen=True):
    """Which entry points of the group ``gpuproxy.plugins`` are switched on."""

    enabled: tuple[Text, ...] = ("https", "mcp", "openinference")


class Config(Struct, forbid_unknown_fields=True, frozen=True):
    """The whole of config.toml."""

    server: Server = Server()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    store: Store = Store()
    redis: Redis = Redis()
    auth: Auth = Auth()
    rates: Rates = Rates()
    credit: Credit = Credit()
    journal: Journal = Journal()
    ledger: Ledger = Ledger()
    events: Events = Events()
    webhooks: Webhooks = Webhooks()
    egress: Egress = Egress()
    log: Log = Log()
    traces: Traces = Traces()
    fleet: Fleet = Fleet()
    plugins: Plugins = Plugins()
    routing: Routing = Routing()
    mcp: Mcp = Mcp()
    mcp_groups: tuple[McpGroup, ...] = ()
    upstreams: tuple[Upstream, ...] = ()
    models: tuple[Model, ...] = ()
    prices: tuple[Price, ...] = ()
    providers: tuple[Provider, ...] = ()
    payments: tuple[Payment, ...] = ()


PREFIX = "GPUPROXY_"
CONVENTIONAL = {"LOG_LEVEL": ("log", "level"), "LOG_FORMAT": ("log", "format")}  # names other programs share
BLOCKS = ("upstreams", "models", "mcp_groups", "prices", "providers", "payments")  # of which there may be several
SECTIONS: dict[str, type[Struct]] = {
    field.name: field.type for field in msgspec.structs.fields(Config) if field.name not in BLOCKS
}


def load(path: Path | None, environment: Mapping[str, str]) -> Config:
    """Read the file (None: the defaults), lay the environment over it, and check the whole.

    Raises ConfigError with every fault found, each naming file and line, or the variable.
    """
    text = _read_text(path) if path else ""
    tree = _parse(text, str(path))
    faults = Faults(str(path) if path else "config", key_lines(text))
    _override(tree, environment, faults)
    return build(tree, faults)


def build(tree: Mapping[str, Any], faults: Faults | None = None) -> Config:
    """Turn plain values, as tomllib gives them, into a Config. Raises ConfigError with every fault."""
    faults = faults or Faults()
    config = read_struct(Config, tree, (), faults)
    _check_names_differ("upstreams", tree.get("upstreams"), faults)
    check_models(tree, faults)
    _check_names_differ("mcp_groups", tree.get("mcp_groups"), faults)
    check_groups(dict(tree), faults)
    _check_names_differ("providers", tree.get("providers"), faults)
    _check_names_differ("payments", tree.get("payments"), faults)
    check_prices(tree.get("prices"), faults)
    if config is not None:
        _check_lost_node(config, faults)
    faults.raise_if_any()
    assert config is not None  # a reader that returns None has noted a fault
    return config


def warnings(config: Config, environment: Mapping[str, str]) -> list[str]:
    """Name what is allowed but probably not meant, one line each."""
    said = []
    variable = config.auth.jwt_secret_env
    if variable and not environment.get(variable):
        said.append(f"auth.jwt_secret_env: {variable} is not set, so the gateway will not start; export it")
    variable = config.traces.headers_env
    if variable and not environment.get(variable):
        said.append(f"traces.headers_env: {variable} is not set, so no credential is sent; export it")
    for index, upstream in enumerate(config.upstreams):
        place, variable = f"upstreams[{index}]", upstream.api_key_env
        if variable and not environment.get(variable):
            said.append(f"{place}.api_key_env: {variable} is not set, so no credential is sent; export it")
        if not upstream.verify_tls:
            said.append(f"{place}.verify_tls: any certificate is believed; name the right one in ca_file instead")
    said += unknown_servers(config.mcp_groups, {upstream.name for upstream in config.upstreams})
    for index, model in enumerate(config.models):
        for at, target in enumerate(model.targets):
            variable = target.api_key_env
            if variable and not environment.get(variable):
                place = f"models[{index}].targets[{at}].api_key_env"
                said.append(f"{place}: {variable} is not set, so no credential is sent; export it")
    for index, provider in enumerate(config.providers):
        variable = provider.api_key_env
        if provider.enabled and variable and not environment.get(variable):
            said.append(f"providers[{index}].api_key_env: {variable} is not set, so nothing can be rented; export it")
    for index, payment in enumerate(config.payments):
        for name in ("api_key_env", "webhook_secret_env"):
            variable = getattr(payment, name)
            if variable and not environment.get(variable):
                said.append(
                    f"payments[{index}].{name}: {variable} is not set, so the gateway will not start; export it"
                )
    return said


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"]) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError([f"{path}: {reason}; name a readable file with -c or GPUPROXY_CONFIG"]) from error


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError([f"{source}: nested too deeply"]) from error
    except ValueError as error:
        message, _, at = str(error).partition(" (at line ")
        numbers = re.findall(r"[0-9]+", at)
        place = f"{numbers[0]}: column {numbers[1]}" if numbers else str(text.count("\n") + 1)
        raise ConfigError([f"{source}:{place}: {message}"]) from error


def _override(tree: dict[str, Any], environment: Mapping[str, str], faults: Faults) -> None:
    for variable, (section, key) in CONVENTIONAL.items():
        if environment.get(variable):
            _override_one(tree, variable, section, key, environment[variable].lower(), faults)
    for variable in sorted(name for name in environment if name.startswith(PREFIX)):
        section, separator, key = variable.removeprefix(PREFIX).lower().partition("__")
        if separator:
            _override_one(tree, variable, section, key, environment[variable], faults)
        elif meant := next((name for name in _override_names() if name.replace("__", "_") == variable), None):
            faults.add_variable(variable, f"sets nothing; write {meant}, with two underscores")


def _override_names() -> list[str]:
    return [f"{PREFIX}{name}__{key}".upper() for name in SECTIONS for key in SECTIONS[name].__struct_fields__]


def _override_one(tree: dict[str, Any], variable: str, section: str, key: str, text: str, faults: Faults) -> None:
    fields = msgspec.structs.fields(SECTIONS[section]) if section in SECTIONS else ()
    kinds = {field.name: field.type for field in fields}
    table = tree.setdefault(section, {}) if kinds else None
    if not kinds:
        faults.add_variable(variable, unknown("section", section, SECTIONS))
    elif key not in kinds:
        faults.add_variable(variable, unknown("key", key, kinds))
    elif isinstance(table, dict):  # else the file is at fault, and is told so
        table[key] = _from_text(kinds[key], text)
        faults.variables[(section, key)] = variable


def _from_text(kind: Any, text: str) -> Any:
    """Read a variable as a field of this type: lists are comma separated, tables are k=v,k=v."""
    inner, _ = bare(kind)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(inner) is tuple:
        return parts
    if get_origin(inner) is dict:
        return dict(part.partition("=")[::2] for part in parts)
    try:
        return msgspec.convert(text, inner, strict=False)
    except msgspec.ValidationError:
        return text  # refused by the reader, which names the variable


def _check_lost_node(config: Config, faults: Faults) -> None:
    lost_s, stale_s = config.ledger.lost_node_s, config.auth.stale_grant_s
    if lost_s < 2 * stale_s:
        complaint = f"{lost_s:g} is less than twice auth.stale_grant_s ({stale_s:g}), for so long a machine that is cut"
        faults.add(("ledger", "lost_node_s"), f"{complaint} off spends what it has leased; raise it or lower that")


def _check_names_differ(block: str, items: Any, faults: Faults) -> None:
    names: dict[str, int] = {}
    for index, item in enumerate(items if isinstance(items, list) else ()):
        name = item.get("name") if isinstance(item, dict) else None
        if isinstance(name, str) and names.setdefault(name, index) != index:
            place = (block, index, "name")
            faults.add(place, f"{checks.show(name)} is the name of {block}[{names[name]}]; rename one")

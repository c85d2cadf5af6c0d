"""The configuration: Structs that are the defaults, and the strict way from TOML to them."""

from typing import Annotated

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
PositiveSeconds = Annotated[float, Meta(gt=0)]


class Server(Struct, forbid_unknown_fields=True, frozen=True):
    """Where the gateway listens and how it runs."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    workers: Annotated[int, Meta(ge=1, le=256)] = 2
    data_dir: str = "./gpuproxy-data"
    drain_s: PositiveSeconds = 30.0
    trusted_proxies: tuple[str, ...] = ()


class Limits(Struct, forbid_unknown_fields=True, frozen=True):
    """Bounds on what a client may send and hold."""

    head_bytes_max: Positive = 65_536
    header_count_max: Positive = 128
    body_bytes_max: Positive = 67_108_864
    buffered_body_bytes_max: Positive = 16_777_216
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

    url: str = "sqlite:///./gpuproxy.db"


class Auth(Struct, forbid_unknown_fields=True, frozen=True):
    """How long workers trust what control told them about a key."""

    grant_ttl_s: PositiveSeconds = 60.0
    unknown_key_ttl_s: PositiveSeconds = 5.0
    stale_grant_s: PositiveSeconds = 3_600.0
    authorize_timeout_s: PositiveSeconds = 2.0


class Journal(Struct, forbid_unknown_fields=True, frozen=True):
    """The receipts on their way from workers to the store."""

    bytes_max: Positive = 1_073_741_824
    segment_bytes: Positive = 67_108_864
    sync_s: PositiveSeconds = 0.005
    ingest_s: PositiveSeconds = 0.1


class Egress(Struct, forbid_unknown_fields=True, frozen=True):
    """What user-given targets may reach beyond public addresses.

    ``allow`` lists networks (CIDR). ``connect_to`` maps "host:port" to "host:port" as curl's option of that
    name does: the name stays in Host, SNI and certificate check, only the address dialled changes.
    """

    allow: tuple[str, ...] = ()
    connect_to: dict[str, str] = {}
    ca_file: str = ""


class Log(Struct, forbid_unknown_fields=True, frozen=True):
    """Log lines on standard error. LOG_LEVEL and LOG_FORMAT override."""

    level: str = "info"
    format: str = "text"


class Plugins(Struct, forbid_unknown_fields=True, frozen=True):
    """Which entry points of the group ``gpuproxy.plugins`` are switched on."""

    enabled: tuple[str, ...] = ("https", "mcp", "openinference")


class Upstream(Struct, forbid_unknown_fields=True, frozen=True):
    """A configured destination; its address is trusted and passes no guard.

    ``api_key_env`` names an environment variable whose value is sent as Bearer. ``verify_tls`` and ``ca_file``
    concern https URLs. A ``urls`` list of several is used in turn.
    """

    name: str
    protocol: str
    urls: tuple[str, ...]
    models: tuple[str, ...] = ()
    api_key_env: str = ""
    headers: dict[str, str] = {}
    preserve_host: bool = False
    verify_tls: bool = True
    ca_file: str = ""
    first_byte_s: PositiveSeconds | None = None
    idle_s: PositiveSeconds | None = None


class Config(Struct, forbid_unknown_fields=True, frozen=True):
    """The whole of config.toml."""

    server: Server = Server()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    store: Store = Store()
    auth: Auth = Auth()
    journal: Journal = Journal()
    egress: Egress = Egress()
    log: Log = Log()
    plugins: Plugins = Plugins()
    upstreams: tuple[Upstream, ...] = ()

"""The configuration: what is accepted, and that every fault is named with its place."""

import contextlib
import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from gpuproxy.config import Config, build, load, warnings
from gpuproxy.config.toml_lines import key_lines
from gpuproxy.errors import ConfigError

ROOT = Path(__file__).parent.parent
SAMPLE = """
[server]
host = "127.0.0.1"
port = 8080
workers = 2
[store]
url = "sqlite:///./gpuproxy.db"
[[upstreams]]
name = "llm"
protocol = "openinference"
urls = ["http://127.0.0.1:19999"]
models = ["mock-model"]
api_key_env = "LLM_KEY"      # optional: sent upstream as Bearer
[[upstreams]]
name = "tools"
protocol = "mcp"
urls = ["http://127.0.0.1:3301/mcp"]
"""
LLM = '[[upstreams]]\nname = "llm"\nprotocol = "openinference"\n'


def write(directory: Path, text: str) -> Path:
    path = directory / "config.toml"
    path.write_text(text)
    return path


def faults(directory: Path, text: str, environment: dict[str, str] | None = None) -> list[str]:
    """Return the faults of a configuration, with the directory taken off."""
    with pytest.raises(ConfigError) as raised:
        load(write(directory, text), environment or {})
    return [fault.removeprefix(f"{directory}/") for fault in raised.value.faults]


def test_the_shipped_file_equals_the_defaults() -> None:
    assert load(ROOT / "config.toml", {}) == Config() == load(None, {})


def commented(introduction: str) -> str:
    """Return the example that follows in the shipped file, as if it were no comment."""
    _, _, rest = (ROOT / "config.toml").read_text().partition(introduction)
    return re.sub("^# ?", "", rest.partition("\n\n")[0], flags=re.MULTILINE)


def test_the_commented_prices_of_the_shipped_file_are_valid(tmp_path: Path) -> None:
    (price,) = load(write(tmp_path, commented("Repeat the block\n# for each model.\n#\n")), {}).prices
    assert (price.model, price.input_usd_per_million, price.per_second_usd) == ("my-model", "0.15", "")


def test_the_commented_provider_of_the_shipped_file_is_valid(tmp_path: Path) -> None:
    config = load(write(tmp_path, commented("rent GPUs at. Repeat the block for each one.\n#\n")), {})
    assert [provider.name for provider in config.providers] == ["vast.ai"]
    (said,) = warnings(config, {})
    assert said.startswith("providers[0].api_key_env: VAST_API_KEY is not set")
    assert warnings(config, {"VAST_API_KEY": "x"}) == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('name = "vast.ai"', '"vast.ai" is the name of providers[0]; rename one'),
        ('name = "x"\napi_key_env = "sk-12345"', "is no variable name"),
        ('name = "x"\nbase_url = "ftp://host"', "is neither http nor https"),
        ('name = "x"\nspacing_s = -1', "does not fit: expected float >= 0"),
        ('name = "x"\noptions = { seed = 1 }', "options.seed: expected a string"),
    ],
)
def test_a_wrong_provider_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    (fault,) = faults(tmp_path, f'[[providers]]\nname = "vast.ai"\n[[providers]]\n{line}')
    assert complaint in fault


def test_the_commented_payment_of_the_shipped_file_is_valid(tmp_path: Path) -> None:
    config = load(write(tmp_path, commented("enabled above. Repeat the block for each one.\n#\n")), {})
    assert [payment.name for payment in config.payments] == ["stripe"]
    said = warnings(config, {"STRIPE_WEBHOOK_SECRET": "x"})
    assert said == ["payments[0].api_key_env: STRIPE_API_KEY is not set, so the gateway will not start; export it"]


@pytest.mark.parametrize("text", ["-1", "1e3", "0.1234567891", "1000000", " 1", "$1", "nan", "1_000", ".5", "\u0661"])
def test_what_is_no_price_is_refused(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, f'[[prices]]\nmodel = "m"\nper_request_usd = "{text}"')
    assert fault.startswith("config.toml:3: prices[0].per_request_usd: ")
    assert "is no price; write dollars" in fault


def test_a_price_as_a_number_is_refused(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, '[[prices]]\nmodel = "m"\nper_request_usd = 0.1')
    assert (
        fault == 'config.toml:3: prices[0].per_request_usd: 0.1 does not fit: expected str; write it in quotes, "0.1"'
    )


def test_a_model_has_one_price_at_an_upstream(tmp_path: Path) -> None:
    price = '[[prices]]\nmodel = "m"\n'
    (fault,) = faults(tmp_path, price + price)
    assert fault == 'config.toml:4: prices[1].model: "m" has its price in prices[0]; keep one'
    assert len(load(write(tmp_path, price + price + 'upstream = "llm"'), {}).prices) == 2


def test_the_commented_upstreams_of_the_shipped_file_are_valid(tmp_path: Path) -> None:
    config = load(write(tmp_path, commented("Repeat the block for each one.\n#\n")), {})
    assert [upstream.name for upstream in config.upstreams] == ["llm", "tools"]
    assert config.upstreams[0].headers == {"X-Team": "research"}


def test_the_sample_is_accepted_as_written(tmp_path: Path) -> None:
    config = load(write(tmp_path, SAMPLE), {})
    assert config.server.workers == 2
    assert config.upstreams[0].models == ("mock-model",)
    assert config.upstreams[1].urls == ("http://127.0.0.1:3301/mcp",)


def test_a_config_survives_the_way_to_a_child_process(tmp_path: Path) -> None:
    config = load(write(tmp_path, SAMPLE), {})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config


def test_two_upstreams_may_share_a_model(tmp_path: Path) -> None:
    other = SAMPLE.replace('"tools"', '"llm-2"').replace('/mcp"]', '"]\nmodels = ["mock-model"]')
    assert len(load(write(tmp_path, other), {}).upstreams) == 2


def test_all_faults_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = '[server]\nprot = 1\nport = 70000\nworkers = "2"\n[timeouts]\nidle_s = inf\n' + LLM + "urls = []\n"
    assert faults(tmp_path, text) == [
        'config.toml:2: server.prot: unknown key "prot"; did you mean "port"?',
        "config.toml:3: server.port: 70000 does not fit: expected int <= 65535",
        'config.toml:4: server.workers: "2" does not fit: expected int',
        "config.toml:6: timeouts.idle_s: Infinity does not fit: expected float <= 31536000.0",
        "config.toml:10: upstreams[0].urls: is empty; write at least one of http://HOST[:PORT][/PATH]",
    ]


def test_credit_of_a_lost_machine_is_not_free_while_it_may_be_spent(tmp_path: Path) -> None:
    text = "[auth]\nstale_grant_s = 300.0\n[ledger]\nlost_node_s = {}\n"
    assert faults(tmp_path, text.format(599.0)) == [
        "config.toml:4: ledger.lost_node_s: 599 is less than twice auth.stale_grant_s (300), for so long a machine "
        "that is cut off spends what it has leased; raise it or lower that"
    ]
    path = tmp_path / "config.toml"
    path.write_text(text.format(600.0))
    assert load(path, {}).ledger.lost_node_s == 600


def test_a_fault_in_a_list_over_several_lines_names_the_line_of_the_item(tmp_path: Path) -> None:
    text = SAMPLE + '[[upstreams]]\nname = "x"\nprotocol = "mcp"\nurls = [\n  "http://a",\n  "http:///x",\n]\n'
    assert faults(tmp_path, text) == [
        'config.toml:23: upstreams[2].urls[1]: "http:///x" has no host; write http://HOST[:PORT][/PATH]'
    ]


def test_two_upstreams_of_one_name_are_refused_even_beside_other_faults(tmp_path: Path) -> None:
    first, second = faults(tmp_path, LLM + 'urls = ["http://a"]\n' + LLM + "urls = [1]\n")
    assert first == 'config.toml:6: upstreams[1].name: "llm" is the name of upstreams[0]; rename one'
    assert second == 'config.toml:8: upstreams[1].urls[0]: 1 does not fit: expected str; write it in quotes, "1"'


def test_a_missing_field_is_told_at_the_head_of_its_table(tmp_path: Path) -> None:
    assert faults(tmp_path, '\n[[upstreams]]\nname = "a"\nprotocol = "mcp"\n') == [
        'config.toml:2: upstreams[0]: "urls" is missing'
    ]


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "is not a URL"),
        ("http:///x", "has no host"),
        ("http://:80/x", "has no host"),
        ("ftp://host", "is neither http nor https"),
        ("host:8000", "is neither http nor https"),
        ("http://user@host", "carries a user name"),
        ("http://host:99999", "Port out of range"),
        ("http://host:0", "has no usable port"),
        ("http://host:x", "Port could not be cast"),
        ("http://[::1", "Invalid IPv6"),
        ("http://host/?a=1", "has a query or fragment"),
        ("http://host/#a", "has a query or fragment"),
        ("http://hé", "is not a URL in printable ASCII"),
        ("http://a b", "is not a URL in printable ASCII"),
    ],
)
def test_a_url_that_is_no_base_is_refused(tmp_path: Path, url: str, complaint: str) -> None:
    (fault,) = faults(tmp_path, f'{LLM}urls = ["{url}"]\n')
    assert fault.startswith("config.toml:4: upstreams[0].urls[0]: ")
    assert complaint in fault


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('[store]\nurl = "mysql://h/x"', 'unknown scheme "mysql"; write sqlite:///./FILE'),
        ('[store]\nurl = "sqlite://"', "names no file"),
        ('[store]\nurl = "postgresql://u:p@h:high/n"', "has no usable host or port"),
        ('[store]\nurl = "postgresql://h/n?sslmode=disable&pool=3"', 'the parameter "pool"; only sslmode'),
        ("[log]\nlevel = 20", 'expected str; write it in quotes, "20"'),
        ('[redis]\nurl = "memcached://h"', 'unknown scheme "memcached"; write redis://'),
        ('[redis]\nurl = "redis://h:x"', "has no usable host or port; write redis://"),
        ('[redis]\nurl = "redis://"', "has no usable host or port; write redis://"),
        ("[server]\nport = true", "true does not fit: expected int"),
        ("[server]\ndrain_s = 0", "0 does not fit: expected float > 0"),
        ("[limits]\nhead_bytes_max = 99999999999999999999", "does not fit: expected int <="),
        ('[server]\nhost = ""', "is empty"),
        ('[server]\ntrusted_proxies = ["10.0.0.1/8"]', "host bits set"),
        ('[egress]\nallow = ["x"]', '"x" is no network'),
        ('[egress]\nca_file = "/no/such"', '"/no/such" cannot be read: No such file'),
        ('[egress]\nconnect_to = { "a:1" = "b" }', '"b" is not HOST:PORT'),
        ('[egress]\nconnect_to = { "a:1" = 2 }', "expected a string"),
        ('[log]\nlevel = "loud"', '"loud" is unknown; known: debug, info, warning, error, critical'),
        ('[log]\nformat = "xml"', '"xml" is unknown; known: text, json'),
        ('[plugins]\nenabled = [""]', "is empty"),
        ("[timeouts]\nidle_s = nan", "NaN does not fit: expected float > 0"),
        ('[server]\npublic_url = "gw.example.com"', "is neither http nor https"),
        (
            '[mcp]\nallowed_origins = ["https://a.example/"]',
            "is no origin; write https://HOST[:PORT] without",
        ),
        ('[mcp]\nallowed_origins = ["a.example"]', "is no origin"),
        ('[mcp]\nauthorization_servers = ["x"]', "is neither http nor https"),
        ("[server]\nport = 1979-05-27", '"1979-05-27" does not fit'),
    ],
)
def test_a_value_out_of_its_range_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    (fault,) = faults(tmp_path, line)
    assert fault.startswith("config.toml:2: ")
    assert complaint in fault


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('name = "LLM"', "is no name"),
        ('protocol = ""', "is empty"),
        ('models = [""]', "is empty"),
        ('api_key_env = "sk-12345"', "is no variable name"),
        ('ca_file = "/no/such"', "cannot be read"),
        ('headers = { "a b" = "x" }', "is no header name"),
        ('headers = { a = "x\\ny" }', "outside printable ASCII"),
        ('headers = { Host = "x" }', "is written by the gateway"),
        ('headers = { content-length = "3" }', "is written by the gateway"),
    ],
)
def test_an_upstream_with_a_wrong_field_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    given = {"name": 'name = "llm"', "protocol": 'protocol = "mcp"', "urls": 'urls = ["http://a"]'}
    given[line.partition(" ")[0]] = line
    (fault,) = faults(tmp_path, "[[upstreams]]\n" + "\n".join(given.values()))
    assert complaint in fault


@pytest.mark.parametrize(
    "text",
    [
        f'{LLM}urls = ["http://bob:hunter2@host"]',
        f'{LLM}urls = ["http://a"]\nheaders = {{ "X Key" = "hunter2" }}',
        f'{LLM}urls = ["http://a"]\nheaders = "hunter2"',
        f'{LLM}urls = ["http://a"]\napi_key_env = "hunter2-key"',
        '[store]\nurl = "mysql://bob:hunter2@host/x"',
        '[redis]\nurl = "redis://:hunter2@host:port"',
        '[store]\nurl = ["hunter2"]',
    ],
)
def test_a_fault_never_shows_a_credential(tmp_path: Path, text: str) -> None:
    assert "hunter2" not in "\n".join(faults(tmp_path, text))


def test_a_syntax_fault_names_line_and_column(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, "[server]\nport = = 3\n")
    assert fault.startswith("config.toml:2: column 8: ")


@pytest.mark.parametrize("text", ["a = [", "a = " + "[" * 9000, "a = " + "1" * 5000])
def test_what_is_no_toml_is_one_fault(tmp_path: Path, text: str) -> None:
    assert len(faults(tmp_path, text)) == 1


def test_a_file_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.toml: No such file.*-c or GPUPROXY_CONFIG"):
        load(tmp_path / "nope.toml", {})


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"[server]\n\xff")
    with pytest.raises(ConfigError, match="byte 9 is not UTF-8"):
        load(tmp_path / "config.toml", {})


def test_variables_override_the_file(tmp_path: Path) -> None:
    environment = {
        "GPUPROXY_SERVER__PORT": "9000",
        "GPUPROXY_SERVER__TRUSTED_PROXIES": "10.0.0.0/8, ::1",
        "GPUPROXY_EGRESS__CONNECT_TO": "a.example:443=127.0.0.1:1",
        "GPUPROXY_TIMEOUTS__HEAD_S": "0.5",
        "GPUPROXY_CONFIG": "/elsewhere",
        "GPUPROXY_API_KEY": "not a setting",
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": "json",
        "HOME": "/",
    }
    config = load(write(tmp_path, "[server]\nport = 99999\n"), environment)
    assert (config.server.port, config.server.trusted_proxies) == (9000, ("10.0.0.0/8", "::1"))
    assert config.egress.connect_to == {"a.example:443": "127.0.0.1:1"}
    assert config.timeouts.head_s == 0.5
    assert (config.log.level, config.log.format) == ("debug", "json")


def test_the_gateways_own_variable_beats_the_conventional_one() -> None:
    assert load(None, {"LOG_LEVEL": "debug", "GPUPROXY_LOG__LEVEL": "error"}).log.level == "error"


@pytest.mark.parametrize(
    ("variable", "value", "fault"),
    [
        ("GPUPROXY_SERVER__PORT", "x", 'GPUPROXY_SERVER__PORT: server.port: "x" does not fit: expected int'),
        ("GPUPROXY_SERVER__PROT", "1", 'GPUPROXY_SERVER__PROT: unknown key "prot"; did you mean "port"?'),
        (
            "GPUPROXY_SERVR__PORT",
            "1",
            'GPUPROXY_SERVR__PORT: unknown section "servr"; did you mean "server"?',
        ),
        ("GPUPROXY_SERVER_PORT", "1", "GPUPROXY_SERVER_PORT: sets nothing; write GPUPROXY_SERVER__PORT"),
        ("GPUPROXY_UPSTREAMS__0", "1", 'GPUPROXY_UPSTREAMS__0: unknown section "upstreams"'),
        ("LOG_FORMAT", "xml", 'LOG_FORMAT: log.format: "xml" is unknown'),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, variable: str, value: str, fault: str) -> None:
    (told,) = faults(tmp_path, "", {variable: value})
    assert told.startswith(fault)


def test_what_is_probably_not_meant_is_a_warning(tmp_path: Path) -> None:
    config = load(write(tmp_path, SAMPLE + "verify_tls = false\n"), {})
    assert [line.partition(":")[0] for line in warnings(config, {})] == [
        "upstreams[0].api_key_env",
        "upstreams[1].verify_tls",
    ]
    assert len(warnings(config, {"LLM_KEY": "x"})) == 1


def test_every_kind_of_key_is_found_on_its_line() -> None:
    tables = 'a = """\n[not.a.table]\n"""\n[b.c]\n"d e".f = 1\n[[g]]\nh = { i = 2 }\n[[g]]\n'
    lines = key_lines(tables + '[g.j]\nk = [\n"x",\n"y"]\n')
    assert lines["a",] == 1
    assert lines["b", "c"] == 4
    assert lines["b", "c", "d e", "f"] == 5
    assert lines["g", 0, "h", "i"] == 7
    assert lines["g", 1] == 8
    assert lines["g", 1, "j", "k", 1] == 12


SCALARS: Any = (
    some.booleans()
    | some.integers()
    | some.floats()
    | some.text(max_size=20)
    | some.datetimes()
    | some.times()
    | some.just(datetime.date(2026, 7, 28))
)
VALUES = some.recursive(
    SCALARS,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
)
KEYS = some.sampled_from(sorted(Config.__struct_fields__)) | some.text(max_size=8)
SUBKEYS = some.sampled_from(["name", "protocol", "urls", "headers", "port", "url", "allow", "connect_to"])
TABLES = some.dictionaries(SUBKEYS, VALUES, max_size=4)


@given(some.dictionaries(KEYS, VALUES | TABLES | some.lists(TABLES, max_size=3), max_size=5))
def test_no_junk_raises_anything_but_a_config_error(tree: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(build(tree), Config)


@given(some.text(max_size=60))
def test_whatever_toml_accepts_has_lines(text: str) -> None:
    try:
        tomllib.loads(text)
    except ValueError:
        return
    assert all(1 <= line <= text.count("\n") + 1 for line in key_lines(text).values())


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ({"per_request_usd": "1"}, "write one of the two"),
        ({"model": "m", "tool": "t"}, "write one of the two"),
        ({"tool": "t", "output_usd_per_million": "1"}, "have no tokens"),
    ],
    ids=["neither", "both", "tokens"],
)
def test_a_price_is_of_a_model_or_of_a_tool(block: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build({"prices": [block]})


def test_tools_of_one_name_may_differ_in_price_by_server() -> None:
    one, other = ({"tool": "t", "upstream": name, "per_request_usd": "1"} for name in ("a", "b"))
    assert len(build({"prices": [one, other]}).prices) == 2


@pytest.mark.parametrize(
    ("group", "complaint"),
    [
        ({"name": "all", "servers": []}, "name 1 to 16 upstreams, each once"),
        ({"name": "all", "servers": ["a", "a"]}, "name 1 to 16 upstreams, each once"),
        ({"name": "all", "servers": [f"s{n}" for n in range(17)]}, "name 1 to 16 upstreams, each once"),
        ({"name": "all", "servers": ["a__b"]}, "has __ in it"),
        ({"name": "all", "servers": ["llm"]}, "speaks openinference"),
        ({"name": "all", "servers": ["a", "all"]}, '"all" is a group'),
        ({"name": "a", "servers": ["a"]}, "is the name of an upstream"),
        ({"name": "all", "servers": ["a"], "timeout_s": 0}, "timeout_s"),
    ],
    ids=["none", "twice", "many", "mark", "protocol", "itself", "name", "timeout"],
)
def test_a_group_of_servers_must_be_one(group: dict[str, Any], complaint: str) -> None:
    names = {"a": "mcp", "llm": "openinference"}
    upstreams = [{"name": name, "protocol": protocol, "urls": ["http://x"]} for name, protocol in names.items()]
    with pytest.raises(ConfigError, match=complaint):
        build({"upstreams": upstreams, "mcp_groups": [group]})


def test_a_server_that_is_set_while_running_may_be_in_a_group() -> None:
    config = build({"mcp_groups": [{"name": "all", "servers": ["later"]}]})
    assert "no upstream 'later' here" in warnings(config, {})[0]


@pytest.mark.parametrize(
    "url",
    ["postgresql://u:p/w#x?y@h/n?sslmode=require", "postgresql://[::1]:5432/n", "postgresql:///n", "postgresql://h/n"],
)
def test_a_postgresql_url_may_have_any_password_and_no_host(url: str) -> None:
    assert build({"store": {"url": url}}).store.url == url


def test_a_secret_that_is_not_set_is_told_before_it_stops_a_start() -> None:
    config = build({"auth": {"jwt_secret_env": "GP_SECRET"}})
    assert "auth.jwt_secret_env: GP_SECRET is not set" in warnings(config, {})[0]
    assert warnings(config, {"GP_SECRET": "x"}) == []

"""``[routing]``: how an endpoint is chosen, when it is left alone, when a call is sent again."""

from typing import Annotated

from msgspec import Meta, Struct

from gpuproxy.config import checks
from gpuproxy.config.kinds import PositiveSeconds

STRATEGIES = ("round_robin", "least_connections", "power_of_two", "cheapest", "affinity")
RETRIABLE = ("429", "502", "503", "504", "lost", "first_byte")

Strategy = Annotated[str, Meta(extra={"check": checks.one_of(STRATEGIES)})]
Reason = Annotated[str, Meta(extra={"check": checks.one_of(RETRIABLE)})]
FieldName = Annotated[str, Meta(extra={"check": checks.field_name})]
Attempts = Annotated[int, Meta(ge=1, le=16)]
QueueLength = Annotated[int, Meta(ge=0, le=100_000)]
Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]


class Routing(Struct, forbid_unknown_fields=True, frozen=True):
    """What holds for every model that says nothing else, and for every endpoint."""

    strategy: Strategy = "round_robin"
    affinity_header: FieldName = "X-Session-Id"
    retry_on: tuple[Reason, ...] = RETRIABLE
    attempts_max: Attempts = 3
    retry_budget_percent: Annotated[int, Meta(ge=0, le=100)] = 20
    queue_max: QueueLength = 1_000
    queue_s: PositiveSeconds = 10.0
    failures_max: Annotated[int, Meta(ge=1, le=1_000)] = 5
    slow_first_byte_s: Seconds = 0.0
    open_s: PositiveSeconds = 5.0
    open_max_s: PositiveSeconds = 60.0
    slow_start_s: Seconds = 10.0
    probe_s: Annotated[float, Meta(ge=1, le=3_600)] = 5.0

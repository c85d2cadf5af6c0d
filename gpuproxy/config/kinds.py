"""The types of single values: what msgspec can check, and where it cannot, the check that follows."""

from typing import Annotated

from msgspec import Meta

from gpuproxy.config import checks

Positive = Annotated[int, Meta(ge=1, le=1 << 48)]
PositiveSeconds = Annotated[float, Meta(gt=0, le=31_536_000)]  # a year; timers overflow far above
Text = Annotated[str, Meta(extra={"check": checks.text})]
OptionalText = Annotated[str, Meta(extra={"check": checks.optional_text})]
Name = Annotated[str, Meta(extra={"check": checks.upstream_name})]
VariableName = Annotated[str, Meta(extra={"check": checks.variable_name, "secret": True})]
ReadableFile = Annotated[str, Meta(extra={"check": checks.readable_file})]
Usd = Annotated[str, Meta(extra={"check": checks.usd})]

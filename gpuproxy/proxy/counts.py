"""What a plugin's reader says was used, as far as it can be true: what its author got wrong must harm no other call.

A count beyond 64 bits could not be written to the journal, and a fraction not be read from it, with all that other
calls of the worker have written there; nor could a lease be asked for by such numbers.
"""

from collections.abc import Callable

from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import UsageReader
from gpuproxy.types import Usage

COUNT_MAX = (1 << 48) - 1  # all bits set: counts combined by `|` are within it if each is. Their sums fit 64 bits
NO_USAGE = Usage(-1, -1, -1, "none")

_log = get_logger("gpuproxy.plugin")


class Known:
    """Stands in for a reader whose result is known already."""

    def __init__(self, usage: Usage | None, rpc_outcome: str, response_model: str = "") -> None:
        self._usage = usage
        self.rpc_outcome = rpc_outcome
        self.response_model = response_model

    def feed(self, data: bytes) -> None:
        """Nothing more comes."""

    def finish(self) -> Usage | None:
        """Return the usage."""
        return self._usage


def used_in_all(reader: UsageReader, protocol: str) -> Usage:
    """Return what an answer that is over has used; nothing is known if the reader fails or tells what cannot be."""
    try:
        return _checked(reader.finish() or NO_USAGE)
    except Exception:  # whatever a plugin raises: there is a receipt all the same
        _log.exception("plugin cannot tell what a call has used, nothing is counted", protocol=protocol)
        return NO_USAGE


def used_by_now(reader: UsageReader | None) -> Usage | None:
    """Return what has been delivered by now, None if the reader cannot tell; of one that fails `used_in_all` tells."""
    so_far: Callable[[], Usage] | None = getattr(reader, "so_far", None)
    try:
        return None if so_far is None else _checked(so_far())
    except Exception:
        return NO_USAGE


def _checked(usage: Usage) -> Usage:
    """Return it. Raises TypeError and ValueError for what are no counts. About 50 ns."""
    counts = usage.input_tokens | usage.cached_tokens | usage.output_tokens
    if type(counts) is int and (0 <= counts <= COUNT_MAX or (counts == -1 and _are_counts(usage))):
        return usage
    raise ValueError(f"{usage} has counts that are not whole numbers from -1 to {COUNT_MAX}")


def _are_counts(usage: Usage) -> bool:
    """Tell it of each: combined with one that is not known, -1, all are -1."""
    return all(-1 <= count <= COUNT_MAX for count in (usage.input_tokens, usage.cached_tokens, usage.output_tokens))

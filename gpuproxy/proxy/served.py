"""The models of an upstream, as calls mean them that name the upstream and so use its own names for models.

What a model costs, and which keys may use it, goes by the name it has here.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuproxy.proxy.destination import Destination


class Served:
    """`models` are the names here of all that an upstream serves."""

    __slots__ = ("_names", "models")

    def __init__(self) -> None:
        self.models: dict[str, None] = {}  # in order
        self._names: dict[str, str] = {}

    def add(self, model: str, *others: str) -> None:
        """Take in a model, and other names of it; of models that share one there the first counts."""
        self.models[model] = None
        for name in others:
            self._names.setdefault(name, model)

    def name_of(self, model: str) -> str:
        """Return the name here of what a call to the upstream names."""
        return model if model in self.models else self._names.get(model, model)

    @property
    def sole(self) -> str:
        """Return the model that a call means which names none, empty if there are several."""
        return next(iter(self.models)) if len(self.models) == 1 else ""


NOTHING = Served()


def served_by_upstreams(models: "Mapping[str, Destination]") -> dict[str, Served]:
    """Return what each upstream serves, of models by every name of theirs."""
    found: dict[str, Served] = {}
    for name, destination in models.items():
        for endpoint in destination.endpoints:
            found.setdefault(endpoint.upstream, Served()).add(destination.model, name, endpoint.model)
    return found

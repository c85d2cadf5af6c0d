"""What adapters for marketplaces share: calls in their turn, failures raised, sense made of answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from gpuproxy.plugin import InvalidAnswer, Offer, Phase, ProviderError, ProviderSettings, RateLimited, Unauthorized
from gpuproxy_plugins.provider_http import Answer, ProviderHttp, Spacing


class ProviderAccount(ProviderHttp):
    """An account at one provider.

    ``spacing_s`` are the least seconds between two calls of a kind, if the settings say nothing else. ``failure`` tells
    what an answer to a path stands for if it is none of success, else None. All paths are below ``root``.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        headers: dict[str, str],
        settings: ProviderSettings,
        spacing_s: Mapping[str, float],
        failure: Callable[[Answer, str], ProviderError | None],
        root: str = "",
    ) -> None:
        if settings.options:
            raise ValueError(f"options: {name} knows none; take out {', '.join(sorted(settings.options))}")
        super().__init__(name, settings.base_url or base_url, headers if settings.api_key else {}, settings)
        spaced_s = settings.spacing_s
        self._spacing = Spacing(spacing_s if spaced_s is None else dict.fromkeys(spacing_s, spaced_s))
        self._failure = failure
        self._root = root
        self._has_key = bool(settings.api_key)

    async def ask(
        self,
        kind: str,
        phase: Phase,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: object = None,
    ) -> Answer:
        """Make one call in its turn; raise what an unsuccessful answer stands for."""
        await self.wait_turn(self._spacing, kind, phase)
        answer = await self.call(phase, method, self._root + path, query=query, body=body)
        error = self._failure(answer, path)
        if error is None:
            return answer
        if isinstance(error, RateLimited):
            self._spacing.hold(kind, error.retry_after_s or 0.0)
        raise error

    def need_key(self, phase: Phase) -> None:
        """Raise Unauthorized if there is no credential."""
        if not self._has_key:
            message = "there is no credential; name its variable in api_key_env and export it"
            raise Unauthorized(self.name, phase, message)

    def offers(
        self, rows: Sequence[msgspec.Raw], read: Callable[[msgspec.Raw], Offer | ValueError | None]
    ) -> list[Offer]:
        """Return the offers among the rows. Raises InvalidAnswer if no row makes sense."""
        found = [read(row) for row in rows]
        if rows and all(isinstance(each, ValueError) for each in found):
            message = f"no row makes sense ({self.shown(str(found[0]))}); try later"
            raise InvalidAnswer(self.name, "search", message)
        return [each for each in found if isinstance(each, Offer)]

    @contextmanager
    def meaning(self, phase: Phase, what: str) -> Iterator[None]:
        """Raise InvalidAnswer if what is read inside makes no sense."""
        try:
            yield
        except (ValueError, ArithmeticError) as error:
            message = f"{what} makes no sense ({self.shown(str(error))}); look at it in {self.name}'s console"
            raise InvalidAnswer(self.name, phase, message) from error

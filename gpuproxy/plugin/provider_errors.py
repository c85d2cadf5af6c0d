"""The ways a call to a provider fails; what a provider says is mapped to these once, in its adapter."""

from gpuproxy.plugin.provider import Phase


class ProviderError(Exception):
    """A call to a provider that failed. The message names the provider and the remedy, and shows no credential.

    ``is_retryable``: the same call may succeed later unchanged. ``may_have_worked``: the provider may have done what
    was asked; look before asking again. ``instance_id`` is set when the failed call left an instance behind, which
    must be destroyed.
    """

    is_retryable = False

    def __init__(
        self,
        provider: str,
        phase: Phase,
        message: str,
        *,
        may_have_worked: bool = False,
        retry_after_s: float | None = None,
        instance_id: str = "",
    ) -> None:
        super().__init__(f"{provider}: {message}")
        self.provider = provider
        self.phase = phase
        self.may_have_worked = may_have_worked
        self.retry_after_s = retry_after_s
        self.instance_id = instance_id


class Unauthorized(ProviderError):
    """The credential is missing, wrong, or may not do this."""


class RateLimited(ProviderError):
    """Too many calls; ``retry_after_s`` says when to come back, a daily quota included."""

    is_retryable = True


class CapacityGone(ProviderError):
    """The offer is taken, has become too dear, or the bid was too low; try the next one."""


class InsufficientFunds(ProviderError):
    """Our account at the provider is out of money."""


class SpecRefused(ProviderError):
    """The provider, or the adapter before asking it, does not accept what was to be rented."""


class InstanceGone(ProviderError):
    """The instance to start, stop or read the log of does not exist any more."""


class NotSupported(ProviderError):
    """The provider has no such operation."""


class ProviderUnavailable(ProviderError):
    """No connection, no answer in time, or a failure of the provider's own."""

    is_retryable = True


class InvalidAnswer(ProviderError):
    """The provider answered something that cannot be understood; the message says what."""

    is_retryable = True

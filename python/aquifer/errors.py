"""What can go wrong, as seen by the engine."""


class AquiferError(Exception):
    """Every error of this package."""


class AgentUnavailable(AquiferError):
    """No agent listens on the socket, or it may not be used."""


class SessionLost(AquiferError):
    """The connection ended. The package reconnects by itself; callers do not see this."""


class RequestRefused(AquiferError):
    """The agent said no.

    ``code`` is for programs (``"bad-request"``), the message for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code


class HydrationError(AquiferError):
    """The weights cannot be had; the message says why."""


class HydrationTimeout(HydrationError, TimeoutError):
    """The weights were not there in the time given."""


class Paused(AquiferError):
    """An update is being applied. Raised where the engine was made with ``while_paused="refuse"``."""

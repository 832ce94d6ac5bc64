"""Every error that luna-mp raises: each class is something that the caller can act on.

An error that happened in a service crosses the wire as data (class name, text, traceback) and is
raised again in the client by `revive`, with the service's traceback as its cause.
"""

from __future__ import annotations

__all__ = (
    "BadConfig",
    "BadModel",
    "BootFailed",
    "Broken",
    "LunaError",
    "ModelChanged",
    "OutOfMemory",
    "Rejected",
    "RemoteFailure",
    "RemoteTraceback",
    "TimedOut",
    "Unavailable",
    "Unsendable",
    "WrongKey",
    "WrongVersion",
    "revive",
)


class LunaError(Exception):
    """Root of the tree; catch it to catch everything that luna-mp raises on purpose."""


class BadConfig(LunaError):
    """Raised when a flag, a file or an environment variable holds what cannot be used."""


class BootFailed(LunaError):
    """Raised when a service could not start; the text holds the service's own reason."""


class Unavailable(LunaError):
    """Raised when no service answers at the address: start one, or name another address."""


class Broken(LunaError):
    """Raised when the peer or the connection died in the middle of a call: call again."""


class TimedOut(LunaError):
    """Raised when a deadline passed; the call was given up and its connection closed."""


class Rejected(LunaError):
    """Raised when the request itself is at fault: correct it, the service is well."""


class WrongKey(Rejected):
    """Raised when the two ends do not hold the same authkey."""


class WrongVersion(Rejected):
    """Raised when the two ends speak different versions of the protocol."""


class Unsendable(Rejected):
    """Raised, before anything is sent, for a value that is not data; the text has its path."""


class BadModel(Rejected):
    """Raised for a path that holds no model of the wanted kind, or that may not be loaded."""


class ModelChanged(Rejected):
    """Raised when the service has another model by that name than when it was described."""


class RemoteFailure(LunaError):
    """Raised when the model itself raised; the service's traceback is the cause."""


class OutOfMemory(RemoteFailure):
    """Raised when the call did not fit in the device's memory, not even in tiles."""


class RemoteTraceback(Exception):
    """Holds a service's traceback as text; it is only ever a `__cause__`."""

    def __str__(self) -> str:
        return f"\n\nin the service:\n{self.args[0]}"


_CROSSING = {
    cls.__name__: cls
    for cls in (
        *(Broken, TimedOut, Rejected, Unsendable, BadModel, ModelChanged),
        *(RemoteFailure, OutOfMemory),
    )
}


def revive(kind: str, text: str, traceback: str) -> LunaError:
    """Make the error that a service reported as data; an unknown kind is a `RemoteFailure`."""
    error = _CROSSING.get(kind, RemoteFailure)(text)
    error.__cause__ = RemoteTraceback(traceback)
    return error

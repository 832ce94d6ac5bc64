"""Inputs that several nodes have."""

from comfy_api.latest import io

__all__ = ("address", "mode")


def address(id: str = "daemon_address", what: str = "service") -> io.String.Input:
    """Where a service is."""
    return io.String.Input(
        id,
        default="",
        optional=True,
        tooltip=f"Where the {what} is: empty for this machine's, else a socket's path or "
        "host:port.",
    )


def mode() -> io.Combo.Input:
    """Where a loader loads."""
    return io.Combo.Input(
        "mode",
        options=["auto", "service", "local"],
        default="auto",
        optional=True,
        tooltip="service: the weights stay in the luna-mp service. local: load here, as ComfyUI "
        "does. auto: the service if one runs, else local; the log says which.",
    )

"""Text encoders and VAEs, loaded once for a machine and shared between image workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luna_mp import errors

if TYPE_CHECKING:
    from luna_mp.client import Luna, connect
    from luna_mp.proxies import ClipProxy, VaeProxy
    from luna_mp.serving import Serving, serve

__version__ = "0.1.0"

__all__ = ("ClipProxy", "Luna", "Serving", "VaeProxy", "connect", "errors", "serve")

_HOMES = {
    **dict.fromkeys(("Luna", "connect"), "luna_mp.client"),
    **dict.fromkeys(("ClipProxy", "VaeProxy"), "luna_mp.proxies"),
    **dict.fromkeys(("Serving", "serve"), "luna_mp.serving"),
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # On first use: they import torch, which the command line's help need not wait for.
        if name not in _HOMES:
            raise AttributeError(f"module 'luna_mp' has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        # What a notebook completes.
        return sorted({*globals(), *__all__})

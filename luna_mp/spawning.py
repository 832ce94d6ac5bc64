"""How a Python process of ours is started, so that it finds this very luna_mp."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ("command",)

# Appended, never first: beside a checkout lie other names, such as nodes, that must hide nobody's.
_BOOT = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); module = sys.argv.pop(1); "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of this package, installed or not, as `-m` would."""
    root = str(Path(__file__).resolve().parent.parent)
    return [sys.executable, "-c", _BOOT, root, module, *arguments]

"""luna-mp as a ComfyUI custom node pack. Importing it starts nothing and opens no connection."""

import sys
from pathlib import Path

WEB_DIRECTORY = "./web"

# Appended, never first: `nodes` lies beside this file, and ComfyUI's own must be found before it.
if (_root := str(Path(__file__).resolve().parent)) not in sys.path:
    sys.path.append(_root)


async def comfy_entrypoint():
    """ComfyUI asks for its nodes here; what needs ComfyUI is imported no sooner."""
    from .nodes import LunaExtension

    return LunaExtension()

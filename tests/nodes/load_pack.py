"""Load the pack by ComfyUI's own rule, in a process of its own, and say as JSON what came of it.

The rule, of ComfyUI's `nodes.load_custom_node`: a folder is a module by its `__init__.py`, named by
its path with every dot written as `_x_`; then `comfy_entrypoint` is called, and its nodes listed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch  # noqa: F401  ComfyUI has it before it loads any pack

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).parent / "stubs"
#: what Python tells an audit hook of; also of what has ended before anyone could look
STARTS = (
    *("socket.bind", "socket.connect", "socket.getaddrinfo"),
    *("subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.system"),
)
#: modules that must be ComfyUI's own, and ours, once the pack is loaded
FOUND = ("nodes", "luna_mp")


def load() -> Any:
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


async def nodes(module: Any) -> list[Any]:
    extension = await module.comfy_entrypoint()
    return await extension.get_node_list()


def told(node: Any) -> dict[str, Any]:
    schema = node.define_schema()
    return {
        "id": schema.node_id,
        "name": schema.display_name,
        "category": schema.category,
        "description": schema.description,
        "inputs": [{"id": put.id, "type": put.io_type, **put.options} for put in schema.inputs],
        "outputs": [put.io_type for put in schema.outputs],
    }


def main() -> None:
    # The pack has to put itself there, after what is ComfyUI's.
    sys.path[:] = [str(STUBS), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    before = held()
    started = watched()
    start = time.perf_counter()
    module = load()
    found = asyncio.run(nodes(module))
    seconds = time.perf_counter() - start
    print(  # noqa: T201
        json.dumps(
            {
                "seconds": seconds,
                "held": held() == before,
                "started": started,
                "found": {name: importlib.util.find_spec(name).origin for name in FOUND},
                "web": module.WEB_DIRECTORY,
                "nodes": [told(node) for node in found],
            }
        )
    )


def watched() -> list[str]:
    """What is started or opened from now on."""
    started: list[str] = []
    sys.addaudithook(lambda event, _: started.append(event) if event in STARTS else None)
    start = threading.Thread.start

    # Of threads not every Python tells a hook.
    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    threading.Thread.start = noted
    return started


def held() -> tuple[Any, ...]:
    """What a pack must not start or open."""
    process = psutil.Process()
    # psutil 6 has renamed it
    sockets = getattr(process, "net_connections", None) or process.connections
    return threading.active_count(), len(process.children()), len(sockets("all"))


if __name__ == "__main__":
    main()

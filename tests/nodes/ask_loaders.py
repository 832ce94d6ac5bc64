"""Ask the loaders behind the nodes, in a process with a stand-in for ComfyUI; answer as JSON.

Services are those of this process's runtime directory, which is empty, or fakes: a service and
what it loads are text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from luna_mp import runtime
from luna_mp.errors import LunaError, ModelChanged, Unavailable
from luna_mp.processes import born
from tests.nodes import load_pack

sys.path.insert(0, str(load_pack.STUBS))

from luna_mp.integrations import comfyui_loaders as loaders  # of the stand-in


def modes() -> dict[str, Any]:
    """What each loader gives, by kind, mode and whether there is a service."""
    found = {}
    for mode in loaders.MODES:
        for running in ((), loaders.ROLES):
            with services(*running), logged() as lines:
                where = f"{mode}, {'a service' if running else 'none'}"
                how = (mode, "here" if running else "", lambda: "local")
                found[f"vae, {where}"] = tried(loaders.vae, "v", *how)
                found[f"clip, {where}"] = tried(loaders.clip, ["c"], "flux", *how)
                found[f"log, {where}"] = lines
    return found


def checkpoints() -> dict[str, Any]:
    """Parts of a checkpoint, by the services that run."""
    found = {}
    for running in ((), ("clip",), ("vae",), ("clip", "vae")):
        with services(*running):
            found[" ".join(running)] = loaders.checkpoint("k", "auto", "", "")
    return found


def fingerprints() -> dict[str, bool]:
    """Whether a loader's result is looked for anew after something happened."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "file")
        file.write_text("weights")
        seen = {mode: [loaders.fingerprint([str(file)], mode)] for mode in loaders.MODES}
        found = {"nothing": loaders.fingerprint([str(file)], "auto") != seen["auto"][0]}
        with recorded("vae"):
            for mode, known in seen.items():
                known.append(loaders.fingerprint([str(file)], mode))
                found[f"{mode}, a service started"] = known[0] != known[1]
        os.utime(file, ns=(0, 0))
        for mode, known in seen.items():
            found[f"{mode}, file written"] = loaders.fingerprint([str(file)], mode) != known[0]
        return found


def defaults() -> dict[str, Any]:
    """Which of the default models that were loaded one after the other is used."""
    with services("vae"):
        once = [loaders.shared_vae("a", str) for _ in range(2)]
        other = loaders.shared_vae("b", str)
        changed = loaders.shared_vae("a", unless(once[0]))
        again = tried(loaders.shared_vae, "a", unless(""))
    return {"once": once, "other": other, "changed": changed, "again": again}


def nodes_alone() -> dict[str, Any]:
    """What each node that uses a service's default model says where there is none."""
    image = SimpleNamespace(__getitem__=None)
    given = {"samples": {"samples": None}, "pixels": image, "text": "", "positive": ""}
    given |= {"negative": "", "tile_size": 64, "overlap": 16}
    found = {}
    for name, node in pack().items():
        if name.startswith("LunaShared"):
            names = [put.id for put in node.define_schema().inputs if put.id in given]
            found[name] = tried(node.execute, **{each: given[each] for each in names})
    return found


def nodes_local() -> dict[str, Any]:
    """What the loaders' nodes give where there is no service."""
    found = pack()
    clip = found["LunaDaemonCLIPLoader"].execute
    return {
        "vae": found["LunaDaemonVAELoader"].execute("some.vae").values,
        "checkpoint": found["LunaCheckpointLoader"].execute("k").values,
        "clip": clip("a").values,
        "clip of two": clip("a", "none", "b", type="flux").values,
        "clip of our type": clip("a", type="sdxl").values,
    }


def starts() -> dict[str, Any]:
    """What the start of services asks for, at a second start too."""
    asked: list[dict[str, Any]] = []
    serving = SimpleNamespace(stop=lambda: asked.append({"stopped": True}))
    with patch.object(loaders, "serve", lambda **options: asked.append(options) or serving):
        with recorded("clip"), recorded("vae"):
            loaders.start("cpu", "cpu")
        beside_others = len(asked)
        texts = [loaders.start("", "cpu") for _ in range(2)]
        loaders._stop()
    return {"asked": asked, "text": texts[0], "beside others": beside_others}


def pack() -> dict[str, Any]:
    found = asyncio.run(load_pack.nodes(load_pack.load()))
    return {node.define_schema().node_id: node for node in found}


@contextmanager
def recorded(role: Any) -> Iterator[None]:
    """As if this process were that service, which answers nobody."""
    birth = born(os.getpid())
    record = runtime.Record(role, os.getpid(), birth, "", "127.0.0.1", 1, time.time())
    runtime.write_record(runtime.runtime_dir(), record)
    yield
    runtime.remove_record(runtime.runtime_dir(), role, 1)


@contextmanager
def services(*running: str) -> Iterator[None]:
    """As if those ran; without any, what is there is asked, which is none."""
    count = iter(range(1000))

    def service(role: str, address: str = "", at_once: bool = False) -> str:
        if role not in running:
            raise Unavailable(f"no {role} runs")
        return f"{role} at {address}"

    def load(found: str, paths: Any = (), *rest: Any, **options: Any) -> tuple[str, list[str]]:
        what = " ".join([*paths, *rest]) or f"default {next(count)}"
        return f"{what} in {found}{options or ''}", []

    if not running:
        yield
        return
    with patch.multiple(loaders, service=service, load_vae=load, load_clip=load):
        yield


@contextmanager
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
    loaders.logger.addHandler(handler)
    loaders.logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        loaders.logger.removeHandler(handler)


def tried(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return call(*args, **options)
    except LunaError as exc:
        return f"{type(exc).__name__}: {exc}"


def unless(bad: str) -> Callable[[str], str]:
    """A use of a model that fails with the one named, or with any."""

    def use(model: str) -> str:
        if bad in model:
            raise ModelChanged(f"not {model}")
        return model

    return use


if __name__ == "__main__":
    asked = (modes, checkpoints, fingerprints, defaults, nodes_alone, nodes_local, starts)
    print(json.dumps({ask.__name__: ask() for ask in asked}))  # noqa: T201

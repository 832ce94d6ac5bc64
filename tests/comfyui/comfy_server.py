"""A running ComfyUI with this pack in it, and workflows sent to it as a browser would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers import wait_until

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
RUN_SECONDS = 240.0
KINDS = ("checkpoints", "loras", "vae", "text_encoders", "embeddings")


def lay_out(base: Path) -> None:
    """A directory for `--base-directory`, with this checkout as its custom node."""
    for kind in KINDS:
        (base / "models" / kind).mkdir(parents=True)
    (base / "custom_nodes").mkdir()
    (base / "pages").mkdir()
    (base / "custom_nodes" / "luna-mp").symlink_to(ROOT, target_is_directory=True)
    (base / "custom_nodes" / "probe.py").symlink_to(Path(__file__).parent / "probe_node.py")


@contextmanager
def running(comfyui: str, base: Path, *flags: str) -> Iterator[Server]:
    """ComfyUI's own main.py, until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, f"{comfyui}/main.py", "--port", str(port)]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    # no browser comes, so that there need be no pages for one
    command += ["--front-end-root", str(base / "pages"), "--disable-metadata"]
    command += ["--disable-api-nodes", *flags]
    with open(base / "log.txt", "wb") as log:
        process = subprocess.Popen(command, cwd=base, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Server(process, f"http://127.0.0.1:{port}", base)
    finally:
        process.terminate()
        process.wait(30)


class Server:
    """One ComfyUI. Not thread-safe."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, base: Path) -> None:
        self.pid = process.pid
        self._process = process
        self._url = url
        self._base = base
        wait_until(self._is_up, START_SECONDS)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=30) as reply:
            return json.loads(reply.read())

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Its entry in the history, whether it went well or not."""
        return self.finished(self.queue(workflow))

    def finished(self, number: str) -> dict[str, Any]:
        """The same of one that was queued."""
        return wait_until(lambda: self.get(f"/history/{number}").get(number), RUN_SECONDS)

    def forget(self) -> None:
        """Let it unload its models and drop what it kept of earlier runs."""
        data = json.dumps({"unload_models": True, "free_memory": True}).encode()
        urllib.request.urlopen(self._url + "/free", data, timeout=30).close()

    def queue(self, workflow: dict[str, Any]) -> str:
        data = json.dumps({"prompt": workflow}).encode()
        request = urllib.request.Request(self._url + "/prompt", data, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.loads(reply.read())["prompt_id"]
        except urllib.error.HTTPError as exc:
            raise AssertionError(exc.read().decode()) from exc

    def pictures(self, entry: dict[str, Any]) -> list[bytes]:
        """The PNG files that a run saved."""
        assert entry["status"]["status_str"] == "success", entry["status"]
        images = [i for out in entry["outputs"].values() for i in out.get("images", ())]
        folder = self._base / "output"
        return [(folder / image["subfolder"] / image["filename"]).read_bytes() for image in images]

    def error(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What a failed run said: exception_type, exception_message and more."""
        messages = dict(entry["status"]["messages"])
        assert "execution_error" in messages, messages
        return messages["execution_error"]

    def log(self) -> str:
        return (self._base / "log.txt").read_text(errors="replace")

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self.log()[-4000:]
        try:
            return bool(self.get("/system_stats"))
        except OSError:
            return False


def environment() -> str:
    """Where this machine's ComfyUI is; skips without one."""
    import pytest

    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH names no ComfyUI")
    pytest.importorskip("aiohttp", reason="this ComfyUI cannot run: no aiohttp")
    pytest.importorskip("torchvision", reason="this ComfyUI cannot run: no torchvision")
    return path

"""What a GPU must show: `python -m benchmarks.gpu OUTPUT_FOLDER` writes gpu.json and gpu.md.

The service is a real server with a real VaeWorker over diffusers' AutoencoderKL at SDXL's
configuration, in a process of its own; beside the worker's calls it answers some that only
measure. Variants of one measurement take turns in one run. Figures are medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from luna_mp.client import Luna, connect
from luna_mp.config import ServiceConfig
from luna_mp.manager import LocalManager
from luna_mp.models import ModelSpec, load_vae
from luna_mp.models.library import Library
from luna_mp.sessions import Sessions
from luna_mp.wire.cuda import Exporter
from luna_mp.workers.vae import VaeWorker
from tests.gpu.models import sdxl_vae

KEY = bytes(32)
EDGES = (32, 64, 128, 256)  # of latents; an eighth of the image's
CROSSINGS = {
    "1024² image, 12.6 MB": (1, 1024, 1024, 3),
    "2048² image, 50 MB": (1, 2048, 2048, 3),
    "81 frames 1280×720, 896 MB": (81, 720, 1280, 3),
}
ROUNDS = {32: 60, 64: 40, 128: 20, 256: 8}
CROSSING_ROUNDS = 60
CLIENTS = 8
CLIENT_EDGE = 192
CLIENT_CALLS = 6

Way = Callable[[], Any]


class _Measured:
    """The service's process: the worker's own calls, and what only measures."""

    def __init__(self, folder: str, path: str) -> None:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        spec = ModelSpec((folder,), dtype="float16")
        library = Library(lambda wanted: load_vae(wanted, str(device)), spec, (), 1)
        self.worker = VaeWorker(library)
        self.vae = library.default
        self.made: dict[tuple[int, ...], torch.Tensor] = {}
        share = torch.cuda.get_device_properties(device).total_memory // 4
        exporter = Exporter(device, share)
        exposed = {
            **self.worker.calls(),
            "floor": self.floor,
            "in_process": self.in_process,
            "make": self.make,
            "peak": self.peak,
            "throughput": self.throughput,
        }
        self.server = LocalManager(
            "vae", exposed, path, KEY, Sessions(), ServiceConfig.max_message, exporter
        ).get_server()

    def floor(self, call: Any, latent: torch.Tensor) -> None:
        """A decode that returns nothing."""
        self.worker.decode(call, latent)
        torch.cuda.synchronize()
        call.after = None

    def in_process(self, call: Any, latent: torch.Tensor, to_host: bool) -> float:
        """Milliseconds of a decode here, with the copy to pinned memory or without."""
        with torch.inference_mode():
            torch.cuda.synchronize()
            start = time.perf_counter()
            image = self.vae.decode(latent)
            if to_host:
                key = (-1, *image.shape)
                if key not in self.made:
                    self.made[key] = torch.empty_like(image, device="cpu").pin_memory()
                self.made[key].copy_(image, non_blocking=True)
            torch.cuda.synchronize()
            return 1e3 * (time.perf_counter() - start)

    def make(self, call: Any, *shape: int) -> torch.Tensor:
        """A tensor on the GPU: what it takes to make one is not the question."""
        if shape not in self.made:
            self.made[shape] = torch.rand(shape, device="cuda")
        return self.made[shape]

    def peak(self, call: Any) -> int:
        """Bytes that were taken at most since the last time this was asked."""
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def throughput(self, call: Any, latent: torch.Tensor, times: int) -> float:
        """Milliseconds for each of several decodes back to back."""
        with torch.inference_mode():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                self.vae.decode(latent)
            torch.cuda.synchronize()
            return 1e3 * (time.perf_counter() - start) / times


def _latent(edge: int) -> torch.Tensor:
    return torch.randn(1, 4, edge, edge, generator=torch.Generator().manual_seed(edge))


def _medians(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Milliseconds until the result is there; a way may also say its milliseconds itself."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 2):
        for way, run in ways.items():
            start = time.perf_counter()
            said = run()
            torch.cuda.synchronize()
            taken = said if isinstance(said, float) else 1e3 * (time.perf_counter() - start)
            if number >= 2:
                times[way].append(taken)
    return {way: round(statistics.median(taken), 3) for way, taken in times.items()}


def _decodes(luna: Luna) -> dict[str, dict[str, float]]:
    ask = luna._endpoint("vae").call
    found = {}
    for edge in EDGES:
        latent = _latent(edge)
        found[f"{8 * edge}²"] = _medians(
            {
                "in process": lambda x=latent: ask("in_process", (x, False), {}, 60.0),
                "floor": lambda x=latent: ask("floor", (x,), {}, 60.0),
                "cuda": lambda x=latent: luna.vae.decode(x),
                "in process to CPU": lambda x=latent: ask("in_process", (x, True), {}, 60.0),
                "cpu": lambda x=latent: luna.vae.decode(x, device="cpu"),
            },
            ROUNDS[edge],
        )
    return found


def _crossings(luna: Luna) -> dict[str, dict[str, float]]:
    """`returned`: the call is back with its tensor; `ready`: the GPU is done with it too."""
    ask = luna._endpoint("vae").call
    found = {}
    for name, shape in CROSSINGS.items():
        returned: list[float] = []

        def call(shape: tuple[int, ...] = shape, returned: list[float] = returned) -> Any:
            start = time.perf_counter()
            tensor = ask("make", shape, {}, 60.0)
            returned.append(1e3 * (time.perf_counter() - start))
            return tensor

        ways: dict[str, Way] = {
            "ready": call,
            "to CPU": lambda s=shape: ask("make", s, {}, 60.0, "cpu"),
        }
        found[name] = _medians({"ready": ways["ready"]}, CROSSING_ROUNDS)
        found[name]["returned"] = round(statistics.median(returned[2:]), 3)
        found[name] |= _medians({"to CPU": ways["to CPU"]}, 8)
    return found


def _together(path: str, luna: Luna) -> dict[str, float]:
    """Eight clients at once: peak VRAM of the service and time for each decode."""
    ask = luna._endpoint("vae").call
    latent = _latent(CLIENT_EDGE)
    image_bytes = (8 * CLIENT_EDGE) ** 2 * 3 * 4
    luna.vae.decode(latent)
    torch.cuda.synchronize()
    alone = ask("throughput", (latent, 12), {}, 120.0)
    ask("peak", (), {}, 10.0)
    ask("throughput", (latent, 2), {}, 120.0)
    one = ask("peak", (), {}, 10.0)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(_process("client", path, piped=True)) for _ in range(CLIENTS)
        ]
        for client in clients:
            client.stdout.readline()
        ask("peak", (), {}, 10.0)
        start = time.perf_counter()
        for client in clients:
            client.stdin.write("go\n")
            client.stdin.flush()
        for client in clients:
            client.stdout.readline()
        each = 1e3 * (time.perf_counter() - start) / (CLIENTS * CLIENT_CALLS)
        peak = ask("peak", (), {}, 10.0)
    held = 2 * CLIENTS * image_bytes
    return {
        "decode in process, back to back, ms": round(alone, 2),
        "served to eight clients, ms for each": round(each, 2),
        "throughput against in process": round(alone / each, 4),
        "peak of one decode, MB": round(one / 1e6),
        "peak with eight clients, MB": round(peak / 1e6),
        "results that they may hold, MB": round(held / 1e6),
        "peak against 1.1 × one and results held": round(peak / (1.1 * one + held), 4),
    }


def _client(path: str) -> None:
    with connect(vae=path, authkey=KEY) as luna:
        latent = _latent(CLIENT_EDGE)
        luna.vae.decode(latent)
        torch.cuda.synchronize()
        _say("ready")
        sys.stdin.readline()
        for _ in range(CLIENT_CALLS):
            image = luna.vae.decode(latent)
            torch.cuda.synchronize()
            del image
        _say("done")


def _limits(found: dict[str, Any]) -> dict[str, bool]:
    crossings, decodes, together = found["crossing"], found["decode"], found["eight clients"]
    share = [row["cpu"] / row["in process to CPU"] for row in decodes.values()]
    return {
        "crossing returned ≤ 0.2 ms": all(row["returned"] <= 0.2 for row in crossings.values()),
        "cuda ≤ 0.25 ms over the floor": all(
            row["cuda"] - row["floor"] <= 0.25 for row in decodes.values()
        ),
        "floor ≤ 1 ms over in process": all(
            row["floor"] - row["in process"] <= 1 for row in decodes.values()
        ),
        "cpu ≤ 1.02 × in process with the copy, from 512² on": max(share[1:]) <= 1.02,
        "throughput ≥ 0.98": together["throughput against in process"] >= 0.98,
        "peak ≤ 1.1 × one decode + results": together["peak against 1.1 × one and results held"]
        <= 1,
    }


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def _process(*arguments: str, piped: bool = False) -> Iterator[Any]:
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _measure(folder: Path) -> dict[str, Any]:
    path = str(folder / "sock")
    model = sdxl_vae(folder)
    with _process("serve", path, str(model)) as service:
        assert service.stdout.readline(), "the service did not start"
        with connect(vae=path, authkey=KEY) as luna:
            assert luna.carriers == {"vae": "cuda"}, luna.reasons
            found: dict[str, Any] = {
                "decode": _decodes(luna),
                "crossing": _crossings(luna),
                "eight clients": _together(path, luna),
            }
    found["limits"] = _limits(found)
    return found


def _where() -> dict[str, str]:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")[0]
    return {
        "card": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("LUNA_MP_COMMIT", "unknown"),
    }


def _markdown(report: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in report["where"].items()), ""]
    for title in ("decode", "crossing"):
        table = report[title]
        columns = list(next(iter(table.values())))
        lines += [f"| {title}, ms | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [
            f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |"
            for name, row in table.items()
        ]
        lines.append("")
    lines += [f"- {name}: {value}" for name, value in report["eight clients"].items()]
    lines.append("")
    lines += [f"- {'holds' if ok else 'FAILS'}: {text}" for text, ok in report["limits"].items()]
    return "\n".join(lines) + "\n"


def main(output: Path) -> int:
    """Measure all and write both files; returns the exit status: 0 where every limit holds."""
    with tempfile.TemporaryDirectory(prefix="luna-mp-") as folder:
        report = {"where": _where(), **_measure(Path(folder))}
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (output / "gpu.md").write_text(_markdown(report))
    _say(_markdown(report))
    return 0 if all(report["limits"].values()) else 1


def _serve(path: str, folder: str) -> None:
    server = _Measured(folder, path).server
    threading.Timer(0.0, lambda: _say("ready")).start()
    server.serve_forever()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", path, folder]:
            _serve(path, folder)
        case ["client", path]:
            _client(path)
        case [output]:
            sys.exit(main(Path(output)))

"""What a GPU must show: `python -m benchmarks.gpu OUTPUT_FOLDER` writes gpu.json and gpu.md.

The service, in a process of its own, has diffusers' AutoencoderKL at SDXL's configuration. Variants
of one measurement take turns in one run; a served decode stands between two of what it is compared
with. Figures are medians.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report import limits, markdown, where
from benchmarks.gpu_service import KEY, say
from luna_mp.client import Luna, connect
from tests.gpu.models import sdxl_vae

EDGES = (32, 64, 128, 256)  # of latents; an eighth of the image's
CROSSINGS = {
    "1024² image, 12.6 MB": (1, 1024, 1024, 3),
    "2048² image, 50 MB": (1, 2048, 2048, 3),
    "81 frames 1280×720, 896 MB": (81, 720, 1280, 3),
}
INPUTS = {
    "128² latent, 256 kB": (1, 4, 128, 128),
    "1024² image, 12.6 MB": (1, 1024, 1024, 3),
    "2048² image, 50 MB": (1, 2048, 2048, 3),
}
ROUNDS = {32: 80, 64: 50, 128: 36, 256: 24}
# A GPU's clock alone makes decodes of 0.4 s differ by more than what the floor adds to one.
FLOOR_ROUNDS = {**ROUNDS, 256: 64}
CALL_ROUNDS = 1000  # some half a second: longer than what else a machine does for a moment
CROSSING_ROUNDS = 400  # of each pass
BY_TORCH = (1 << 20,)  # of float32; five such share a segment of torch's allocator
WARM_UP = 2  # rounds
CLIENTS = 8
CLIENT_EDGE = 192
CLIENT_CALLS = 6

Way = Callable[[], Any]
Row = dict[str, float]
Table = dict[str, Row]
Span = tuple[float, float]
Pairs = list[tuple[float, float]]


def _latent(edge: int) -> torch.Tensor:
    return torch.randn(1, 4, edge, edge, generator=torch.Generator().manual_seed(edge))


def _taken(way: Way) -> float:
    """Milliseconds until the result is there; a way may also say its milliseconds itself."""
    start = time.perf_counter()
    said = way()
    if isinstance(said, torch.Tensor) and said.is_cuda:
        torch.cuda.synchronize()
    taken = said if isinstance(said, float) else 1e3 * (time.perf_counter() - start)
    # To let go of a tensor of the service takes time of its own, which is not counted.
    del said
    return taken


def _rounds(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """In each round in another order: what one way leaves behind meets each of the others."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(rounds)
    for number in range(rounds + WARM_UP):
        for way in order.sample(list(ways), len(ways)):
            taken = _taken(ways[way])
            if number >= WARM_UP:
                times[way].append(taken)
    return times


def _between(base: Way, way: Way, rounds: int) -> Pairs:
    """Each time of `way`, and the mean of `base` right before and after: a GPU's clock drifts."""
    times = []
    before = _taken(base)
    for _ in range(rounds + WARM_UP):
        taken, after = _taken(way), _taken(base)
        times.append((taken, (before + after) / 2))
        before = after
    return times[WARM_UP:]


def _medians(times: dict[str, list[float]]) -> Row:
    return {way: round(statistics.median(taken), 4) for way, taken in times.items()}


def _bare(luna: Luna) -> float:
    """Milliseconds of a call of nothing, when the client keeps calling."""
    times = []
    for _ in range(CALL_ROUNDS):
        start = time.perf_counter()
        luna._endpoint("vae").call("ping", (), {}, 10.0)
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 4)


def _decodes(luna: Luna, edge: int) -> tuple[Row, Row]:
    """Of one size, by way; and the parts of the floor."""
    ask = luna._endpoint("vae").call
    latent = _latent(edge)
    asked: list[Span] = []

    def floor() -> None:
        start = time.perf_counter()
        ask("floor", (latent,), {}, 60.0)
        asked.append((start, time.perf_counter()))

    rounds = ROUNDS[edge]
    found = _compared(
        _between(lambda: ask("in_process", (latent, False), {}, 60.0), floor, FLOOR_ROUNDS[edge]),
        _between(floor, lambda: luna.vae.decode(latent), rounds),
        _between(
            lambda: ask("in_process", (latent, True), {}, 60.0),
            lambda: luna.vae.decode(latent, device="cpu"),
            rounds,
        ),
    )
    served = zip(asked, ask("parts", (), {}, 10.0), strict=True)
    return found, _medians(_parts(list(served)[WARM_UP:]))


def _compared(floor: Pairs, cuda: Pairs, cpu: Pairs) -> Row:
    """Each beside its own base. Differences and ratios are of neighbours, and then medians."""
    differences = [taken - base for taken, base in floor]
    columns = {
        "in process": [base for _, base in floor],
        "floor": [taken for taken, _ in floor],
        "cuda": [taken for taken, _ in cuda],
        "in process to CPU": [base for _, base in cpu],
        "cpu": [taken for taken, _ in cpu],
        "floor - in process": differences,
        "cuda - floor": [taken - base for taken, base in cuda],
        "cpu / in process": [taken / base for taken, base in cpu],
    }
    return {**_medians(columns), "± of floor - in process": _error(differences)}


def _error(values: list[float]) -> float:
    """Standard error of their median, whatever their distribution: half of what holds it by 68 %.

    By order statistics: https://en.wikipedia.org/wiki/Binomial_distribution#Normal_approximation
    """
    ordered, half = sorted(values), len(values) ** 0.5 / 2
    middle = (len(values) - 1) / 2
    return round((ordered[round(middle + half)] - ordered[round(middle - half)]) / 2, 4)


def _parts(floors: list[tuple[Span, Span]]) -> dict[str, list[float]]:
    """Milliseconds before the service had the request, in it, and after it was done."""
    return {
        "request": [1e3 * (begun - start) for (start, _), (begun, _) in floors],
        "turn and decode": [1e3 * (done - begun) for _, (begun, done) in floors],
        "reply": [1e3 * (end - done) for (_, end), (_, done) in floors],
    }


class _Crossings:
    """Of each size by turns, in passes between the other measurements.

    `returned`: the call is back with its tensor; `ready`: this GPU's stream is idle, too.
    """

    def __init__(self, luna: Luna) -> None:
        self._ask = luna._endpoint("vae").call
        columns = ("returned", "ready", "copied")
        self._times: dict[str, dict[str, list[float]]] = {
            name: {column: [] for column in columns} for name in CROSSINGS
        }

    def measure(self) -> None:
        """One more pass."""
        returned: dict[str, list[float]] = {name: [] for name in CROSSINGS}

        def empty(name: str) -> Any:
            start = time.perf_counter()
            tensor = self._ask("empty", CROSSINGS[name], {}, 60.0)
            returned[name].append(1e3 * (time.perf_counter() - start))
            return tensor

        ready = _rounds({name: partial(empty, name) for name in CROSSINGS}, CROSSING_ROUNDS)
        copies = {name: partial(self._ask, "resident", CROSSINGS[name], {}, 60.0) for name in ready}
        copied = _rounds(copies, CROSSING_ROUNDS)
        for name, times in self._times.items():
            times["returned"] += returned[name][WARM_UP:]
            times["ready"] += ready[name]
            times["copied"] += copied[name]

    def found(self) -> Table:
        """Medians of all passes; and of what was copied to the host, which is measured now."""
        copies = {n: partial(self._ask, "empty", CROSSINGS[n], {}, 60.0, "cpu") for n in CROSSINGS}
        to_host = _medians(_rounds(copies, 8))
        return {n: {**_medians(times), "to CPU": to_host[n]} for n, times in self._times.items()}


def _by_torch(pipe: Connection) -> float:
    """Milliseconds of a crossing by torch.multiprocessing's own pipe, when the client keeps asking.

    One more tensor of the same segment is kept, so that torch does not open it each time.
    """

    def crossed() -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        pipe.send(BY_TORCH)
        tensor = pipe.recv()
        return 1e3 * (time.perf_counter() - start), tensor

    kept = crossed()
    times = [crossed()[0] for _ in range(CALL_ROUNDS)]
    del kept
    return round(statistics.median(times), 4)


def _inputs(luna: Luna) -> Table:
    """Arguments: the client's own tensors, and one of the service's that they are copied to."""
    ask = luna._endpoint("vae").call
    found = {}
    for name, shape in INPUTS.items():
        there, here = torch.rand(shape, device="cuda"), torch.rand(shape)

        def lent(there: torch.Tensor = there) -> None:
            buffer = ask("empty", tuple(there.shape), {}, 60.0)
            ask("take", (buffer.copy_(there),), {}, 60.0)

        ways: dict[str, Way] = {
            "of the CPU": lambda x=here: ask("take", (x,), {}, 60.0),
            "of the GPU": lambda x=there: ask("take", (x,), {}, 60.0),
            "of the GPU, into a lent buffer": lent,
        }
        found[name] = _medians(_rounds(ways, 20))
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
        clients = [stack.enter_context(_process("gpu", "client", path)) for _ in range(CLIENTS)]
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
        say("ready")
        sys.stdin.readline()
        for _ in range(CLIENT_CALLS):
            image = luna.vae.decode(latent)
            torch.cuda.synchronize()
            del image
        say("done")


@contextmanager
def _process(module: str, *arguments: str) -> Iterator[Any]:
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    with subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
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
    with _process("gpu_service", path, str(model)) as service:
        assert service.stdout.readline(), "the service did not start"
        pipe = Client(f"{path}.pipe", authkey=KEY)
        with pipe, connect(vae=path, authkey=KEY) as luna:
            assert luna.carriers == {"vae": "cuda"}, luna.reasons
            decode, parts, crossings = {}, {}, _Crossings(luna)
            for edge in EDGES:
                name = f"{8 * edge}²"
                decode[name], parts[name] = _decodes(luna, edge)
                crossings.measure()
            found: dict[str, Any] = {
                "calls": {
                    "bare call, ms": _bare(luna),
                    "crossing of 4 MB by torch.multiprocessing alone, ms": _by_torch(pipe),
                },
                "decode": decode,
                "floor": parts,
                "crossing": crossings.found(),
                "input": _inputs(luna),
                "eight clients": _together(path, luna),
            }
    found["limits"] = limits(found)
    return found


def main(output: Path) -> int:
    """Measure all and write both files; returns the exit status: 0 where every limit holds."""
    with tempfile.TemporaryDirectory(prefix="luna-mp-") as folder:
        report = {"where": where(), **_measure(Path(folder))}
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (output / "gpu.md").write_text(markdown(report))
    say(markdown(report))
    return 0 if all(report["limits"].values()) else 1


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["client", path]:
            _client(path)
        case [output]:
            sys.exit(main(Path(output)))

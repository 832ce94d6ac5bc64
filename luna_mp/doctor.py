"""What `doctor` finds: whether this setup is sound, and why tensors take a slower way."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from luna_mp import runtime
from luna_mp.client import connect
from luna_mp.config import ROLES
from luna_mp.errors import BadConfig, LunaError

__all__ = ("examine", "format_report")

GIB = 1 << 30
MIB = 1 << 20
SMI_SECONDS = 10.0  # with many cards and no persistence mode, nvidia-smi wakes each of them
SMALL_SHM = GIB
SHM = "/dev/shm"
_BACKEND = re.compile(r"(?:^|,)\s*backend\s*:\s*(\w+)")


@dataclass(frozen=True)
class Finding:
    """One line for people; `data` holds its figures. A note is slower or later, not broken."""

    mark: Literal["ok", "note", "problem"]
    subject: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)


def examine(authkey_file: str = "", runtime_dir: str = "") -> dict[str, Any]:
    """Plain data: `findings`, and `ok` where none is a problem.

    The runtime directory is made where there is none, as any client does.
    """
    driver, free = _driver()
    findings = [_torch(), driver, *_gpus(free), _allocator(), _bindings()]
    try:
        directory = runtime.runtime_dir(runtime_dir)
    except BadConfig as exc:
        findings.append(Finding("problem", "runtime directory", str(exc)))
    else:
        place = f"{directory}{_mode(directory)}"
        findings.append(Finding("ok", "runtime directory", place, {"path": str(directory)}))
        findings += [_key(authkey_file, directory), *_services(authkey_file, directory)]
    if os.path.isdir(SHM):
        findings.append(_shared_memory())
    is_sound = all(finding.mark != "problem" for finding in findings)
    return {"ok": is_sound, "findings": [asdict(finding) for finding in findings]}


def format_report(report: dict[str, Any]) -> str:
    """One line for each finding, its mark first."""
    return "\n".join("{mark:<8}{subject}: {text}".format(**line) for line in report["findings"])


def _torch() -> Finding:
    built = torch.version.cuda
    text = f"{torch.__version__}, " + (f"built for CUDA {built}" if built else "without CUDA")
    return Finding("ok", "torch", text, {"version": torch.__version__, "cuda": built})


def _driver() -> tuple[Finding, dict[str, int]]:
    """The driver's version, and bytes free by UUID.

    Torch would have to open each card to say what is free, which takes memory there and fails on
    one that is full.
    """
    fields = "--query-gpu=uuid,memory.free,driver_version"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except FileNotFoundError:
        return Finding("note", "driver", "not known: there is no nvidia-smi here"), {}
    except (OSError, subprocess.TimeoutExpired) as exc:
        return Finding("note", "driver", f"not known: {_line(exc)}"), {}
    rows = [row.split(", ") for row in ran.stdout.splitlines()]
    if ran.returncode or not rows or any(len(row) != 3 for row in rows):
        said = (ran.stdout.strip() or ran.stderr.strip()).partition("\n")[0]
        return Finding("note", "driver", f"not known: nvidia-smi says {said!r}"), {}
    # A card that shares the host's memory says [N/A].
    free = {uuid: int(mib) * MIB for uuid, mib, _ in rows if mib.isdigit()}
    version = rows[0][2]
    data = {"version": version, "gpus": len(rows)}
    return Finding("ok", "driver", f"{version}, {len(rows)} GPU(s)", data), free


def _gpus(free: dict[str, int]) -> Iterator[Finding]:
    if reason := _why_no_gpu():
        yield Finding("note", "gpu", f"none, because {reason}")
        return
    try:
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as exc:
        yield Finding("problem", "gpu", _line(exc))
        return
    for index, card in enumerate(cards):
        uuid, total = f"GPU-{card.uuid}", card.total_memory
        left = free.get(uuid)
        room = f"{total / GIB:.1f} GiB, " + ("free unknown" if left is None else _free(left))
        data = {"index": index, "name": card.name, "uuid": uuid, "free": left, "total": total}
        yield Finding("ok", f"cuda:{index}", f"{card.name}, {uuid}, {room}", data)


def _why_no_gpu() -> str:
    """Why this process has no GPU to share, or ""."""
    if torch.cuda.is_available():
        return ""
    if not torch.version.cuda:
        return f"this torch, {torch.__version__}, is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return f"this process sees no GPU{hidden}"


def _allocator() -> Finding:
    backend = _backend()
    # Where ComfyUI asks for cudaMallocAsync it does so in its own process, unseen from here.
    text = f"{backend}, as this environment asks; a worker may set its own"
    return Finding("ok", "allocator", text, {"backend": backend})


def _backend() -> str:
    # Torch reads the first of them that is set, in this order (2.13's CUDAAllocatorConfig.h).
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if (asked := os.environ.get(name)) is not None:
            found = _BACKEND.search(asked)
            return found[1] if found else "native"
    return "native"


def _bindings() -> Finding:
    try:
        importlib.import_module("cuda.bindings.runtime")
    except ImportError as exc:
        text = (
            f"missing ({_line(exc)}): without it a worker whose allocator is cudaMallocAsync, "
            "ComfyUI's usual one, cannot share GPU memory: pip install cuda-bindings"
        )
        return Finding("note", "cuda-bindings", text, {"imports": False})
    return Finding("ok", "cuda-bindings", "there", {"imports": True})


def _key(file: str, directory: Path) -> Finding:
    path = Path(file) if file else directory / "authkey"
    is_ours = not file and not os.environ.get("LUNA_MP_AUTHKEY")
    if is_ours and not path.exists():
        return Finding("note", "authkey", f"{path} is not there yet: it is made on first use")
    try:
        runtime.authkey(file, directory)
    except BadConfig as exc:
        return Finding("problem", "authkey", str(exc))
    place = f"{path}{_mode(path)}" if file or is_ours else "of LUNA_MP_AUTHKEY"
    return Finding("ok", "authkey", place)


def _mode(path: Path) -> str:
    return f", mode {path.stat().st_mode & 0o777:04o}" if hasattr(os, "getuid") else ""


def _services(authkey_file: str, directory: Path) -> Iterator[Finding]:
    records = [record for role in ROLES for record in runtime.read_records(directory, role)]
    if not records:
        yield Finding("note", "services", "none runs here: start them with `luna-mp serve`")
    for record in records:
        yield _service(record, authkey_file, directory)


def _service(record: runtime.Record, authkey_file: str, directory: Path) -> Finding:
    role, address = record.role, record.socket or f"{record.host}:{record.port}"
    options: dict[str, Any] = {role: address, "authkey_file": authkey_file}
    try:
        with connect(runtime_dir=str(directory), **options) as luna:
            carrier, reason = luna.carriers[role], luna.reasons[role]
    except (LunaError, RuntimeError) as exc:  # the latter is torch's, when the driver fails
        return Finding("problem", role, _line(exc), {"address": address})
    if carrier != "cuda" and not reason:
        # A client without a GPU has the fastest carrier that it can, so connect gives no reason.
        reason = f"cuda: {_why_no_gpu()}"
    data = {"address": address, "carrier": carrier, "reason": reason}
    if reason:
        return Finding("note", role, f"{carrier}, because {reason}", data)
    return Finding("ok", role, carrier, data)


def _shared_memory() -> Finding:
    free = shutil.disk_usage(SHM).free
    if free >= SMALL_SHM:
        return Finding("ok", SHM, _free(free), {"free": free})
    # Tensors that go by shm have no file: of ours only torch's counters lie there.
    text = f"small, {_free(free)}: `cuda` keeps its counters there, and fails when it is full"
    return Finding("note", SHM, text, {"free": free})


def _free(size: int) -> str:
    return f"{size / GIB:.1f} GiB free"


def _line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]

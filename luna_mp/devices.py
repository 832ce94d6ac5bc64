"""Which device a service gets: checked against those that are there."""

from __future__ import annotations

import torch

from luna_mp.errors import BadConfig

__all__ = ("claim",)


def claim(wanted: str) -> torch.device:
    """The device for "auto", "cpu", "cuda", "cuda:N" or a GPU's UUID, current in this thread.

    N counts as torch counts, so CUDA_VISIBLE_DEVICES applies; a UUID may be cut short as long as it
    names one GPU. Raises `BadConfig` with the devices that there are.
    """
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not count):
        return torch.device("cpu")
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
    index = _index(wanted, uuids)
    if index is None or index >= count:
        gpus = [f"cuda:{i} (GPU-{uuid})" for i, uuid in enumerate(uuids)]
        raise BadConfig(
            f"device {wanted!r} is not there; there are {', '.join(['cpu', *gpus])}"
            + ("" if gpus else " and no GPU that this torch can use")
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _index(wanted: str, uuids: list[str]) -> int | None:
    if wanted in ("auto", "cuda"):
        return 0
    if wanted.startswith("cuda:") and wanted[5:].isdigit():
        return int(wanted[5:])
    bare = wanted.lower().removeprefix("gpu-")
    found = [i for i, uuid in enumerate(uuids) if bare and uuid.lower().startswith(bare)]
    return found[0] if len(found) == 1 else None

"""How a tensor lies in memory, apart from where: what crosses beside its bytes.

Strides are data: the same values in another order in memory make convolutions pick other kernels,
and so other bits. A tensor is sent as one run of memory and put together again over that run.
"""

from __future__ import annotations

import ctypes
import math
import reprlib
from functools import lru_cache
from typing import NamedTuple

import torch

from luna_mp.errors import Rejected, Unsendable

__all__ = (
    "DTYPES",
    "Layout",
    "bytes_of",
    "describe",
    "layout_of",
    "memory_of",
    "over",
    "parse",
    "restore",
    "run_of",
)

MAX_DIMS = 64  # torch's own limit
MAX_NUMBER = 1 << 62  # likewise, of an element, with room to add
MAX_TEXT = 4096  # characters; MAX_DIMS of the largest numbers take fewer
PACKED = "packed"
REMEMBERED = 256  # layouts; a workflow has few, and each call needs some of them again

# Quantized dtypes need a quantizer beside their bytes, which no model returns any more.
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Layout(NamedTuple):
    """`is_packed`: the run holds each element once, in row-major order, whatever the strides.

    Otherwise the run is the memory from the first element to the last, as it lay.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_packed: bool
    itemsize: int
    #: elements from the first to the last in memory, gaps included
    span: int
    #: bytes of the run that crosses
    nbytes: int
    #: as it crosses, for `parse`: dtype, shape and strides, and whether it is packed
    text: str
    #: of `stride`, in bytes
    steps: tuple[int, ...]


@lru_cache(maxsize=REMEMBERED)
def layout_of(
    dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], is_packed: bool = False
) -> Layout:
    """How a tensor lies. Raises `Unsendable`."""
    if dtype not in _NAMES:
        raise Unsendable(f"a tensor of {dtype}: quantized tensors cannot be sent")
    return _layout(_NAMES[dtype], tuple(shape), stride, is_packed)


def _layout(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], is_packed: bool) -> Layout:
    itemsize = DTYPES[dtype].itemsize
    reach = sum([(n - 1) * step for n, step in zip(shape, stride, strict=True)])
    span = 0 if 0 in shape else 1 + reach
    size = math.prod(_without_repeats(shape, stride)) if is_packed else span
    numbers = (",".join(map(str, each)) for each in (shape, stride))
    text = ":".join((dtype, *numbers, *((PACKED,) if is_packed else ())))
    steps = tuple([step * itemsize for step in stride])
    return Layout(dtype, shape, stride, is_packed, itemsize, span, size * itemsize, text, steps)


def describe(tensor: torch.Tensor) -> tuple[Layout, torch.Tensor]:
    """Layout, and the tensor whose memory from its first element on is the run to send.

    That is the tensor itself where possible. Nothing is done with it that can be left out: each
    operation takes torch tens of microseconds when it was busy with other things before.
    """
    _check_sendable(tensor)
    stride = tensor.stride()
    layout = layout_of(tensor.dtype, tensor.shape, stride)
    if layout.span <= tensor.numel() and not (tensor.is_conj() or tensor.is_neg()):
        return layout, tensor
    # A view with other values than its memory, or with gaps: what lies in those is nobody's
    # business, and may be large.
    layout = layout_of(tensor.dtype, tensor.shape, stride, True)
    once = tensor.detach().as_strided(_without_repeats(layout.shape, stride), stride)
    return layout, once.resolve_conj().resolve_neg().contiguous()


def run_of(layout: Layout, tensor: torch.Tensor) -> torch.Tensor:
    """The run as a tensor: uint8 [layout.nbytes], a view of what `describe` gave."""
    size = layout.nbytes // layout.itemsize
    return tensor.detach().as_strided((size,), (1,), tensor.storage_offset()).view(torch.uint8)


def bytes_of(size: int) -> Layout:
    """Of a run of that many bytes as it lies in memory: uint8 [size]."""
    return layout_of(torch.uint8, (size,), (1,))


def over(layout: Layout, memory: memoryview) -> torch.Tensor:
    """The tensor again, over a run of the host, which it keeps; if packed, over fresh memory."""
    if layout.is_packed:
        return restore(layout, torch.frombuffer(memory, dtype=torch.uint8))
    values = torch.frombuffer(memory, dtype=DTYPES[layout.dtype], count=layout.span)
    return values.as_strided(layout.shape, layout.stride)


def restore(layout: Layout, run: torch.Tensor) -> torch.Tensor:
    """The tensor again, over `run` (uint8 [layout.nbytes]) or, if packed, over fresh memory."""
    values = run.view(DTYPES[layout.dtype])
    if not layout.is_packed:
        return values.as_strided(layout.shape, layout.stride)
    shape = _without_repeats(layout.shape, layout.stride)
    once = torch.empty_strided(shape, layout.stride, dtype=values.dtype, device=values.device)
    once.copy_(values.view(shape))
    return once.as_strided(layout.shape, layout.stride)


def parse(text: object, limit: int) -> Layout:
    """Check a layout that a peer sent; `limit` is the most bytes it may describe."""
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise Rejected(f"a tensor's description is malformed: {reprlib.repr(text)}")
    layout, largest = _parsed(text)
    if largest > limit:
        raise Rejected(f"a tensor of {largest} bytes is over the limit of {limit} bytes a message")
    return layout


@lru_cache(maxsize=REMEMBERED)
def _parsed(text: str) -> tuple[Layout, int]:
    """The layout, and the bytes of what may be computed of it."""
    try:
        dtype, first, second, *packed = text.split(":")
        shape, stride = _numbers(first), _numbers(second)
    except ValueError as exc:
        raise Rejected(f"a tensor's description is malformed: {text!r:.200}") from exc
    is_possible = dtype in DTYPES and len(shape) == len(stride) <= MAX_DIMS
    if is_possible and all(0 <= n < MAX_NUMBER for n in shape + stride):
        layout = _layout(dtype, shape, stride, bool(packed))
        # Each layout has one text.
        if layout.text == text:
            # Also of elements that lie in one place: what is computed of them does not.
            return layout, max(layout.span, math.prod(shape)) * layout.itemsize
    raise Rejected(f"a tensor's description is impossible: {text!r:.200}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def memory_of(tensor: torch.Tensor, nbytes: int) -> memoryview:
    """Bytes from the first element on, of the CPU, without a copy; valid while that is kept."""
    if not nbytes:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")


def _check_sendable(tensor: torch.Tensor) -> None:
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter):
        raise Unsendable(f"a tensor of class {kind.__name__}: convert it to a plain torch.Tensor")
    if tensor.layout is not torch.strided or tensor.dtype not in _NAMES or tensor.is_meta:
        raise Unsendable(
            f"a tensor of layout {tensor.layout}, {tensor.dtype} on {tensor.device}: "
            "only dense tensors with memory can be sent"
        )


def _without_repeats(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Shape with expanded (stride 0) dimensions down to one element, or none if empty."""
    return tuple(min(n, 1) if step == 0 else n for n, step in zip(shape, stride, strict=True))

"""What an error says of its process: memory was short, or the GPU is lost to it for good."""

from __future__ import annotations

from typing import TypeGuard

import torch

__all__ = ("is_gpu_fault", "is_out_of_memory")

# CUDA's words where others than torch's allocator ask for memory, and the CPU allocator's.
_SHORT = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
# After these, says driver_types.h, "any further CUDA work will return the same error. To continue
# using CUDA, the process must be terminated and relaunched". Others leave the context as it was: a
# launch with bad arguments, a handle that cannot be shared.
_FAULTS = (
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "device-side assert triggered",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "misaligned address",
    "hardware stack error",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "tensor memory not completely freed",
    "Invalid access of peer GPU memory over nvlink or a hardware error",
    "an async error has occured in external entity outside of CUDA",  # sic
    "the MPS client has been terminated by the server",
    # Of these it says less, but a GPU that failed itself answers so too.
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected during the execution",
    "unknown error",
)


def is_out_of_memory(exc: BaseException) -> bool:
    """True where less at a time may still work, on a GPU or not."""
    if isinstance(exc, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(exc, RuntimeError) and any(text in str(exc) for text in _SHORT)


def is_gpu_fault(exc: BaseException | None) -> TypeGuard[RuntimeError]:
    """True for a CUDA error after which every further use of the GPU fails in this process.

    It belongs to work that was queued before; the call that meets it may have no part in it. By
    text, since torch has a class for CUDA's errors only from 2.8 on.
    """
    text = str(exc) if isinstance(exc, RuntimeError) else ""
    return any(f"CUDA error: {fault}" in text for fault in _FAULTS)

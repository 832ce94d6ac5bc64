"""What every carrier does: turn a tensor into a small token, and the token into the tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ("Carrier", "Incoming", "NoRoom", "Outgoing")

Token = tuple[Any, ...]


class NoRoom(Exception):
    """Raised by `pack` when the carrier cannot take this tensor now; another carrier will."""


@dataclass
class Outgoing:
    """What travels beside the pickled part of one message."""

    parts: list[memoryview] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    #: keeps the memory behind `parts` until it is sent
    kept: list[object] = field(default_factory=list)
    #: what gives back what carriers took for this message, should it never leave
    undo: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True)
class Incoming:
    """What came beside the pickled part; buffers are read in the order they were packed."""

    read_into: Callable[[memoryview], None]
    take_fd: Callable[[], int]
    #: most bytes that one tensor may have
    limit: int


class Carrier(ABC):
    """One way for tensors to cross, for one connection. Keeps shape, dtype and strides."""

    name: str

    @abstractmethod
    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        """Token for a tensor; raises `Unsendable`, or `NoRoom` to leave it to another carrier."""

    @abstractmethod
    def unpack(self, token: Token, source: Incoming) -> torch.Tensor:
        """The tensor behind a token: writable, private to the caller. Raises `Rejected`."""

    def close(self) -> None:
        """Let go of what the carrier holds; tensors that were handed out stay valid."""
        return None

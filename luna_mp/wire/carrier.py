"""What every carrier does: turn a tensor into a small token, and the token into the tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch

from luna_mp.errors import Broken

__all__ = ("Carrier", "CarrierFailed", "Fence", "Incoming", "NoRoom", "Outgoing", "take_back")

Token = tuple[Any, ...]


class Fence(Protocol):
    """Work on a GPU that was queued; a `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """True once that work is done."""


class NoRoom(Exception):
    """Raised by `pack` when the carrier cannot take this tensor now; another carrier will."""


class CarrierFailed(Broken):
    """Raised for what could not be shared, or opened; the call is made again by another carrier."""

    @classmethod
    def by(cls, name: str, error: BaseException) -> CarrierFailed:
        """What torch, the system or the peer says of a carrier, without torch's advice."""
        said = (str(error) or type(error).__name__).splitlines()[0]
        return cls(f"{name}: {said.removeprefix(f'{name}: ')}")


class Outgoing:
    """What travels beside the pickled part of one message.

    No dataclass: one is made for each message, and factories take three times as long as this.
    """

    __slots__ = ("before", "fds", "is_leaving", "kept", "late", "parts", "to_host", "undo")

    def __init__(self, is_leaving: bool = False, to_host: bool = False) -> None:
        #: it leaves as soon as it is packed: no copy off a GPU is left for `before`, and the peer
        #: can wake while others are made
        self.is_leaving = is_leaving
        #: the peer wants tensors in the memory of its host
        self.to_host = to_host
        self.parts: list[memoryview] = []
        self.fds: list[int] = []
        #: keeps the memory behind `parts` until it is sent
        self.kept: list[object] = []
        #: what has to be done before it leaves: waits for copies off a GPU
        self.before: list[Callable[[], None]] = []
        #: what is done while the peer reads the pickled part, which has left; `parts` follow
        self.late: list[Callable[[], None]] = []
        #: what gives back what carriers took for this message, should it never leave
        self.undo: list[Callable[[], None]] = []

    def take_back(self) -> None:
        """It never leaves: give back what carriers took for it, once."""
        take_back(self.undo)


def take_back(undo: list[Callable[[], None]]) -> None:
    """Do each of these once, the last first."""
    while undo:
        undo.pop()()


class Incoming(Protocol):
    """What came beside the pickled part; buffers are read in the order they were packed."""

    #: most bytes that one tensor may have
    limit: int
    #: tensors are wanted in the memory of the host, wherever they are
    to_host: bool

    def read_into(self, target: memoryview, is_soon: bool = False) -> None:
        """The next bytes, awaited awake if they come soon. Raises `Rejected` if fewer follow."""

    def take_fd(self) -> int:
        """The next descriptor, which the caller closes. Raises `Rejected` where there is none."""

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Return once that is true of work of the peer's GPU.

        Raises `TimedOut`, and `Broken` when the peer has gone before.
        """


class Carrier(ABC):
    """One way for tensors to cross, for one connection. Keeps shape, dtype and strides."""

    name: str

    @abstractmethod
    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        """Token for a tensor; raises `Unsendable`, or `NoRoom` to leave it to another carrier."""

    @abstractmethod
    def unpack(self, token: Token, source: Incoming) -> torch.Tensor:
        """The tensor behind a token: writable, private to the caller. Raises `Rejected`."""

    def discard(self, token: Token) -> None:
        """Let go of what a token stands for, of a message that cannot be read to its end."""
        return None

    @property
    def is_in_use(self) -> bool:
        """Whether anything that was unpacked has to be settled."""
        return False

    def settle(self, after: Fence | None) -> None:
        """The service's call that used what was unpacked has queued its work, up to `after`."""
        return None

    def give_up(self) -> None:
        """It is sent by no more: let go of what was kept for that."""
        return None

    def close(self) -> None:
        """Let go of what the carrier holds; tensors that were handed out stay valid."""
        return None

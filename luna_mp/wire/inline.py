"""Carrier for TCP, and for small tensors everywhere: the bytes follow the message."""

from __future__ import annotations

import reprlib

import torch

from luna_mp.errors import Rejected
from luna_mp.wire import layout
from luna_mp.wire.carrier import Carrier, Incoming, Outgoing, Token
from luna_mp.wire.copies import bring_off

__all__ = ("InlineCarrier",)


class InlineCarrier(Carrier):
    """Sends from the tensor's own memory and receives into the result's: no copy between."""

    name = "inline"

    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        how, source = layout.describe(tensor)
        if source.is_cuda:
            here = torch.empty(how.nbytes, dtype=torch.uint8)
            bring_off(layout.run_of(how, source), here, out)
            source = here
        out.parts.append(layout.memory_of(source, how.nbytes))
        out.kept.append(source)
        return (how.text,)

    def unpack(self, token: Token, source: Incoming) -> torch.Tensor:
        match token:
            case (text,):
                how = layout.parse(text, source.limit)
            case _:
                raise Rejected(f"a tensor's token is malformed: {reprlib.repr(token)}")
        run = torch.empty(how.nbytes, dtype=torch.uint8)
        source.read_into(layout.memory_of(run, how.nbytes))
        return layout.restore(how, run)

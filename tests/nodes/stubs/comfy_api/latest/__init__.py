"""As much of ComfyUI's V3 interface as the pack's nodes name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class ComfyExtension:
    pass


class ComfyNode:
    pass


class _Put:
    """An input or an output, as it was declared."""

    def __init__(self, id: str = "", **options: Any) -> None:
        self.id = id
        self.options = options


def _kind(name: str) -> SimpleNamespace:
    made = {side: type(name + side, (_Put,), {"io_type": name}) for side in ("Input", "Output")}
    return SimpleNamespace(**made)


class Schema:
    def __init__(self, **options: Any) -> None:
        self.inputs: list[_Put] = []
        self.outputs: list[_Put] = []
        self.__dict__.update(options)


class NodeOutput:
    def __init__(self, *values: Any, ui: Any = None) -> None:
        self.values = values


_PLAIN = ("Boolean", "Clip", "Combo", "Conditioning", "Image", "Int", "Latent", "Model", "String")
io = SimpleNamespace(
    ComfyNode=ComfyNode,
    NodeOutput=NodeOutput,
    Schema=Schema,
    **{name: _kind(name.upper()) for name in (*_PLAIN, "Vae")},
)

"""Patches of a ComfyUI model as data: LoRA and merges are recorded here and laid on there.

What `comfy.model_patcher.ModelPatcher.patches` holds, as nested tagged tuples:

    ("tensor", digest)                            a tensor, sent once by its content
    ("adapter", class, loaded keys, weights)      one of `comfy.weight_adapter`
    ("origin", model, key)                        a weight of a service's model and how to read it
    ("list" | "tuple" | "dict", …), ("value", x)  containers, numbers, text and None
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from luna_mp.errors import Rejected, Unsendable

__all__ = ("ORIGIN", "Patches", "Recipe", "digests", "read", "write")

#: attribute of a skeleton's parameters: (name of the service, model, key)
ORIGIN = "luna_origin"

#: by key: (strength, patch, strength of the weight, offset, function), in order
Patches = Mapping[str, list[tuple[Any, ...]]]
Recipe = tuple[Any, ...]


def write(
    patches: Patches, service: str, name: Callable[[torch.Tensor], str]
) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """The recipe, and its tensors by digest. Raises `Unsendable` for what is not data."""
    tensors: dict[str, torch.Tensor] = {}

    def told(value: Any) -> Recipe:
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                raise Unsendable("a patch holds a weight of a model that is not there to be read")
            digest = name(value)
            tensors[digest] = value
            return ("tensor", digest)
        if value is None or isinstance(value, (bool, int, float, str)):
            return ("value", value)
        if isinstance(value, dict):
            return ("dict", tuple((key, told(item)) for key, item in value.items()))
        if isinstance(value, (list, tuple)):
            origin = _origin(value, service)
            return origin or (type(value).__name__, tuple(map(told, value)))
        if _is_adapter(value):
            keys = tuple(sorted(value.loaded_keys))
            return ("adapter", type(value).__name__, keys, told(value.weights))
        raise Unsendable(
            f"a patch holds a {type(value).__name__}, which is code: load this model with mode "
            "'local' to use it"
        )

    return tuple((key, told(entries)) for key, entries in patches.items()), tensors


def read(
    recipe: Recipe,
    tensors: Mapping[str, torch.Tensor],
    origin: Callable[[Any, str], tuple[Any, Any]],
) -> dict[str, list[Any]]:
    """Patches again; `origin` gives the weight of a model and the function that reads it.

    Raises `Rejected` for what `write` cannot have written.
    """

    def made(told: Recipe) -> Any:
        match told:
            case ("tensor", str(digest)):
                return tensors[digest]
            case ("value", value):
                return value
            case ("dict", items):
                return {key: made(item) for key, item in items}
            case ("list", items):
                return [made(item) for item in items]
            case ("tuple", items):
                return tuple(made(item) for item in items)
            case ("adapter", str(kind), keys, weights):
                return _adapter(kind)(set(keys), made(weights))
            case ("origin", model, str(key)):
                return origin(model, key)
        raise Rejected(f"a patch is malformed: {told!r:.100}")

    try:
        return {key: made(entries) for key, entries in recipe}
    except (KeyError, TypeError, ValueError) as exc:
        raise Rejected(f"a patch is malformed: {exc!r:.100}") from exc


def digests(recipe: Recipe) -> set[str]:
    """Names of all tensors that the recipe needs."""
    match recipe:
        # A weight, too, may be called "tensor"; what is beside its name is a tuple.
        case ("tensor", str(digest)):
            return {digest}
    return {name for part in recipe if isinstance(part, tuple) for name in digests(part)}


def _origin(value: Any, service: str) -> Recipe | None:
    """ComfyUI pairs a weight of another model with the function that reads it."""
    if len(value) != 2 or not callable(value[1]):
        return None
    theirs, model, key = getattr(value[0], ORIGIN, ("", None, ""))
    if theirs != service:
        where = f"in the service {theirs}" if theirs else "in this process"
        raise Unsendable(
            f"a merge takes weights that are {where}, and the model is in the service {service}: "
            "load both by the same loader and mode"
        )
    return ("origin", model, key)


def _is_adapter(value: Any) -> bool:
    base: Any = importlib.import_module("comfy.weight_adapter").WeightAdapterBase
    return isinstance(value, base)


def _adapter(kind: str) -> Any:
    known = {cls.__name__: cls for cls in importlib.import_module("comfy.weight_adapter").adapters}
    if kind not in known:
        raise Rejected(f"this service's ComfyUI has no adapter {kind!r}: update it")
    return known[kind]

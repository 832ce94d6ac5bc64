"""What a service does for ComfyUI's own objects: the networks' work, without what is around it.

A client keeps a `comfy.sd.CLIP` or `VAE` whose weights are here. The tokenizer, tiles, progress
and pictures stay on its side; what comes is what the network itself would be given.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from luna_mp.errors import ModelChanged, OutOfMemory, Rejected
from luna_mp.faults import is_out_of_memory
from luna_mp.models import comfy_patches, files, randomness, skeleton
from luna_mp.models.base import Model
from luna_mp.models.comfy import ComfyClip, ComfyVae, NamedPatches
from luna_mp.models.comfy_facts import facts
from luna_mp.models.content import digest, fingerprint
from luna_mp.models.library import Key
from luna_mp.workers import memory
from luna_mp.workers.clip import ClipWorker
from luna_mp.workers.queue import Call
from luna_mp.workers.vae import VaeWorker
from luna_mp.workers.worker import Worker

__all__ = ("ComfyClipCalls", "ComfyVaeCalls")

#: methods of a VAE's network; the tiled ones exist in some families only
NETWORK = ("decode", "encode", "decode_tiled", "encode_tiled")
MAX_RECIPES = 64
PATCH_BYTES = 4 << 30

M = TypeVar("M", bound=Model)
Spec = dict[str, Any]


class _ComfyCalls:
    """`version` in a call is what `comfyui_describe` said: the model has to be that one still."""

    def __init__(self, worker: Worker[Any], kind: type[Any]) -> None:
        self._worker = worker
        self._kind = kind

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {"comfyui_describe": self.describe}

    def describe(self, call: Call, model: Spec | None = None) -> dict[str, Any]:
        """What a client builds its own object from, with no weights in it."""
        key, loaded = self._worker.take(call, model, gives_tensors=False)
        comfy = self._checked(loaded)
        spec = self._worker.library.spec(model)
        device = comfy.device
        gpu = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else ""
        return {
            "model": {**vars(spec), "paths": list(spec.paths)},
            "version": _version(key),
            "files": [_described(Path(path)) for path in spec.paths],
            "dtype": str(comfy.dtype).removeprefix("torch."),
            "facts": facts(device, comfy.dtype),
            "gpu": str(gpu),
        }

    @contextmanager
    def _using(self, call: Call, model: Spec, version: str) -> Iterator[tuple[str, Any]]:
        key, loaded = self._worker.take(call, model)
        if _version(key) != version:
            raise ModelChanged(
                f"{', '.join(model['paths'])} changed since it was loaded: run the loader again"
            )
        try:
            yield version, self._checked(loaded)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
            text = f"{call.method} does not fit on {loaded.device}: {exc}"
        else:
            return
        # Out of the handler: its traceback would keep the first try's tensors alive.
        memory.free(self._worker.device)
        raise OutOfMemory(text)

    def _checked(self, loaded: Any) -> Any:
        if not isinstance(loaded, self._kind):
            raise Rejected(
                "this service loaded its model without ComfyUI: start it with "
                "`luna-mp serve --comfyui DIR`, in ComfyUI's own interpreter"
            )
        return loaded


class ComfyVaeCalls(_ComfyCalls):
    """For `comfy.sd.VAE`s."""

    def __init__(self, worker: VaeWorker) -> None:
        super().__init__(worker, ComfyVae)

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {**super().calls(), "comfyui_network": self.network}

    def network(
        self,
        call: Call,
        method: str,
        tensor: torch.Tensor,
        options: dict[str, Any],
        random: dict[str, torch.Tensor] | None,
        model: Spec,
        version: str,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor] | None]:
        """What the network makes of `tensor`, and the random state after it if that has moved.

        Without the caller's random state there is no result where the network has drawn from it.
        """
        if method not in NETWORK or not isinstance(tensor, torch.Tensor):
            raise Rejected(f"{method!r:.60} of a {type(tensor).__name__} is no work for a network")
        with self._using(call, model, version) as (_, vae):
            if random is not None:
                randomness.install(random, vae.device)
            before = randomness.capture(vae.device)
            result = vae.run(method, tensor, options)
            after = randomness.capture(vae.device)
            if all(torch.equal(after[name], before[name]) for name in after):
                return result, None
            return (result, after) if random is not None else (None, None)


class ComfyClipCalls(_ComfyCalls):
    """For `comfy.sd.CLIP`s, with the patches that clients laid on theirs."""

    def __init__(self, worker: ClipWorker) -> None:
        super().__init__(worker, ComfyClip)
        self._clip_worker = worker
        self._patches = _Patches()

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {
            **super().calls(),
            "comfyui_encode": self.encode,
            "comfyui_patches": self.take_patches,
            "comfyui_tensors": self.take_tensors,
        }

    def encode(
        self,
        call: Call,
        tokens: dict[str, Any] | str,
        options: dict[str, Any],
        patches: tuple[str, str],
        model: Spec,
        version: str,
    ) -> dict[str, Any]:
        """Conditioning as a dict, or the names of patches that have to be sent first.

        `tokens` come as JSON where there are no tensors among them.
        """
        with self._using(call, model, version) as (_, clip):
            if missing := self._patches.unknown(patches):
                return {"missing": missing}
            key = (version, fingerprint((tokens, options)), *patches)
            found = self._clip_worker.cache.get(key)
            if found is None:
                said = json.loads(tokens) if isinstance(tokens, str) else tokens
                found = clip.encode_tokens(said, options, *map(self._named, patches))
                self._clip_worker.cache.put(key, found)
            return found._asdict()

    def take_patches(self, call: Call, recipe: comfy_patches.Recipe) -> list[str]:
        """Remember a recipe; returns the digests of those of its tensors that are not here."""
        with self._worker.flight.turn(call):
            return self._patches.take_recipe(recipe)

    def take_tensors(self, call: Call, tensors: dict[str, torch.Tensor]) -> None:
        """Remember tensors; each under what its content says, so none can stand for another."""
        named = {digest(tensor): tensor for tensor in tensors.values()}
        with self._worker.flight.turn(call):
            self._patches.take_tensors(named)

    def _named(self, name: str) -> NamedPatches | None:
        return NamedPatches(name, lambda: self._patches.read(name, self._origin)) if name else None

    def _origin(self, model: Any, key: str) -> tuple[Any, Any]:
        _, clip = self._worker.library.get(model)
        pair: tuple[Any, Any] = self._checked(clip).weight(key)
        return pair


class _Patches:
    """Recipes and their tensors, the least used forgotten first. The service's lock guards it."""

    def __init__(self) -> None:
        self._recipes: OrderedDict[str, comfy_patches.Recipe] = OrderedDict()
        self._tensors: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._held = 0

    def unknown(self, names: tuple[str, str]) -> list[str]:
        return [name for name in names if name and not self._is_whole(name)]

    def read(self, name: str, origin: Callable[[Any, str], tuple[Any, Any]]) -> Mapping[str, Any]:
        return comfy_patches.read(self._recipes[name], self._tensors, origin)

    def take_recipe(self, recipe: comfy_patches.Recipe) -> list[str]:
        name = fingerprint(recipe)
        self._recipes[name] = recipe
        self._recipes.move_to_end(name)
        while len(self._recipes) > MAX_RECIPES:
            self._recipes.popitem(last=False)
        return sorted(comfy_patches.digests(recipe) - self._tensors.keys())

    def take_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in self._tensors:
                self._tensors[name] = tensor
                self._held += tensor.nbytes
            self._tensors.move_to_end(name)
        while self._held > PATCH_BYTES:
            self._held -= self._tensors.popitem(last=False)[1].nbytes

    def _is_whole(self, name: str) -> bool:
        recipe = self._recipes.get(name)
        if recipe is None:
            return False
        needed = comfy_patches.digests(recipe)
        for tensor in needed & self._tensors.keys():
            self._tensors.move_to_end(tensor)
        return needed <= self._tensors.keys()


@lru_cache(maxsize=64)
def _version(key: Key) -> str:
    return fingerprint(key)


def _described(path: Path) -> dict[str, Any]:
    if files.is_safetensors(path):
        return skeleton.describe_file(path)
    utils = importlib.import_module("comfy.utils")
    return skeleton.describe_tensors(utils.load_torch_file(str(path), safe_load=True))

"""CLIP and VAE objects for ComfyUI whose weights are in a service.

Both are ComfyUI's own objects: all that they do around the network they do here, by ComfyUI's own
code. Only what touches a weight goes to the service.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

import comfy.sd
import torch
from comfy import model_management

from luna_mp.errors import RemoteFailure
from luna_mp.integrations.comfyui_service import RemoteModel, Service
from luna_mp.integrations.comfyui_skeleton import (
    Skeleton,
    SkeletonPatcher,
    hollow_clip,
    hollow_vae,
    refuse,
)
from luna_mp.models import comfy_patches, randomness
from luna_mp.models.base import Conditioning
from luna_mp.models.cache import Cache
from luna_mp.models.comfy_facts import facts
from luna_mp.models.content import digest, fingerprint
from luna_mp.wire.copies import copied

__all__ = ("RemoteCLIP", "RemoteVAE", "load_clip", "load_vae")

MAX_NAMES = 64  # patch sets whose names are remembered
REMEMBERED = 64 << 20  # bytes of conditioning of one model, which a repeated prompt gets at once
SENDING = 512 << 20  # bytes of patch tensors in one message
ATTEMPTS = 3  # at one encoding, while the service says that it lacks patches
#: what a patcher may hold that changes results and cannot be told
_CODE = ("object_patches", "injections", "weight_wrapper_patches")

#: tokens as ComfyUI's tokenizers give them, or as JSON
Prompt = dict[str, Any] | str
T = TypeVar("T")


class RemoteVAE(comfy.sd.VAE):  # type: ignore[misc]  # ComfyUI has no types
    """A VAE whose network is in a service; tiles, batches and progress are ComfyUI's own here."""

    def is_dynamic(self) -> bool:
        """Newer versions ask what to forget when memory is short: this takes none."""
        return True

    def __deepcopy__(self, memo: object) -> RemoteVAE:
        return self

    def get_sd(self) -> NoReturn:
        refuse("saving a VAE")


class RemoteCLIP(comfy.sd.CLIP):  # type: ignore[misc]
    """A CLIP whose encoders are in a service; tokenizer, patches and hooks are kept here."""

    def is_dynamic(self) -> bool:
        """As a `RemoteVAE`'s."""
        return True

    def __deepcopy__(self, memo: object) -> RemoteCLIP:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> RemoteCLIP:
        clone = super().clone(*args, **kwargs)
        clone.__class__ = type(self)
        clone.cond_stage_model = self.cond_stage_model.with_patcher(clone.patcher)
        return clone  # type: ignore[no-any-return]

    def load_model(self, *_args: Any, **_kwargs: Any) -> Any:
        self.patcher.patch_hooks(self.patcher.forced_hooks)
        return self.patcher

    def load_sd(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        refuse("loading weights into a CLIP")

    def get_sd(self) -> NoReturn:
        refuse("saving a CLIP")

    def state_dict_for_saving(self) -> NoReturn:
        refuse("saving a CLIP")

    def generate(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        refuse("generating text")


class RemoteNetwork(Skeleton):
    """Stands for a VAE's `first_stage_model`.

    Results come to where that VAE has its own: ComfyUI takes them there next, on most machines off
    the GPU, which the carrier does faster.
    """

    #: results come back whole, so there is no buffer to write them to in parts
    comfy_has_chunked_io = False

    def __init__(self, hollow: torch.nn.Module, remote: RemoteModel, output: torch.device) -> None:
        super().__init__(hollow, remote)
        self.__dict__["output"] = output
        #: methods that drew nothing the last time
        self.__dict__["calm"] = set()

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        # only some families have these
        return partial(self._run, name) if name in ("decode_tiled", "encode_tiled") else found

    def decode(self, latent: torch.Tensor, **options: Any) -> torch.Tensor:
        return self._run("decode", latent, **options)

    def encode(self, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
        return self._run("encode", pixels, **options)

    def _run(self, method: str, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        # Few networks draw noise, and to send the state of a generator takes as long as a latent.
        state = None if method in self.calm else randomness.capture(tensor.device)
        result: torch.Tensor | None
        result, after = self.remote.call(
            "comfyui_network", method, tensor, options, state, device=self.output.type
        )
        if result is None:
            self.calm.remove(method)
            return self._run(method, tensor, **options)
        if after is not None:
            randomness.install(after, tensor.device)
        elif state is not None:
            self.calm.add(method)
        return result


class RemoteEncoder:
    """Stands for a CLIP's `cond_stage_model`, with the options and the patcher of one clone."""

    def __init__(self, skeleton: Skeleton, patcher: Any, names: _PatchNames, cache: Cache) -> None:
        self._skeleton = skeleton
        self._patcher = patcher
        self._names = names
        self._cache = cache
        self._options: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_skeleton"], name)

    def with_patcher(self, patcher: Any) -> RemoteEncoder:
        """The same encoders under other patches."""
        return RemoteEncoder(self._skeleton, patcher, self._names, self._cache)

    def reset_clip_options(self) -> None:
        self._options = {}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        # where to compute is for the service to know
        self._options.update({k: v for k, v in options.items() if k != "execution_device"})

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Any, ...]:
        """Conditioning, pooled output or None, and a dict of more where the family has more."""
        patcher = self._patcher
        for name in _CODE:
            if getattr(patcher, name, None):
                refuse(f"a CLIP with {name.replace('_', ' ')} (code, which no service can take)")
        hooked = patcher.get_combined_hook_patches(patcher.current_hooks)
        names = (
            self._names.name(patcher.patches, patcher.patches_uuid),
            self._names.name(hooked, None),
        )
        patches = {names[0]: patcher.patches, names[1]: hooked}
        cond, pooled, extras = self._remembered(_compact(tokens), names, patches)
        return (cond, pooled, extras) if extras else (cond, pooled)

    def _remembered(
        self, prompt: Prompt, names: tuple[str, str], patches: dict[str, Any]
    ) -> Conditioning:
        """Conditioning of the caller's own; what a prompt gave once it gives again."""
        key = (prompt, json.dumps(self._options), *names) if isinstance(prompt, str) else None
        found = self._cache.get(key) if key else None
        if found is not None:
            return _mapped(copied, found)
        found = self._encode(prompt, names, patches)
        if key:
            self._cache.put(key, _mapped(copied, found))
        return found

    def _encode(
        self, prompt: Prompt, names: tuple[str, str], patches: dict[str, Any]
    ) -> Conditioning:
        remote: RemoteModel = self._skeleton.remote
        target = model_management.intermediate_device()
        for _ in range(ATTEMPTS):
            found: dict[str, Any] = remote.call(
                "comfyui_encode", prompt, self._options, names, device=target.type
            )
            if "missing" not in found:
                return _mapped(lambda tensor: tensor.to(target), Conditioning(**found))
            for name in found["missing"]:
                self._names.send(patches[name])
        raise RemoteFailure(
            f"{remote.service.name} forgets patches faster than they are sent: use fewer at once"
        )


class _PatchNames:
    """Names and sends the patches of all clones of one model; contents are read once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._digests = torch.utils.weak.WeakTensorKeyDictionary()
        self._known: OrderedDict[Any, str] = OrderedDict()

    def name(self, patches: comfy_patches.Patches, uuid: Any) -> str:
        """The name under which a service knows these patches, "" for none."""
        if not patches:
            return ""
        if name := self._known.get(uuid):
            return name
        name = fingerprint(self._told(patches)[0])
        if uuid is not None:
            self._known[uuid] = name
        while len(self._known) > MAX_NAMES:
            self._known.popitem(last=False)
        return name

    def send(self, patches: comfy_patches.Patches) -> None:
        """Tell the service the recipe, and of its tensors those that it does not have."""
        recipe, tensors = self._told(patches)
        parcel: dict[str, torch.Tensor] = {}
        for missing in self._service.call("comfyui_patches", recipe):
            if parcel and sum(t.nbytes for t in parcel.values()) > SENDING:
                self._service.call("comfyui_tensors", parcel)
                parcel = {}
            parcel[missing] = tensors[missing].cpu()
        if parcel:
            self._service.call("comfyui_tensors", parcel)

    def _told(
        self, patches: comfy_patches.Patches
    ) -> tuple[comfy_patches.Recipe, dict[str, torch.Tensor]]:
        return comfy_patches.write(patches, self._service.name, self._digest)

    def _digest(self, tensor: torch.Tensor) -> str:
        if tensor not in self._digests:
            self._digests[tensor] = digest(tensor)
        name: str = self._digests[tensor]
        return name


def load_vae(
    service: Service, paths: Sequence[str] = (), dtype: str = "auto"
) -> tuple[RemoteVAE, list[str]]:
    """A VAE in that service, its default one without paths, and what will differ in its bits.

    Raises `BadModel`, `Rejected` where the service was started without ComfyUI.
    """
    remote = service.model(_spec(paths, "auto", dtype))
    vae = hollow_vae(remote)
    warnings = remote.warn_of(facts(vae.device, vae.vae_dtype))
    vae.__class__ = RemoteVAE
    vae.vae_dtype = getattr(torch, remote.dtype)
    if remote.gpu != _uuid(vae.device):
        # there is nothing to make room for on this side
        vae.device = torch.device("cpu")
    vae.first_stage_model = RemoteNetwork(vae.first_stage_model, remote, vae.output_device)
    vae.patcher = _patcher(vae.first_stage_model, vae.device)
    return vae, warnings


def load_clip(
    service: Service,
    paths: Sequence[str] = (),
    type: str = "auto",
    dtype: str = "auto",
    embedding_directory: Any = None,
) -> tuple[RemoteCLIP, list[str]]:
    """A CLIP in that service; everything else as for `load_vae`."""
    remote = service.model(_spec(paths, type, dtype))
    clip = hollow_clip(remote, embedding_directory)
    old = clip.patcher
    own_dtype = next(clip.cond_stage_model.parameters()).dtype
    warnings = remote.warn_of(facts(old.load_device, own_dtype))
    clip.__class__ = RemoteCLIP
    skeleton = Skeleton(clip.cond_stage_model, remote)
    same = remote.gpu == _uuid(old.load_device)
    clip.patcher = _patcher(skeleton, old.load_device if same else torch.device("cpu"))
    clip.patcher.hook_mode = old.hook_mode
    clip.patcher.is_clip = True
    names, cache = _PatchNames(service), Cache(REMEMBERED)
    clip.cond_stage_model = RemoteEncoder(skeleton, clip.patcher, names, cache)
    return clip, warnings


def _spec(paths: Sequence[str], type: str, dtype: str) -> dict[str, Any] | None:
    if not paths:
        return None
    return {"paths": list(paths), "type": type, "dtype": dtype, "source": "comfyui"}


def _patcher(skeleton: Skeleton, device: torch.device) -> SkeletonPatcher:
    # a size, since it would be counted from the weights that are not here
    return SkeletonPatcher(skeleton, device, torch.device("cpu"), size=1)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _compact(tokens: dict[str, Any]) -> Prompt:
    """As JSON, which is quicker to send than hundreds of small objects; not with embeddings."""
    try:
        return json.dumps(tokens)
    except TypeError:
        return tokens


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: T) -> T:
    """The same, with what `function` makes of each tensor in it."""
    made: Any = value
    if isinstance(value, torch.Tensor):
        made = function(value)
    elif isinstance(value, dict):
        made = {key: _mapped(function, item) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        make = getattr(value, "_make", type(value))
        made = make(_mapped(function, item) for item in value)
    return made  # type: ignore[no-any-return]

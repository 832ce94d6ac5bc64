"""ComfyUI's models without weights: real architectures and patchers over tensors on meta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch.overrides import TorchFunctionMode

from luna_mp.errors import Rejected
from luna_mp.integrations.comfyui_service import RemoteModel
from luna_mp.models import skeleton
from luna_mp.models.comfy import clip_type, is_checkpoint
from luna_mp.models.comfy_patches import ORIGIN

__all__ = ("Skeleton", "SkeletonPatcher", "hollow_clip", "hollow_vae", "refuse")


def refuse(what: str) -> NoReturn:
    """Raise `Rejected` for what needs the weights in this process."""
    raise Rejected(
        f"{what} needs the model's weights in this process, and they are in the luna-mp service: "
        "load the model with mode 'local' for this"
    )


class Skeleton(torch.nn.Module):
    """Looks like `hollow`, whose weights are elsewhere, and has nothing to move or to patch.

    ComfyUI may load, unload and clone it as any model; the keys of its state are real.
    """

    def __init__(self, hollow: torch.nn.Module, remote: RemoteModel) -> None:
        super().__init__()
        # not a submodule: what walks over modules and parameters finds none
        self.__dict__["hollow"] = hollow
        self.__dict__["remote"] = remote
        for key, parameter in hollow.named_parameters():
            setattr(parameter, ORIGIN, (remote.service.name, remote.spec, key))
        for module in hollow.modules():
            module.register_forward_pre_hook(_refuse_forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["hollow"], name)

    def __deepcopy__(self, memo: object) -> Skeleton:
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors on meta by key."""
        state: dict[str, Any] = self.hollow.state_dict(*args, **kwargs)
        return state

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse("loading weights into a model")


class SkeletonPatcher(ModelPatcher):  # type: ignore[misc]  # ComfyUI has no types
    """Keeps patches and hooks as the real one does, and lays none of them on anything."""

    def patch_hooks(self, hooks: Any) -> None:
        self.current_hooks = hooks


def hollow_clip(remote: RemoteModel, embedding_directory: Any) -> Any:
    """ComfyUI's own `CLIP` with its tokenizer; the encoders are on meta."""
    files = remote.take_files()
    states = [skeleton.restore(file) for file in files]
    options = {"initial_device": torch.device("meta")}
    with _WithoutWeights():
        if len(states) == 1 and is_checkpoint(states[0]):
            clip = comfy.sd.load_state_dict_guess_config(
                states[0],
                output_model=False,
                output_vae=False,
                embedding_directory=embedding_directory,
                te_model_options=options,
                metadata=files[0]["metadata"] or None,
            )[1]
        else:
            clip = comfy.sd.load_text_encoder_state_dicts(
                [_converted(*pair) for pair in zip(states, files, strict=True)],
                embedding_directory=embedding_directory,
                clip_type=clip_type(comfy.sd, remote.spec["type"]),
                model_options=options,
            )
    clip.cond_stage_model.to("meta")
    return clip


def _converted(state: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    """As `comfy.sd.load_clip` has it, in versions that know more than one form of quantisation."""
    convert = getattr(comfy.utils, "convert_old_quants", None)
    if convert is None:
        return state
    converted: dict[str, Any] = convert(state, "", metadata=file["metadata"])[0]
    return converted


def hollow_vae(remote: RemoteModel) -> Any:
    """ComfyUI's own `VAE`; the network is on meta."""
    [file] = remote.take_files()
    state = skeleton.restore(file)
    metadata = file["metadata"] or None
    with _WithoutWeights():
        if is_checkpoint(state):
            vae = comfy.sd.load_state_dict_guess_config(
                state, output_model=False, output_clip=False, metadata=metadata
            )[2]
        else:
            vae = comfy.sd.VAE(sd=state, metadata=metadata)
    vae.first_stage_model.to("meta")
    return vae


class _WithoutWeights(TorchFunctionMode):
    """Weights, which are made empty and filled from a file, take no memory.

    Anything else has values: some families compute with tensors while they are built.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        elif func is torch.Tensor.copy_ and args[1].is_meta:
            return args[0]
        return func(*args, **kwargs)


def _refuse_forward(module: torch.nn.Module, _inputs: object) -> NoReturn:
    refuse(f"running {type(module).__name__}")

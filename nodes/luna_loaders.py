"""Loaders whose CLIP and VAE may live in a luna-mp service."""

import comfy.sd
import folder_paths
from comfy_api.latest import io

from .luna_inputs import address, mode

__all__ = ("CLIPLoader", "CheckpointLoader", "VAELoader")

CATEGORY = "luna-mp/loaders"
NONE = "none"


def _loaders():
    from luna_mp.integrations import comfyui_loaders

    return comfyui_loaders


class VAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaDaemonVAELoader",
            display_name="Load VAE (luna-mp)",
            category=CATEGORY,
            description="A VAE for any node that takes one; its weights may be in a service.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folder_paths.get_filename_list("vae"),
                    tooltip="The VAE's file.",
                ),
                mode(),
                address(what="VAE service"),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name, mode="auto", daemon_address=""):
        return _loaders().fingerprint([folder_paths.get_full_path_or_raise("vae", vae_name)], mode)

    @classmethod
    def execute(cls, vae_name, mode="auto", daemon_address=""):
        from nodes import VAELoader as Local

        path = folder_paths.get_full_path_or_raise("vae", vae_name)
        return io.NodeOutput(
            _loaders().vae(path, mode, daemon_address, lambda: Local().load_vae(vae_name)[0])
        )


class CLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = folder_paths.get_filename_list("text_encoders")
        types = ["stable_diffusion", "sdxl"]
        types += [t.name.lower() for t in comfy.sd.CLIPType if t.name.lower() not in types]
        more = [
            io.Combo.Input(
                f"clip_name{number}",
                options=[NONE, *names],
                default=NONE,
                optional=True,
                tooltip="A further part, where the model has several text encoders.",
            )
            for number in (2, 3, 4)
        ]
        return io.Schema(
            node_id="LunaDaemonCLIPLoader",
            display_name="Load CLIP (luna-mp)",
            category=CATEGORY,
            description="Text encoders for any node that takes a CLIP; their weights may be in a "
            "service. One to four files, as ComfyUI's own loaders take them.",
            inputs=[
                io.Combo.Input("clip_name1", options=names, tooltip="The text encoder's file."),
                *more,
                io.Combo.Input(
                    "type",
                    options=types,
                    default="stable_diffusion",
                    optional=True,
                    tooltip="The family of the diffusion model.",
                ),
                mode(),
                address(what="CLIP service"),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def _paths(cls, names):
        return [
            folder_paths.get_full_path_or_raise("text_encoders", name)
            for name in names
            if name != NONE
        ]

    @classmethod
    def fingerprint_inputs(cls, clip_name1, mode="auto", **inputs):
        names = [inputs.get(f"clip_name{number}", NONE) for number in (2, 3, 4)]
        return _loaders().fingerprint(cls._paths([clip_name1, *names]), mode)

    @classmethod
    def execute(
        cls,
        clip_name1,
        clip_name2=NONE,
        clip_name3=NONE,
        clip_name4=NONE,
        type="stable_diffusion",
        mode="auto",
        daemon_address="",
    ):
        paths = cls._paths([clip_name1, clip_name2, clip_name3, clip_name4])

        def local():
            return comfy.sd.load_clip(
                paths,
                embedding_directory=folder_paths.get_folder_paths("embeddings"),
                clip_type=getattr(
                    comfy.sd.CLIPType, type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION
                ),
            )

        return io.NodeOutput(_loaders().clip(paths, type, mode, daemon_address, local))


class CheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaCheckpointLoader",
            display_name="Load Checkpoint (luna-mp)",
            category=CATEGORY,
            description="MODEL is loaded here; CLIP and VAE of the same file may be in services.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="The checkpoint's file.",
                ),
                mode(),
                address("clip_address", "CLIP service"),
                address("vae_address", "VAE service"),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name, mode="auto", clip_address="", vae_address=""):
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        return _loaders().fingerprint([path], mode)

    @classmethod
    def execute(cls, ckpt_name, mode="auto", clip_address="", vae_address=""):
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        return io.NodeOutput(*_loaders().checkpoint(path, mode, clip_address, vae_address))

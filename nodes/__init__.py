"""ComfyUI's view of luna-mp: every node of the pack."""

from comfy_api.latest import ComfyExtension, io

from .luna_loaders import CheckpointLoader, CLIPLoader, VAELoader
from .luna_service import ServiceStart, ServiceStatus, ServiceUnload
from .luna_shared_clip import CLIPEncode, CLIPEncodeDual, CLIPEncodeSDXL
from .luna_shared_vae import VAEDecode, VAEDecodeTiled, VAEEncode, VAEEncodeTiled

__all__ = ("LunaExtension",)


class LunaExtension(ComfyExtension):
    """The list that ComfyUI reads."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            VAELoader,
            CLIPLoader,
            CheckpointLoader,
            VAEDecode,
            VAEEncode,
            VAEDecodeTiled,
            VAEEncodeTiled,
            CLIPEncode,
            CLIPEncodeDual,
            CLIPEncodeSDXL,
            ServiceStatus,
            ServiceUnload,
            ServiceStart,
        ]

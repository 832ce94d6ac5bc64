"""Decode and encode with the VAE that a luna-mp service serves by default."""

from comfy_api.latest import io

from .luna_inputs import address

__all__ = ("VAEDecode", "VAEDecodeTiled", "VAEEncode", "VAEEncodeTiled")

CATEGORY = "luna-mp"


def _vae(daemon_address, use):
    from luna_mp.integrations.comfyui_loaders import shared_vae

    return shared_vae(daemon_address, use)


def _joined(images):
    """Frames of a video count as a batch, as in ComfyUI's own nodes."""
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


def _tiles(unit, size, overlap):
    """Inputs of which each is its default, minimum, maximum and step."""
    names = ("default", "min", "max", "step")
    told = (("tile_size", size, "Edge of a tile"), ("overlap", overlap, "How far tiles overlap"))
    return [
        io.Int.Input(id, **dict(zip(names, numbers, strict=True)), tooltip=f"{text}, {unit}.")
        for id, numbers, text in told
    ]


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaSharedVAEDecode",
            display_name="VAE Decode (luna-mp)",
            category=CATEGORY,
            description="Decodes with the VAE of a luna-mp service; no VAE is loaded here.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                address(what="VAE service"),
            ],
            outputs=[io.Image.Output(tooltip="The decoded image.")],
        )

    @classmethod
    def execute(cls, samples, daemon_address=""):
        return io.NodeOutput(
            _vae(daemon_address, lambda vae: _joined(vae.decode(samples["samples"])))
        )


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaSharedVAEEncode",
            display_name="VAE Encode (luna-mp)",
            category=CATEGORY,
            description="Encodes with the VAE of a luna-mp service; no VAE is loaded here.",
            inputs=[
                io.Image.Input("pixels", tooltip="The image to encode."),
                address(what="VAE service"),
            ],
            outputs=[io.Latent.Output(tooltip="The latent.")],
        )

    @classmethod
    def execute(cls, pixels, daemon_address=""):
        return io.NodeOutput(
            {"samples": _vae(daemon_address, lambda vae: vae.encode(pixels[..., :3]))}
        )


class VAEDecodeTiled(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaSharedVAEDecodeTiled",
            display_name="VAE Decode Tiled (luna-mp)",
            category=CATEGORY,
            description="Decodes in overlapping tiles: less memory in the service, other bits.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                *_tiles("in elements of the latent", (64, 8, 512, 8), (16, 0, 256, 4)),
                address(what="VAE service"),
            ],
            outputs=[io.Image.Output(tooltip="The decoded image.")],
        )

    @classmethod
    def execute(cls, samples, tile_size, overlap, daemon_address=""):
        tiles = {"tile_x": tile_size, "tile_y": tile_size, "overlap": overlap}
        return io.NodeOutput(
            _vae(daemon_address, lambda vae: _joined(vae.decode_tiled(samples["samples"], **tiles)))
        )


class VAEEncodeTiled(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaSharedVAEEncodeTiled",
            display_name="VAE Encode Tiled (luna-mp)",
            category=CATEGORY,
            description="Encodes in overlapping tiles: less memory in the service, other bits.",
            inputs=[
                io.Image.Input("pixels", tooltip="The image to encode."),
                *_tiles("in pixels", (512, 64, 4096, 64), (64, 0, 4096, 32)),
                address(what="VAE service"),
            ],
            outputs=[io.Latent.Output(tooltip="The latent.")],
        )

    @classmethod
    def execute(cls, pixels, tile_size, overlap, daemon_address=""):
        tiles = {"tile_x": tile_size, "tile_y": tile_size, "overlap": overlap}
        return io.NodeOutput(
            {
                "samples": _vae(
                    daemon_address, lambda vae: vae.encode_tiled(pixels[..., :3], **tiles)
                )
            }
        )

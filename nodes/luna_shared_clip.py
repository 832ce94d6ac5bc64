"""Encode prompts with the text encoders that a luna-mp service serves by default."""

from comfy_api.latest import io

from .luna_inputs import address

__all__ = ("CLIPEncode", "CLIPEncodeDual", "CLIPEncodeSDXL")

CATEGORY = "luna-mp"


def _clip(daemon_address, use):
    from luna_mp.integrations.comfyui_loaders import shared_clip

    return shared_clip(daemon_address, use)


def _encoded(clip, text, **sizes):
    tokens = clip.tokenize(text)
    return clip.encode_from_tokens_scheduled(tokens, add_dict=sizes)


def _text(id, tooltip):
    return io.String.Input(id, multiline=True, dynamic_prompts=True, tooltip=tooltip)


def _size(id, default, tooltip):
    return io.Int.Input(id, default=default, min=0, max=16384, optional=True, tooltip=tooltip)


class CLIPEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaSharedCLIPEncode",
            display_name="CLIP Text Encode (luna-mp)",
            category=CATEGORY,
            description="Encodes with the text encoders of a luna-mp service.",
            inputs=[_text("text", "The prompt."), address(what="CLIP service")],
            outputs=[io.Conditioning.Output(tooltip="The conditioning.")],
        )

    @classmethod
    def execute(cls, text, daemon_address=""):
        return io.NodeOutput(_clip(daemon_address, lambda clip: _encoded(clip, text)))


class CLIPEncodeDual(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaSharedCLIPEncodeDual",
            display_name="CLIP Text Encode, Both (luna-mp)",
            category=CATEGORY,
            description="Encodes a positive and a negative prompt.",
            inputs=[
                _text("positive", "What the image should show."),
                _text("negative", "What it should not."),
                address(what="CLIP service"),
            ],
            outputs=[
                io.Conditioning.Output("positive_conditioning", display_name="positive"),
                io.Conditioning.Output("negative_conditioning", display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, daemon_address=""):
        prompts = (positive, negative)
        return io.NodeOutput(
            *(_clip(daemon_address, lambda c, t=t: _encoded(c, t)) for t in prompts)
        )


class CLIPEncodeSDXL(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaSharedCLIPEncodeSDXL",
            display_name="CLIP Text Encode SDXL (luna-mp)",
            category=CATEGORY,
            description="Encodes both prompts with the sizes that SDXL is conditioned on.",
            inputs=[
                _text("positive", "What the image should show."),
                _text("negative", "What it should not."),
                _size("width", 1024, "Width of the original, in pixels."),
                _size("height", 1024, "Height of the original, in pixels."),
                _size("crop_w", 0, "Where the crop starts from the left."),
                _size("crop_h", 0, "Where the crop starts from the top."),
                _size("target_width", 1024, "Width to aim at."),
                _size("target_height", 1024, "Height to aim at."),
                address(what="CLIP service"),
            ],
            outputs=[
                io.Conditioning.Output("positive_conditioning", display_name="positive"),
                io.Conditioning.Output("negative_conditioning", display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, daemon_address="", **sizes):
        prompts = (positive, negative)
        return io.NodeOutput(
            *(_clip(daemon_address, lambda c, t=t: _encoded(c, t, **sizes)) for t in prompts)
        )

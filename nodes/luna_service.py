"""The services themselves: what they do, what they hold, and how to start them from here."""

from comfy_api.latest import io

__all__ = ("ServiceStart", "ServiceStatus", "ServiceUnload")

CATEGORY = "luna-mp/service"


def _loaders():
    from luna_mp.integrations import comfyui_loaders

    return comfyui_loaders


class ServiceStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaServiceStatus",
            display_name="Service Status (luna-mp)",
            category=CATEGORY,
            description="What the services of this machine run, for whom, and how much memory "
            "they hold, as text.",
            outputs=[io.String.Output("status")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls):
        return float("nan")

    @classmethod
    def execute(cls):
        text = _loaders().status()
        return io.NodeOutput(text, ui={"text": (text,)})


class ServiceUnload(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaServiceUnload",
            display_name="Unload From Service (luna-mp)",
            category=CATEGORY,
            description="Lets a service of this machine drop a model that a workflow loaded there.",
            inputs=[
                io.Combo.Input("service", options=["vae", "clip"], tooltip="Which service."),
                io.String.Input(
                    "path",
                    multiline=True,
                    tooltip="The model's file as the status names it; of several, one a line.",
                ),
            ],
            outputs=[io.Boolean.Output("was_loaded")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, service, path):
        return float("nan")

    @classmethod
    def execute(cls, service, path):
        return io.NodeOutput(_loaders().unload(service, path.split("\n")))


class ServiceStart(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LunaServiceStart",
            display_name="Start Services (luna-mp)",
            category=CATEGORY,
            description="Starts services that end with this ComfyUI. To share them with others "
            "for longer, run `luna-mp serve` in a terminal instead.",
            inputs=[
                io.String.Input(
                    "clip_device",
                    default="auto",
                    tooltip="cpu, cuda:N, a GPU's UUID, or auto; empty for no CLIP service.",
                ),
                io.String.Input(
                    "vae_device",
                    default="auto",
                    tooltip="cpu, cuda:N, a GPU's UUID, or auto; empty for no VAE service.",
                ),
            ],
            outputs=[io.String.Output("status")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, clip_device, vae_device):
        text = _loaders().start(clip_device, vae_device)
        return io.NodeOutput(text, ui={"text": (text,)})

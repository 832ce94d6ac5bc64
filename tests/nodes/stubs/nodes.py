"""ComfyUI's own module of this name, which the pack's folder `nodes` must not hide."""


class VAELoader:
    def load_vae(self, vae_name: str) -> tuple[str]:
        return (f"local {vae_name}",)

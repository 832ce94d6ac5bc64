"""Where CLIP and VAE come from: `load_clip` and `load_vae` pick the source for a `ModelSpec`."""

from __future__ import annotations

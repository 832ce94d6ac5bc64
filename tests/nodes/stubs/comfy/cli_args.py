"""Flags, as somebody has said them."""

from types import SimpleNamespace

args = SimpleNamespace(
    force_fp32=True, fp32_vae=False, port=8188, fast={"fp16_accumulation", "autotune"}
)

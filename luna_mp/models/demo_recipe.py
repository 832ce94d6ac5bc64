"""How the demo models are made: everything here decides their bytes.

The autoencoder carries four values (red, green, blue, brightness) as groups of four channels
(+value, -value, +K, -K), which pass every layer unharmed: a large K keeps GroupNorm from scaling
by the picture's contrast, and silu(v) - silu(-v) = v undoes the activation. All other channels are
random, and leak into the picture as a little texture, so that every layer does its usual work.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

__all__ = ("write_text_encoder", "write_tokenizer", "write_vae")

_SEED = 20261123
_TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = (
    "a an and at big blue boat bright by castle cat city cloud dark dog fish flower forest garden "
    "gold green high horse house in light moon mountain night of old on over painting photo red "
    "river sea sky small snow star sun the tree under water white with wood"
)

_VALUES = 4
_CARRIED = 4 * _VALUES
_K = 8.0
#: how loud the random channels are in a block's result, and in the picture
_BLOCK_NOISE, _LEAK = 0.05, 0.02


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a byte-level CLIP tokenizer that takes any text; returns its vocabulary."""
    symbols = _byte_symbols()
    vocabulary = {s: i for i, s in enumerate(symbols + [s + "</w>" for s in symbols])}
    merges: list[str] = []
    # longest first: a short word's merge would break the longer words that end like it
    for word in sorted(_WORDS.split(), key=len, reverse=True):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.setdefault(parts[0], len(vocabulary))
    for token in (_START, _END):
        vocabulary[token] = len(vocabulary)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": _TOKENS,
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
    }
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *merges, ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return vocabulary


def write_text_encoder(folder: Path, vocabulary: dict[str, int]) -> None:
    """Write a CLIPTextModel of two layers and width 64."""
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_TOKENS,
        bos_token_id=vocabulary[_START],
        eos_token_id=vocabulary[_END],
        pad_token_id=vocabulary[_END],
    )
    model = CLIPTextModel(config)
    _randomise(model)
    # the prefix of every published CLIP: transformers 4 and 5 both read it
    weights = {
        key if key.startswith("text_model.") else f"text_model.{key}": value.clone()
        for key, value in model.state_dict().items()
        if "position_ids" not in key
    }
    config.architectures = ["CLIPTextModel"]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_vae(folder: Path) -> None:
    """Write an AutoencoderKL with four latent channels and the ratio 8."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        norm_num_groups=8,
        latent_channels=_VALUES,
        sample_size=128,
        scaling_factor=1.0,
    )
    _randomise(vae)
    with torch.no_grad():
        for module in vae.modules():
            _carry(module)
        _enter(vae.encoder.conv_in, torch.cat((torch.eye(3), torch.full((1, 3), 1 / 3))))
        _leave(vae.encoder.conv_norm_out, vae.encoder.conv_out, torch.eye(_VALUES))
        _enter(vae.decoder.conv_in, torch.eye(_VALUES))
        _leave(vae.decoder.conv_norm_out, vae.decoder.conv_out, torch.eye(3, _VALUES))
        vae.encoder.conv_out.bias[_VALUES:] = -12.0  # the posterior's log variance: almost none
        for convolution in (vae.quant_conv, vae.post_quant_conv):
            convolution.weight.copy_(torch.eye(convolution.weight.shape[0])[:, :, None, None])
    vae.save_pretrained(folder)


def _byte_symbols() -> list[str]:
    """The printable characters by which byte-level tokenizers write the bytes, in their order."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in plain else next(rest)) for byte in range(256)]


def _randomise(model: torch.nn.Module) -> None:
    """Fill all weights from the seed; norms and biases get ones and zeros."""
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            fan_in = parameter[0].numel() if "embedding" not in name else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / math.sqrt(fan_in))


def _carry(module: Any) -> None:
    """Let a block hand the carried channels on, adding only a little of its own to the others."""
    kind = type(module).__name__
    if kind == "ResnetBlock2D":
        module.conv2.weight.mul_(_BLOCK_NOISE)
        module.conv2.weight[:_CARRIED] = 0.0
        if module.conv_shortcut is not None:
            _pass(module.conv_shortcut, torch.ones(1, 1))
    elif kind == "Attention":
        module.to_out[0].weight.mul_(_BLOCK_NOISE)
        module.to_out[0].weight[:_CARRIED] = 0.0
    elif kind == "Downsample2D":
        # the mean of 2 x 2, in the corner that the padding never touches
        kernel = torch.zeros(3, 3)
        kernel[:2, :2] = 0.25
        _pass(module.conv, kernel)
    elif kind == "Upsample2D":
        smooth = torch.tensor([1.0, 2.0, 1.0]) / 4
        _pass(module.conv, torch.outer(smooth, smooth))


def _pass(convolution: torch.nn.Conv2d, kernel: torch.Tensor) -> None:
    """Give the carried channels, and only them, `kernel` each."""
    convolution.weight[:_CARRIED] = 0.0
    for channel in range(_CARRIED):
        convolution.weight[channel, channel] = kernel


def _enter(convolution: torch.nn.Conv2d, values: torch.Tensor) -> None:
    """Make the groups (+value, -value, +K, -K) from the inputs; `values` is [values, inputs]."""
    middle = convolution.kernel_size[0] // 2
    assert convolution.bias is not None
    convolution.weight[:_CARRIED] = 0.0
    for value, row in enumerate(values):
        convolution.weight[4 * value, :, middle, middle] = row
        convolution.weight[4 * value + 1, :, middle, middle] = -row
        convolution.bias[4 * value + 2] = _K
        convolution.bias[4 * value + 3] = -_K


def _leave(norm: torch.nn.GroupNorm, convolution: torch.nn.Conv2d, values: torch.Tensor) -> None:
    """Read the values back out; `values` is [outputs, values]."""
    middle = convolution.kernel_size[0] // 2
    norm.weight[:_CARRIED] = _K / math.sqrt(2.0)
    convolution.weight.mul_(_LEAK)
    convolution.weight[:, :_CARRIED] = 0.0
    for output, row in enumerate(values):
        for value, weight in enumerate(row.tolist()):
            convolution.weight[output, 4 * value, middle, middle] = weight
            convolution.weight[output, 4 * value + 1, middle, middle] = -weight

"""Peers: pruning by other libraries, which benchmarks/removal.py compares with the methods of this project.

A peer is a function (denoiser, rate, call) -> note. It prunes the denoiser in place and returns a note for the table.
`call` holds the keyword arguments of a denoiser call.
"""
from __future__ import annotations

import traceback
from importlib import metadata
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.utils import prune

from pruning.methods import kinds


def torch_masks(denoiser: nn.Module, rate: float, call: dict) -> str:
    """Mask every layer with torch.nn.utils.prune, as its tutorial does. Each call computes weight times mask again."""
    for layer in denoiser.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            prune.l1_unstructured(layer, "weight", rate)
    return ""


def torch_pruning(denoiser: nn.Module, rate: float, call: dict) -> str:
    """Prune every layer with Torch-Pruning's MagnitudePruner, the residual streams too.

    If a UNet does not run afterwards, its resampling layers, which check their width, get the new width as `channels`,
    and the note says so.
    """
    import torch_pruning

    attentions = [module for module in denoiser.modules() if isinstance(module, Attention)]
    heads = {getattr(attention, name): attention.heads for attention in attentions
             for name in kinds.QKV + kinds.ADDED_QKV if getattr(attention, name, None) is not None}
    pruner = torch_pruning.pruner.MagnitudePruner(
        denoiser, {**call, "return_dict": False}, torch_pruning.importance.MagnitudeImportance(), pruning_ratio=rate,
        head_pruning_ratio=rate, num_heads=heads, prune_num_heads=True, prune_head_dims=False,
        ignored_layers=[getattr(denoiser, "conv_out", None) or denoiser.proj_out],
        out_channel_groups={})  # all pruners share the default dict, which would keep every model alive
    pruner.step()
    for attention in attentions:
        attention.heads = pruner.num_heads[attention.to_q]
    version = f"Torch-Pruning {metadata.version('torch-pruning')}"
    try:
        with torch.no_grad():
            denoiser(**call)
        return version
    except Exception as error:
        resampling = [m for m in denoiser.modules() if type(m).__name__ in ("Downsample2D", "Upsample2D")]
        if not resampling:
            raise
        for module in resampling:
            module.channels = module.conv.in_channels
        with torch.no_grad():
            denoiser(**call)
        return (f"{version}: {error_line(error)}; it runs once the `channels` of Downsample2D and Upsample2D are set "
                "by hand")


def error_line(error: Exception) -> str:
    """Return an error in one line: class, first line of the text, file and line. Code stands in for a missing text."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().split("\n")[0] or place.line
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"

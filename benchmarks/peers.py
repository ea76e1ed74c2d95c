"""Other libraries' pruning, as benchmarks/removal.py sets it beside ours: (denoiser, rate, call) -> a note, in place.

`call` holds the keyword arguments of a call of the denoiser.
"""
from __future__ import annotations

import traceback
from importlib import metadata
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.utils import prune

from pruning.methods import surgery


def torch_masks(denoiser: nn.Module, rate: float, call: dict) -> str:
    """torch.nn.utils.prune on every layer as its tutorial does; every call multiplies weights and masks anew."""
    for layer in denoiser.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            prune.l1_unstructured(layer, "weight", rate)
    return ""


def torch_pruning(denoiser: nn.Module, rate: float, call: dict) -> str:
    """Torch-Pruning's MagnitudePruner, told which layers have heads; it narrows every layer, residual streams too.

    Where a UNet does not run afterwards its resampling layers, which check their width, are told of their new one.
    """
    import torch_pruning

    attentions = [module for module in denoiser.modules() if isinstance(module, Attention)]
    heads = {getattr(attention, name): attention.heads for attention in attentions
             for name in surgery.QKV + surgery.ADDED_QKV if getattr(attention, name, None) is not None}
    pruner = torch_pruning.pruner.MagnitudePruner(
        denoiser, {**call, "return_dict": False}, torch_pruning.importance.MagnitudeImportance(), pruning_ratio=rate,
        head_pruning_ratio=rate, num_heads=heads, prune_num_heads=True, prune_head_dims=False,
        ignored_layers=[getattr(denoiser, "conv_out", None) or denoiser.proj_out],
        out_channel_groups={})  # the default is one dict for all pruners, which keeps every model alive
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
        return f"{version}: {said(error)}; it runs once the `channels` of Downsample2D and Upsample2D are set by hand"


def said(error: Exception) -> str:
    """The first line of an error, or the code that raised it without a word, and the place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    words = str(error).strip().split("\n")[0] or place.line
    return f"{type(error).__name__}: {words} ({Path(place.filename).name}:{place.lineno})"

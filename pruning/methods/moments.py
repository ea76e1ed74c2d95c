"""Second moments of layer inputs, H = E[x xᵀ], gathered while the dense denoiser answers its recorded calls.

A Conv2d is a Linear on patches: x is the patch under the kernel, and the weight is viewed as (groups, rows, d) with
d = inputs / groups · kernel height · kernel width. A Linear has one group.
"""
from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pruning import UserError
from pruning.methods.calibration import Call, answer
from pruning.methods.zeroing import prunable_weights

ROWS = 1024  # random rows of x that a layer takes of each call


def prunable_layers(denoiser: nn.Module) -> Dict[str, nn.Module]:
    """Return the layers that hold the prunable weights, by the name of the weight."""
    layers = {f"{name}.weight" if name else "weight": module for name, module in denoiser.named_modules()}
    return {name: layers[name] for name in prunable_weights(denoiser)}


def as_rows(layer: nn.Module, weight: Optional[Tensor] = None) -> Tensor:
    """View the weight of a layer, or a tensor of its shape, as (groups, rows, d)."""
    weight = layer.weight if weight is None else weight
    return weight.reshape(getattr(layer, "groups", 1), -1, weight[0].numel())


def input_rows(layer: nn.Module, x: Tensor, generator: torch.Generator, rows: int = ROWS) -> Tensor:
    """Return up to `rows` random inputs of a layer's weight, float32 (groups, n, d).

    x: what the layer is called with, (..., inputs) for a Linear, (batch, inputs, height, width) for a Conv2d.
    """
    if not isinstance(layer, nn.Conv2d):
        x = x.flatten(0, -2)
        return x[_some(len(x), rows, generator).to(x.device)].float()[None]
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    x = _padded(layer, x)
    out_h, out_w = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    places = _some(len(x) * out_h * out_w, rows, generator).to(x.device)
    n, top, left = places // (out_h * out_w), places // out_w % out_h * sh, places % out_w * sw
    down = (top[:, None] + torch.arange(kh, device=x.device) * dh)[:, :, None]
    right = (left[:, None] + torch.arange(kw, device=x.device) * dw)[:, None]
    patches = x.permute(0, 2, 3, 1)[n[:, None, None], down, right]
    # (n, kh, kw, inputs) -> (groups, n, inputs / groups · kh · kw), in the order of the weight
    patches = patches.float().permute(0, 3, 1, 2).reshape(len(places), layer.groups, -1)
    return patches.transpose(0, 1)


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return x with the padding that the convolution adds."""
    sides = layer._reversed_padding_repeated_twice  # (left, right, top, bottom), also for padding="same"
    if not any(sides):
        return x
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _some(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Return up to `most` different numbers below `count`, at random."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most]


@contextmanager
def watched(layers: Dict[str, nn.Module], note: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside the block, call note(name, layer, input) whenever one of the layers is called."""
    hooks = [layer.register_forward_pre_hook(lambda module, inputs, name=name: note(name, module, inputs[0]))
             for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def input_moments(denoiser: nn.Module, calls: Sequence[Call], layers: Dict[str, nn.Module], seed: int,
                  bar: Optional[tqdm] = None) -> Dict[str, Tensor]:
    """Return H of each layer, float32 (groups, d, d) on the layer's device: the mean of x xᵀ over places and calls.

    layers: by name; the moments of all of them are in memory together. A layer that is never called has H = 0. Raises
    UserError if a layer's input is not finite.
    """
    sums: Dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    for name, layer in layers.items():
        groups, _, d = as_rows(layer).shape
        sums[name] = torch.zeros(groups, d, d, device=layer.weight.device)
    for index, (arguments, _) in enumerate(calls):
        def note(name, layer, x, index=index):
            x = input_rows(layer, x, torch.Generator().manual_seed(seed_of(seed, name, index)))
            sums[name].baddbmm_(x.transpose(1, 2), x)
            counts[name] += x.shape[1]

        with watched(layers, note):
            answer(denoiser, arguments)
        if bar is not None:
            bar.update()
    for name, total in sums.items():
        if not torch.isfinite(total.diagonal(dim1=1, dim2=2)).all():
            raise UserError(f"the input of {name} is not finite during calibration; use --dtype float32, or check "
                            "the weights of the model")
        total /= max(counts[name], 1)
    return sums


def seed_of(*parts) -> int:
    """Return a seed that depends on the text of all parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")

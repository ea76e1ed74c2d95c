"""Second moments of layer inputs, H = E[x xᵀ], gathered while the dense denoiser answers its recorded calls.

A Conv2d is a Linear on patches: x is the patch under the kernel, and the weight is viewed as (groups, rows, d) with
d = inputs / groups · kernel height · kernel width. A Linear has one group.
"""
from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import UserError, distributed
from pruning.methods.calibration import GIB, Calibration, Call, answer, read_tensors, write_tensors
from pruning.methods.zeroing import prunable_weights
from pruning.progress import tqdm

ROWS = 1024  # random rows of x that a layer takes of each call


def prunable_layers(denoiser: nn.Module) -> Dict[str, nn.Module]:
    """Return the layers that hold the prunable weights, by the name of the weight."""
    layers = {f"{name}.weight" if name else "weight": module for name, module in denoiser.named_modules()}
    return {name: layers[name] for name in prunable_weights(denoiser)}


def as_rows(layer: nn.Module, weight: Optional[Tensor] = None) -> Tensor:
    """View the weight of a layer, or a tensor of its shape, as (groups, rows, d)."""
    weight = layer.weight if weight is None else weight
    return weight.reshape(getattr(layer, "groups", 1), -1, weight[0].numel())


def input_rows(layer: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """Return the inputs of a layer's weight at some places of its output, (groups, n, d) in float32 at least.

    x: what the layer is called with, (..., inputs) for a Linear, (batch, inputs, height, width) for a Conv2d. places:
    numbers below output_places.
    """
    places = places.to(x.device)
    if not isinstance(layer, nn.Conv2d):
        return wide(x.flatten(0, -2)[places])[None]
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    out_h, out_w = _output_size(layer, x)
    x = _padded(layer, x)
    n, top, left = places // (out_h * out_w), places // out_w % out_h * sh, places % out_w * sw
    down = (top[:, None] + torch.arange(kh, device=x.device) * dh)[:, :, None]
    right = (left[:, None] + torch.arange(kw, device=x.device) * dw)[:, None]
    patches = x.permute(0, 2, 3, 1)[n[:, None, None], down, right]
    # (n, kh, kw, inputs) -> (groups, n, inputs / groups · kh · kw), in the order of the weight
    patches = wide(patches).permute(0, 3, 1, 2).reshape(len(places), layer.groups, -1)
    return patches.transpose(0, 1)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def output_places(layer: nn.Module, x: Tensor) -> int:
    """Return how many places the output of a layer has: (..., outputs) for a Linear, batch · height · width."""
    return math.prod(_output_size(layer, x)) * len(x) if isinstance(layer, nn.Conv2d) else math.prod(x.shape[:-1])


def _output_size(layer: nn.Conv2d, x: Tensor) -> Tuple[int, int]:
    left, right, top, bottom = layer._reversed_padding_repeated_twice  # also for padding="same"
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    return ((x.shape[2] + top + bottom - dh * (kh - 1) - 1) // sh + 1,
            (x.shape[3] + left + right - dw * (kw - 1) - 1) // sw + 1)


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return x with the padding that the convolution adds."""
    sides = layer._reversed_padding_repeated_twice  # (left, right, top, bottom), also for padding="same"
    if not any(sides):
        return x
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def some(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Return up to `most` different numbers below `count`, at random."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most]


@contextmanager
def hooked(hooks: Iterable) -> Iterator[None]:
    """Remove the hooks, which are set already, when the block ends."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watched(layers: Dict[str, nn.Module], note: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside the block, call note(name, layer, input) whenever one of the layers is called."""
    with hooked(layer.register_forward_pre_hook(lambda module, inputs, name=name: note(name, module, inputs[0]))
                for name, layer in layers.items()):
        yield


class Moments:
    """The moments of a denoiser's layers, a file a layer, so that no more than one layer's are in memory."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self._files = {name: folder / f"{name}.safetensors" for name in names}
        self._last: Tuple = (None, None)  # what `of` was asked for last, as several steps ask for the same layer

    def of(self, name: str, device) -> Tuple[Tensor, Tensor]:
        """Return H, (groups, d, d), and the mean input E[x], (groups, d), of a layer, float32 on the device."""
        if self._last[0] != (name, device):
            self._last = (None, None)  # frees the memory first
            found = read_tensors(self._files[name])
            if found is None:
                raise self._broken(name)
            self._last = ((name, device), (found["moments"].to(device), found["mean"].to(device)))
        return self._last[1]

    def diagonal(self, name: str, device) -> Tensor:
        """Return E[x²] of a layer, (groups, d) float32: reads no more of the file than that."""
        try:
            with safe_open(self._files[name], "pt") as file:
                return file.get_tensor("squares").to(device)
        except (OSError, SafetensorError):
            raise self._broken(name) from None

    def _broken(self, name: str) -> UserError:
        return UserError(f"cannot read {self._files[name]}, which held moments: delete that folder and give the same "
                         "command again")

    def missing(self) -> List[str]:
        """Return the names of the layers that have no file."""
        return [name for name, path in self._files.items() if not path.is_file()]

    def write(self, name: str, moments: Tensor, mean: Tensor) -> None:
        """Write the file of a layer."""
        write_tensors({"moments": moments.cpu(), "mean": mean.cpu(),
                       "squares": moments.diagonal(dim1=1, dim2=2).cpu()}, self._files[name])


def gather(denoiser: nn.Module, calibration: Calibration, step_weights: str = "uniform",
           layers: Optional[Dict[str, nn.Module]] = None, together: bool = False) -> Moments:
    """Gather the moments of layers (None: all prunable ones) that the calibration's folder lacks, and return them all.

    Layers are gathered in groups whose moments fit calibration.memory, a pass over the calls for each group.
    together: all processes call this function and share out the calls; the main process writes.
    Raises UserError if the memory is too small for one layer, or if a layer's input is not finite.
    """
    layers = prunable_layers(denoiser) if layers is None else layers
    found = Moments(calibration.folder / f"moments-{step_weights}", list(layers))
    missing = distributed.broadcast(found.missing()) if together else found.missing()
    if not missing:
        return found
    groups = memory_groups({name: moment_bytes(layers[name]) for name in missing}, calibration.memory)
    calls = calibration.calls
    weights = call_weights(calls, step_weights)
    own = range(distributed.rank, len(calls), distributed.world_size) if together else range(len(calls))
    with tqdm(total=len(groups) * len(own), desc="input moments", unit="call", leave=False,
              disable=not distributed.is_main) as bar:
        for group in groups:
            sums = input_sums(denoiser, {index: calls[index][0] for index in own}, weights,
                              {name: layers[name] for name in group}, calibration.seed, bar)
            if together:
                distributed.add_up(tensor for each in sums.values() for tensor in each)
            for name in list(sums):
                moments, total, weight = sums.pop(name)  # so that the memory of written moments is free for the next
                if not torch.isfinite(moments.diagonal(dim1=1, dim2=2)).all():
                    raise UserError(f"the input of {name} is not finite during calibration; use --dtype float32, or "
                                    "check the weights of the model")
                if distributed.is_main:
                    weight.clamp_min_(1e-30)
                    found.write(name, moments.div_(weight), total.div_(weight))
    if together:
        distributed.barrier()
    return found


@torch.no_grad()
def input_sums(denoiser: nn.Module, calls: Dict[int, dict], weights: Sequence[float], layers: Dict[str, nn.Module],
               seed: int, bar: Optional[tqdm] = None) -> Dict[str, Tuple[Tensor, Tensor, Tensor]]:
    """Return for each layer the weighted sums over calls and places of x xᵀ (groups, d, d), x (groups, d), and 1.

    calls: arguments by the number of the call, which seeds the choice of rows and has its weight in `weights`.
    """
    sums = {}
    for name, layer in layers.items():
        groups, _, d = as_rows(layer).shape
        shapes = ((groups, d, d), (groups, d), ())
        sums[name] = tuple(torch.zeros(shape, device=layer.weight.device) for shape in shapes)
    for index, arguments in calls.items():
        def note(name, layer, x, index=index):
            generator = torch.Generator().manual_seed(seed_of(seed, name, index))
            x = input_rows(layer, x, some(output_places(layer, x), ROWS, generator)).float()
            moments, total, count = sums[name]
            moments.baddbmm_(x.transpose(1, 2), x, alpha=weights[index])
            total.add_(x.sum(1), alpha=weights[index])
            count.add_(weights[index] * x.shape[1])

        with watched(layers, note):
            answer(denoiser, arguments)
        if bar is not None:
            bar.update()
    return sums


def moment_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's H in float32."""
    groups, _, d = as_rows(layer).shape
    return 4 * groups * d * d


def memory_groups(sizes: Dict[str, int], memory: int) -> List[List[str]]:
    """Return the names in groups whose sizes together are at most `memory`, in order.

    Raises UserError if one size is larger.
    """
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > memory:
        raise UserError(f"the input moments of {largest} take more than --calibration_memory {memory / GIB:.4g}; give "
                        f"--calibration_memory {math.ceil(1000 * sizes[largest] / GIB) / 1000:g} or more (GiB)")
    groups, held = [[]], 0
    for name, size in sizes.items():
        if held + size > memory:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def call_weights(calls: Sequence[Call], step_weights: str) -> List[float]:
    """Return the weight of each call in the moments, mean 1.

    "uniform": all 1. "early": falls with the logarithm of the step, from 1.2 at the noisiest to 0.8 at the last (Zhu
    et al., 2025, OBS-Diff). "late": rises likewise.
    """
    if step_weights == "uniform":
        return [1.0] * len(calls)
    times = [timestep(call) for call in calls]
    order = {time: place for place, time in enumerate(sorted(set(times), reverse=True))}
    fall = [0.4 * math.log(1 + order[time]) / math.log(max(len(order), 2)) for time in times]
    weights = [1.2 - each if step_weights == "early" else 0.8 + each for each in fall]
    return [weight * len(weights) / sum(weights) for weight in weights]


def timestep(call: Call) -> float:
    """Return the time of a call, the higher the noisier; 0 if the denoiser takes none."""
    return float(torch.as_tensor(call[0].get("timestep", 0)).float().mean())


def seed_of(*parts) -> int:
    """Return a seed that depends on the text of all parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")

"""The costs of a denoiser, dense or pruned: parameters, multiply-accumulates, memory and time.

A `call` holds the keyword arguments of a denoiser call. Every call runs under torch.no_grad(), because torch.compile
compiles again for any other mode.
"""
from __future__ import annotations

import os
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from pruning.metrics.intervals import median_interval

ROUNDS, MORE_ROUNDS, MOST_ROUNDS = 6, 3, 24  # of calls that are timed; 6 is the fewest that have a 95 % interval
TIMING = 0.25  # of the time of a point's images: its calls are timed no longer, but for ROUNDS
RATIO_WIDTH = 0.1  # of the interval of a ratio of times, as a share of the ratio: what is good enough

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch's profiler prints to stderr


def count_parameters(module) -> Dict[str, int]:
    """Return the number of parameters, the number of nonzero ones, and the bytes of all weights.

    The bytes are those of the state dict in memory. A saved file may be half as large: see saving.file_bytes.
    """
    parameters = list(module.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero_parameters": sum(int(p.count_nonzero()) for p in parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in module.state_dict().values()),
    }


def count_macs(denoiser, call: dict) -> int:
    """Return the multiply-accumulates of a call for one latent, counted by torch's FlopCounterMode.

    Matrix products, convolutions and attention count. Multiplications by zero count too, as dense kernels compute them.
    """
    counter, latents = _counted(denoiser.forward, call)  # forward: compiled calls would not be counted
    return counter.get_total_flops() // 2 // latents


def module_macs(denoiser, call: dict) -> Dict[str, float]:
    """Return the multiply-accumulates of each module in a call for one latent, by its name; "" is the denoiser.

    A module without any is left out.
    """
    counter, latents = _counted(denoiser, call)
    root = type(denoiser).__name__
    return {name[len(root) + 1:]: sum(flops.values()) / 2 / latents
            for name, flops in counter.get_flop_counts().items() if name == root or name.startswith(f"{root}.")}


def _counted(function: Callable, call: dict):
    """Return the FlopCounterMode that has watched a call, and the number of latents in it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Older releases of torch do not count fused attention on the CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        return counter, sample_of(function(**call)).shape[0]


def layer_shares(denoiser, call: dict) -> Dict[str, Dict[str, float]]:
    """Return layer_parameters and layer_macs: the share that each Linear and Conv2d has, by the name of its weight.

    The parameters are those of the denoiser, the multiply-accumulates those of all Linear and Conv2d layers: a layer's
    number of outputs times the inputs of each.
    """
    import torch
    from torch import nn

    macs: Dict[str, int] = {}

    def watch(name):
        def count(layer, _inputs, output):
            macs[name] = macs.get(name, 0) + output.numel() * layer.weight[0].numel()
        return count

    layers = {f"{name}.weight" if name else "weight": layer for name, layer in denoiser.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d))}
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            denoiser(**call)
    finally:
        for hook in hooks:
            hook.remove()
    total, done = sum(parameter.numel() for parameter in denoiser.parameters()), sum(macs.values())
    return {"layer_parameters": {name: sum(p.numel() for p in layer.parameters()) / total
                                 for name, layer in layers.items()},
            "layer_macs": {name: macs.get(name, 0) / max(done, 1) for name in layers}}


def peak_bytes(denoiser, call: dict) -> int:
    """Return the bytes of the denoiser's weights plus the most that a call allocates at once on top of them.

    Only weights on the call's device count.
    """
    import torch

    device = _device(call)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values()
                  if tensor.device.type == device.type)  # offloaded weights are allocated within the call
    with torch.no_grad():
        return weights + most_allocated(lambda: denoiser(**call), device)


def most_allocated(run: Callable, device) -> int:
    """Return the most bytes of a torch.device that run() allocates at once, on top of what is allocated before.

    On CUDA, torch's allocator reports the peak; on the CPU, torch's profiler reports each allocation. Both numbers are
    repeatable. The memory of the process is not, because it includes freed memory that was not returned.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(max(held, default=0))


def denoiser_seconds(denoisers: Sequence, call: dict, rounds: int = 5, place: Optional[Callable] = None) -> List[float]:
    """Return the median seconds of a call of each denoiser over `rounds` rounds of call_seconds()."""
    return [float(np.median(own)) for own in call_seconds(denoisers, call, rounds, place).T]


def call_seconds(denoisers: Sequence, call: dict, rounds: int, place: Optional[Callable] = None) -> np.ndarray:
    """Return the seconds of a call of each denoiser in each round, (rounds, denoisers).

    Each round calls every denoiser once, so a machine that becomes slower slows all of them. place(denoiser), if given,
    brings a denoiser to the device before its turn, and an untimed warm-up call follows. Without `place` the first
    timed call may be slow; a median ignores it.
    """
    import torch

    seconds, device = np.empty((rounds, len(denoisers))), _device(call)
    with torch.no_grad():
        for own in seconds:
            for k, denoiser in enumerate(denoisers):
                if place:
                    place(denoiser)
                    denoiser(**call)
                synchronize(device)
                started = time.perf_counter()
                denoiser(**call)
                synchronize(device)
                own[k] = time.perf_counter() - started
    return seconds


def time_ratio(dense, others: Sequence, call: dict, place: Optional[Callable] = None, shares: Sequence[float] = (1.0,),
               limit: float = np.inf) -> Tuple[float, float, Tuple[float, float]]:
    """Return the seconds of a dense call, how many times as long the others take, and the ratio's 95 % interval.

    others: the pruned denoiser; of a baseline, the denoisers that its drawings call. shares: how often each is called
    in the time of one dense call. Without others, a drawing makes fewer dense calls, and the ratio is the share itself.

    The ratio is the median over rounds of a call of dense and of each other. While the interval is wider than
    RATIO_WIDTH of the ratio, MORE_ROUNDS follow, at most MOST_ROUNDS in all, and none after `limit` seconds of calls.
    """
    seconds = call_seconds([dense, *others], call, ROUNDS, place)
    while True:
        ratios = seconds[:, 1:] @ np.array(shares) / seconds[:, 0] if others else np.full(len(seconds), shares[0])
        ratio, (low, high) = float(np.median(ratios)), median_interval(ratios)
        if high - low <= RATIO_WIDTH * ratio or len(seconds) >= MOST_ROUNDS or seconds.sum() >= limit:
            return float(np.median(seconds[:, 0])), ratio, (low, high)
        seconds = np.concatenate([seconds, call_seconds([dense, *others], call, MORE_ROUNDS, place)])


def synchronize(device) -> None:
    """Wait until a torch.device has finished all its work. Only CUDA devices work asynchronously here."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(call: dict):
    return next(value.device for value in call.values() if hasattr(value, "device"))


def sample_of(output):
    """Return the sample that a denoiser returned, a tensor with a row a latent. Z-Image returns a list of latents."""
    sample = output[0] if isinstance(output, tuple) else output.sample
    if isinstance(sample, list):
        import torch
        sample = torch.stack(sample)
    return sample

"""What a denoiser costs: parameters, multiply-accumulates, memory and time, of dense and pruned alike."""
from __future__ import annotations

import os
import time
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr otherwise


def count_parameters(module) -> Dict[str, int]:
    """Parameters, how many are not zero, and the bytes of all weights at their dtype, which is what a file holds."""
    parameters = list(module.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero_parameters": sum(int(p.count_nonzero()) for p in parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in module.state_dict().values()),
    }


def count_macs(denoiser, call: dict) -> int:
    """Multiply-accumulates of a call for one latent: matrix products, convolutions and attention, as torch counts.

    call: the keyword arguments of a call. A multiplication by zero counts, as dense kernels compute it.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Fused CPU attention is not counted by older releases, and inference mode hides everything from them.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        latents = _sample(denoiser.forward(**call)).shape[0]  # not what torch.compile made of it, which hides them too
    return counter.get_total_flops() // 2 // latents


def peak_bytes(denoiser, call: dict) -> int:
    """The denoiser's weights and the most memory that a call holds at once on top of them, in bytes.

    On CUDA what its allocator saw, on the CPU the allocations that torch's profiler saw: both repeatable,
    where the memory of the process would also hold what was freed and not given back.
    """
    import torch
    device = _device(call)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values()
                  if tensor.device.type == device.type)  # offloaded ones come and go within the call
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            denoiser(**call)
            torch.cuda.synchronize(device)
            return weights + torch.cuda.max_memory_allocated(device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            denoiser(**call)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return weights + int(max(held, default=0))


def denoiser_seconds(denoisers: Sequence, call: dict, rounds: int = 5, place: Optional[Callable] = None) -> List[float]:
    """Median seconds of a call of each denoiser, timed in turn so that the machine's drift meets all alike.

    place(denoiser), where given, is called whenever another denoiser's turn comes, to bring it to the device, and a
    call to warm up follows. Without it the first of the calls may be cold, which a median leaves out.
    """
    import torch
    seconds, device = [[] for _ in denoisers], _device(call)
    with torch.inference_mode():
        for _ in range(rounds):
            for denoiser, own in zip(denoisers, seconds):
                if place:
                    place(denoiser)
                    denoiser(**call)
                synchronize(device)
                started = time.perf_counter()
                denoiser(**call)
                synchronize(device)
                own.append(time.perf_counter() - started)
    return [float(np.median(own)) for own in seconds]


def synchronize(device) -> None:
    """Wait until the device has done all it was given."""
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(call: dict):
    return next(value.device for value in call.values() if hasattr(value, "device"))


def _sample(output):
    return output[0] if isinstance(output, tuple) else output.sample

"""What training takes of a device's memory, reckoned before it starts, so that no run is cut off in the middle."""
from __future__ import annotations

from typing import Callable, NamedTuple

import psutil
import torch
from torch import nn

from pruning import UserError, distributed
from pruning.methods import muon
from pruning.methods.moments import hooked
from pruning.methods.probes import forget
from pruning.metrics.costs import most_allocated
from pruning.records.words import gigabytes


class Need(NamedTuple):
    """Bytes that training takes."""

    weights: int  # these three in float32
    gradients: int
    moments: int  # that the optimizer holds: two numbers a weight by AdamW, one by Muon
    activations: int = 0  # of the largest call, and what the backward pass takes beside gradients; or of Muon's step
    recomputed: bool = False  # whether activations are computed twice instead of kept

    @property
    def total(self) -> int:
        """All of them together."""
        return self.weights + self.gradients + self.moments + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "moments": self.moments,
                 f"activations{' with gradient checkpointing' * self.recomputed}": self.activations}
        return f"{gigabytes(self.total)} (" + ", ".join(
            f"{name} {gigabytes(size)}" for name, size in parts.items() if size) + ")"


def instead(device: torch.device) -> str:
    """Return what to do if training does not fit a device."""
    on_cpu = "--offload sequential, which trains on the CPU, " if device.type == "cuda" else ""
    return f"give {on_cpu}a device with more memory, or --recovery_steps 0"


def without_activations(denoiser: nn.Module, by_muon: bool = False) -> Need:
    """Return what training takes whatever the calls are, by Muon or by AdamW, which takes more."""
    numbers = sum(parameter.numel() for parameter in denoiser.parameters())
    return Need(4 * numbers, 4 * numbers, muon.held_bytes(denoiser) if by_muon else 8 * numbers)


def free_bytes(device: torch.device) -> int:
    """Return what this process may still take of a device, of which each process on it gets the same share.

    All processes call this together.
    """
    distributed.barrier()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        sharing = -(-distributed.local_size // torch.cuda.device_count())
    else:
        free, sharing = psutil.virtual_memory().available, distributed.local_size
    free = free // sharing
    distributed.barrier()  # nobody takes memory before all have looked
    return min(distributed.gather([free]))


def check_weights_fit(denoiser: nn.Module, device, held: int = 0, by_muon: bool = False) -> int:
    """Return what training may take of a device. Raises UserError if it needs more even without activations.

    held: what the denoiser takes of the device already. by_muon: as without_activations'. All processes call this
    together.
    """
    device = torch.device(device)
    need, free = without_activations(denoiser, by_muon), free_bytes(device) + held
    if need.total > free:
        raise UserError(f"recovery needs {need} and activations on {device}, which has {gigabytes(free)} for it: "
                        f"{instead(device)}")
    return free


def activations(denoiser: nn.Module, backward: Callable[[int], None], latents: int) -> int:
    """Return the most bytes that a call of so many latents takes in training, beside weights and gradients.

    backward(n): computes the gradients of a call of n latents. Calls of one and of two latents are measured, and what
    the second adds, each further latent adds. Gradients are dropped as soon as they are there.
    """
    device = next(denoiser.parameters()).device
    with hooked(parameter.register_post_accumulate_grad_hook(forget) for parameter in denoiser.parameters()):
        first, *second = (most_allocated(lambda count=count: backward(count), device)
                          for count in range(1, min(latents, 2) + 1))
    return first + (latents - 1) * max(0, sum(second) - first) if second else first

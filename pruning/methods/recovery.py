"""Recovery: the weights that are left learn to answer as the dense denoiser did. A step that any method can use."""
from __future__ import annotations

import hashlib
import math
import random
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import UserError, whole_file
from pruning.methods.calibration import Calibration, Call, answer, match
from pruning.progress import tqdm

CALLS_PER_STEP = 4
LEARNING_RATE = 3e-4
WARMUP_STEPS = 10
GRADIENT_NORM = 1.0


def recover(denoiser: nn.Module, weights: Dict[str, Tensor], calls: Sequence[Call], steps: int, seed: str,
            bar: Optional[tqdm] = None) -> None:
    """Train the denoiser for some steps, in place, to answer `calls` as the dense denoiser did (mean squared error).

    weights: parameters by name whose zeros stay zero; {} if units were removed and no zeros stand for them. All
    other parameters are trained, in float32, by AdamW with warm-up and cosine decay. Afterwards the dtypes are as
    before. seed: decides which calls a step takes. bar: a progress bar that moves by one with each step.
    Raises UserError if the loss is not finite.
    """
    generator = random.Random(seed)
    with full_precision(denoiser, weights), torch.enable_grad():
        masks = {name: weight == 0 for name, weight in weights.items()}
        parameters = list(denoiser.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2)
        for _ in range(steps):
            chosen = generator.sample(list(calls), min(CALLS_PER_STEP, len(calls)))
            mean = 0.0
            for kwargs, target in chosen:
                loss = distillation_loss(denoiser, kwargs, target) / len(chosen)
                loss.backward()
                mean += loss.item()
            if not math.isfinite(mean):
                raise UserError("the loss of the recovery is not finite; the recorded calls or the denoiser hold NaN "
                                "or infinity (record in float32, or use recovery_steps=0)")
            nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            restore_zeros(weights, masks)
            if bar is not None:
                bar.set_postfix(loss=f"{mean:.4g}", refresh=False)
                bar.update()


def recover_at(rate: float, denoiser: nn.Module, weights: Dict[str, Tensor], calibration: Optional[Calibration],
               steps: int) -> None:
    """Recover on the calibration's calls with a progress bar, if the rate is not 0 and there are steps to train."""
    if steps and rate:
        with tqdm(total=steps, desc="recovery", unit="step", leave=False) as bar:
            recover(denoiser, weights, calibration.calls, steps, f"{calibration.seed} {rate!r}", bar)


def distillation_loss(denoiser: nn.Module, kwargs: Dict[str, Any], target: Tensor) -> Tensor:
    """Return the mean squared error of denoiser(**kwargs) to the dense denoiser's sample, as a scalar tensor."""
    sample = answer(denoiser, kwargs)
    return F.mse_loss(sample, match(target, sample))


@contextmanager
def full_precision(denoiser: nn.Module, weights: Dict[str, Tensor]) -> Iterator[None]:
    """Make the denoiser float32 with gradients inside the block; afterwards its dtypes and flags are as before.

    The zeros in `weights` at the end of the block stay the only zeros in `weights`.
    """
    dtypes = [tensor.dtype for tensor in _tensors(denoiser)]
    flags = [parameter.requires_grad for parameter in denoiser.parameters()]
    denoiser.float().requires_grad_(True)
    try:
        yield
    finally:
        masks = {name: weight == 0 for name, weight in weights.items()}
        for parameter, flag in zip(denoiser.parameters(), flags):
            parameter.requires_grad_(flag)
        for tensor, dtype in zip(_tensors(denoiser), dtypes):
            tensor.data = tensor.data.to(dtype)
        restore_zeros(weights, masks)


@torch.no_grad()
def restore_zeros(weights: Dict[str, Tensor], masks: Dict[str, Tensor]) -> None:
    """Make the weights in the masks zero, in place, and no others.

    Another weight that training or rounding made zero becomes the least normal number, so that counts stay exact.
    """
    for name, weight in weights.items():
        weight.masked_fill_(weight == 0, torch.finfo(weight.dtype).tiny).masked_fill_(masks[name], 0)


def provenance_hash(denoiser: nn.Module, calls: Sequence[Call], *settings) -> str:
    """Return a hash of all that decides a recovery.

    These are the settings of the method and of this file, and of each parameter of the dense denoiser and each
    target the name, dtype, shape and some values.
    """
    own = (len(calls), CALLS_PER_STEP, LEARNING_RATE, WARMUP_STEPS, GRADIENT_NORM)
    digest = hashlib.sha256(repr((settings, own)).encode())
    for name, tensor in chain(denoiser.named_parameters(), (("target", target) for _, target in calls)):
        values = tensor.detach().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values[::max(1, len(values) // 256)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(denoiser: nn.Module, path: Optional[Path], provenance: str, rate: float) -> None:
    """Write the denoiser's parameters at `rate` to `path`, whole or not at all; do nothing if `path` is None.

    The optimizer starts afresh with each recovery, so the parameters are the whole state. Raises UserError if the
    file cannot be written.
    """
    if path is None:
        return
    state = {name: parameter.detach().contiguous() for name, parameter in denoiser.named_parameters()}
    with whole_file(path) as part:
        try:
            save_file(state, part, metadata={"provenance": provenance, "rate": repr(rate)})
        except SafetensorError as error:  # also raised if the disk is full
            raise OSError(str(error)) from error


@torch.no_grad()
def load_checkpoint(denoiser: nn.Module, path: Optional[Path], provenance: str, rate: float) -> float:
    """Load the checkpoint at `path` into the denoiser and return its rate.

    Return 0.0 and load nothing if there is no checkpoint, or if its provenance differs or its rate is above `rate`.
    """
    if path is None:
        return 0.0
    try:
        with safe_open(path, "pt") as file:
            saved = file.metadata() or {}
            if saved.get("provenance") != provenance or float(saved["rate"]) > rate:
                return 0.0
            for name, parameter in denoiser.named_parameters():
                parameter.copy_(file.get_tensor(name))
            return float(saved["rate"])
    except (OSError, SafetensorError):  # no file, or not a whole safetensors file
        return 0.0


def _tensors(denoiser: nn.Module) -> Iterator[Tensor]:
    return chain(denoiser.parameters(), denoiser.buffers())

"""Gradual magnitude pruning (Zhu & Gupta, 2017, arXiv:1710.01878) with recovery by self-distillation.

From one rate of the grid to the next the mask grows on the present weights; then the kept weights learn
to answer as the dense denoiser did, on calls recorded while it made images.
"""
from __future__ import annotations

import hashlib
import math
import random
from itertools import chain
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pruning import UserError, whole_file
from pruning.methods import METHODS, Pruned, magnitude

Call = Tuple[dict, Tensor]  # the keyword arguments of a denoiser call, and the sample that it answered

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RECOVERY_STEPS = METHODS["iterative"].options["recovery_steps"]  # at each rate of the walk
CALLS_PER_STEP = 4
LEARNING_RATE = 3e-4
WARMUP_STEPS = 10
GRADIENT_NORM = 1.0


def prune(denoiser: nn.Module, rate: float, scope: str = "layer", recovery_steps: int = RECOVERY_STEPS,
          calls: Optional[Sequence[Call]] = None, checkpoint: Optional[Path] = None, seed: int = 0) -> Pruned:
    """Walk up GRID to `rate`: at each rate zero the lowest |w|, then train the kept weights; in place.

    `calls` holds (keyword arguments, sample) of the dense denoiser; recovery runs in float32. The walk is
    seeded a rate at a time, so it takes the same steps whether it starts at the dense denoiser or goes on
    from the file `checkpoint`, which holds the last rate of the grid and is ignored where it is of another
    walk. Without recovery this is magnitude pruning.

    Raises UserError as magnitude.prune does, for recovery without calls, and where the loss is not finite.
    """
    magnitude.check_request(rate, scope)
    if recovery_steps < 0:
        raise UserError(f"recovery_steps is a whole number, 0 or more; got {recovery_steps}")
    if recovery_steps == 0 or rate == 0:
        return magnitude.prune(denoiser, rate, scope)
    if not calls:
        raise UserError("recovery needs recorded calls of the dense denoiser; give some, or recovery_steps=0")
    weights = magnitude.prunable_weights(denoiser)
    rate = next((known for known in GRID if math.isclose(rate, known)), rate)  # 3 * 0.1 is the grid's 0.3
    walk = [known for known in GRID if known < rate] + [rate]
    dtypes = [tensor.dtype for tensor in _tensors(denoiser)]
    flags = [parameter.requires_grad for parameter in denoiser.parameters()]
    identity = _identity(denoiser, scope, recovery_steps, calls, seed) if checkpoint else ""

    denoiser.float().requires_grad_(True)
    if checkpoint:
        reached = _load(denoiser, Path(checkpoint), identity, rate)
        walk = [step for step in walk if step > reached]
    with tqdm(total=len(walk) * recovery_steps, unit="step") as bar:
        for step in walk:
            bar.set_description(f"recovery at {step:.4g}")
            magnitude.zero_share(weights, step, scope)
            _recover(denoiser, weights, calls, recovery_steps, random.Random(f"{seed} {step!r}"), bar)
            if checkpoint and step in GRID:
                _save(denoiser, Path(checkpoint), identity, step)

    masks = {name: weight == 0 for name, weight in weights.items()}
    for parameter, flag in zip(denoiser.parameters(), flags):
        parameter.requires_grad_(flag)
    for tensor, dtype in zip(_tensors(denoiser), dtypes):
        tensor.data = tensor.data.to(dtype)
    _enforce(weights, masks)
    return magnitude.report(denoiser, weights, rate)


@torch.enable_grad()
def _recover(denoiser: nn.Module, weights: Dict[str, Tensor], calls: Sequence[Call], steps: int,
             generator: random.Random, bar: tqdm) -> None:
    """Train all parameters but the pruned weights to answer the calls as the dense denoiser did (MSE)."""
    masks = {name: weight == 0 for name, weight in weights.items()}
    parameters = list(denoiser.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2)
    for _ in range(steps):
        chosen = generator.sample(list(calls), min(CALLS_PER_STEP, len(calls)))
        mean = 0.0
        for kwargs, target in chosen:
            loss = distillation_loss(denoiser, kwargs, target) / len(chosen)
            loss.backward()
            mean += loss.item()
        if not math.isfinite(mean):
            raise UserError("the loss of the recovery is not finite; the recorded calls or the denoiser hold NaN or "
                            "infinity (record in float32, or use recovery_steps=0)")
        nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        _enforce(weights, masks)
        bar.set_postfix(loss=f"{mean:.4g}", refresh=False)
        bar.update()


def distillation_loss(denoiser: nn.Module, kwargs: dict, target: Tensor) -> Tensor:
    """Mean squared error of denoiser(**kwargs) to the sample that the dense denoiser gave."""
    like = next(denoiser.parameters())
    answer = denoiser(**_match(kwargs, like))
    return F.mse_loss(answer[0] if isinstance(answer, tuple) else answer.sample, _match(target, like))


def _match(value, like: Tensor):
    """Tensors, also nested ones, on the device of `like`, floating ones in its dtype; other values as they are."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: _match(item, like) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_match(item, like) for item in value)
    return value


@torch.no_grad()
def _enforce(weights: Dict[str, Tensor], masks: Dict[str, Tensor]) -> None:
    """Zero the weights in the masks and no others: where a kept one met zero it becomes the least normal number."""
    for name, weight in weights.items():
        weight.masked_fill_(weight == 0, torch.finfo(weight.dtype).tiny).masked_fill_(masks[name], 0)


def _tensors(denoiser: nn.Module) -> Iterator[Tensor]:
    return chain(denoiser.parameters(), denoiser.buffers())


def _identity(denoiser: nn.Module, scope: str, recovery_steps: int, calls: Sequence[Call], seed: int) -> str:
    """What a walk depends on: its settings, and a hash of some values of every dense parameter and target."""
    settings = (scope, recovery_steps, seed, len(calls),
                GRID, CALLS_PER_STEP, LEARNING_RATE, WARMUP_STEPS, GRADIENT_NORM)
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in chain(denoiser.named_parameters(), (("target", target) for _, target in calls)):
        values = tensor.detach().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values[::max(1, len(values) // 256)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _save(denoiser: nn.Module, path: Path, identity: str, rate: float) -> None:
    """Write the walk's state whole or not at all. The optimizer starts afresh at each rate, so this is all of it."""
    state = {name: parameter.detach().contiguous() for name, parameter in denoiser.named_parameters()}
    with whole_file(path) as part:
        try:
            save_file(state, part, metadata={"walk": identity, "rate": repr(rate)})
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error


@torch.no_grad()
def _load(denoiser: nn.Module, path: Path, identity: str, rate: float) -> float:
    """Load the state of this walk if `path` holds it at `rate` or below; return its rate, 0 where it does not."""
    try:
        with safe_open(path, "pt") as file:
            saved = file.metadata() or {}
            if saved.get("walk") != identity or float(saved["rate"]) > rate:
                return 0.0
            for name, parameter in denoiser.named_parameters():
                parameter.copy_(file.get_tensor(name))
            return float(saved["rate"])
    except (OSError, SafetensorError):  # no file, or no whole safetensors file
        return 0.0

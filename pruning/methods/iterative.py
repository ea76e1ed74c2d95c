"""Gradual magnitude pruning (Zhu & Gupta, 2017, arXiv:1710.01878) with recovery by self-distillation."""
from __future__ import annotations

import math
from typing import Dict, List, Optional

from torch import Tensor, nn

from pruning import UserError, distributed
from pruning.methods import Pruned, magnitude, recovery, zeroing
from pruning.methods.calibration import Calibration
from pruning.progress import status, tqdm

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def prune(denoiser: nn.Module, rate: float, *, scope: str, recovery_steps: int,
          calibration: Optional[Calibration] = None) -> Pruned:
    """Prune through the schedule up to `rate`, in place: zero the lowest |w|, then train the other weights.

    Without recovery steps this is magnitude pruning. With calibration.checkpoint, pruning starts from the checkpoint
    if the checkpoint fits, with the same result bit for bit. All processes call this together.

    Raises UserError as magnitude does, for recovery without calls, and if the loss is not finite.
    """
    weights = zeroing.prunable_weights(denoiser)
    if rate == 0 or recovery_steps == 0:
        zeroing.zero_lowest(weights, rate, magnitude.score, scope)
    elif calibration is None or not calibration.calls:
        raise UserError("recovery needs recorded calls of the dense denoiser; give some, or recovery_steps=0")
    else:
        rates = schedule(rate)
        prune_gradually(denoiser, weights, rates, scope, recovery_steps, calibration)
        rate = rates[-1]
    return zeroing.report(denoiser, weights, rate, method="iterative")


def prune_gradually(denoiser: nn.Module, weights: Dict[str, Tensor], rates: List[float], scope: str,
                    recovery_steps: int, calibration: Calibration) -> None:
    """At each of the ascending rates above the checkpoint's, zero, recover, and keep a rate of RATES as checkpoint."""
    checkpoint = calibration.checkpoint
    provenance = recovery.provenance_hash(denoiser, calibration, scope, recovery_steps, RATES)
    with recovery.training(denoiser, weights, calibration) as memory:
        status(memory)
        reached = recovery.load_checkpoint(denoiser, checkpoint, provenance, rates[-1])
        rates = [rate for rate in rates if rate > reached]
        with tqdm(total=len(rates) * recovery_steps, unit="step", disable=not distributed.is_main) as bar:
            for rate in rates:
                bar.set_description(f"recovery at {rate:.4g}")
                zeroing.zero_lowest(weights, rate, magnitude.score, scope)
                recovery.recover(denoiser, weights, calibration, recovery_steps, f"{calibration.seed} {rate!r}", bar)
                if rate in RATES:
                    recovery.save_checkpoint(denoiser, checkpoint, provenance, rate)


def schedule(rate: float) -> List[float]:
    """Return the rates of RATES below `rate`, then `rate`; a rate next to one of RATES, as 3 * 0.1 is, becomes it."""
    rate = next((known for known in RATES if math.isclose(rate, known)), rate)
    return [known for known in RATES if known < rate] + [rate]

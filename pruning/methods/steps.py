"""Draw in fewer steps: what a user could do instead of pruning, with any model and without preparation."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from pruning.methods import METHODS, Pruned


def plan(rate: float, steps: int, magnitudes: Optional[Sequence[float]] = None) -> Pruned:
    """Leave out round(rate * steps) of the steps of a drawing, but for one. Rate 0 leaves out none."""
    left_out = min(round(rate * steps), steps - 1)
    drawing = {"num_inference_steps": steps - left_out} if left_out else {}
    return Pruned(METHODS["steps"].unit, steps, left_out, left_out, drawing=drawing)


def timed(denoiser, pruned: Pruned, share: float) -> Tuple[list, List[float]]:
    """Return no denoiser to time beside dense: a drawing makes this share of dense's calls, all equal to them."""
    return [], [share]


@contextmanager
def drawing(denoiser, pruned: Pruned, sampling: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """Yield the settings with which to draw during the block: those of `sampling`, in fewer steps."""
    yield {**sampling, "steps": pruned.total - pruned.taken}

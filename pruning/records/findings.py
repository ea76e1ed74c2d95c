"""What a record says: numbers relative to dense, how sure they are, how far a method holds, what it saves. No torch."""
from __future__ import annotations

import math
from typing import Dict, List, NamedTuple, Sequence

import numpy as np

from pruning import check_name
from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.metrics.intervals import by_sample, mean_interval
from pruning.records.record import Point, Record

ARROWS = {"higher": "↑", "lower": "↓"}
COST = "generation_time"  # what pruning should save; every other metric is about quality
QUALITY = "clip_score"  # which decides how far a model can be pruned
TOLERANCE, COLLAPSED = 0.05, 0.5  # shares of the dense model's: what may be lost, and what is left of a ruin
# Metrics of which a share of dense says nothing: two are about 0 for a good model, one is infinite for the dense.
WITHOUT_SHARE = ("kid", "cmmd", "psnr_dense")


class Cost(NamedTuple):
    """How a figure of what a denoiser costs is shown: a field of Point, and the one with dense's value beside it."""

    title: str
    unit: str
    scale: float
    dense: str  # of the same point for a time, as both were taken in turn; else of the dense point


COSTS = {
    "parameters": Cost("parameters", "million", 1e-6, ""),
    "weight_bytes": Cost("weights on disk", "MB", 1e-6, ""),
    "peak_bytes": Cost("peak memory, one image", "MB", 1e-6, ""),
    "macs": Cost("multiply-accumulates a call", "billion, one latent", 1e-9, ""),
    "denoiser_seconds": Cost("time of a denoiser call", "ms, a batch", 1e3, "dense_denoiser_seconds"),
    "image_seconds": Cost("time of an image", "s", 1, "dense_image_seconds"),
}


def rate_folder(rate: float) -> str:
    """The folder of a rate's images, 'dense' for 0."""
    return f"{rate:.4g}" if rate else "dense"


def relative(metric: str, value: float | None, dense: float | None) -> float:
    """A value relative to the dense model's, up is better and dense is 1; NaN where that says nothing."""
    if value is None or dense is None or metric in WITHOUT_SHARE:
        return math.nan
    if metric == "lpips_dense":  # the distance to the dense model's image, which is 0 for dense
        return 1 - value
    if metric == "ssim_dense":  # a likeness to it, which is 1 for dense
        return value
    if METRICS[metric].better == "higher":
        return value / dense if dense > 0 else math.nan
    return dense / value if dense > 0 and value > 0 else math.nan


def relative_curve(record: Record, metric: str) -> List[float]:
    """A metric relative to the dense model at dense and at each rate."""
    return [relative(metric, point.metrics[metric], record.dense.metrics[metric]) for point in all_points(record)]


def formula(metric: str) -> str:
    """How relative() comes to its number, as a label."""
    if metric in ("lpips_dense", "ssim_dense"):
        return {"lpips_dense": "1 − lpips_dense", "ssim_dense": "ssim_dense"}[metric]
    return f"{metric} ÷ dense" if METRICS[metric].better == "higher" else f"dense ÷ {metric}"


def interval(metric: str, point: Point, dense: Point) -> tuple:
    """The ends of a metric's 95 % interval in its own unit, NaN where there is none.

    Of a paired difference it is dense's mean and the difference: the band says how sure the distance to dense is.
    """
    ends, base = point.intervals.get(metric), 0.0
    if METRICS[metric].interval == "difference":
        base = dense.metrics[metric]
    return (math.nan, math.nan) if ends is None or base is None else (base + ends[0], base + ends[1])


def relative_interval(metric: str, point: Point, dense: Point) -> tuple:
    """The ends of an interval, low and high, relative to the dense model as relative() has it."""
    low, high = sorted(relative(metric, end, dense.metrics[metric]) for end in interval(metric, point, dense))
    return low, high


def metrics_of(record: Record) -> List[str]:
    """The metrics of a record in the order of METRICS."""
    for name in record.dense.metrics:
        check_name("metric", name, METRICS)
    return [name for name in METRICS if name in record.dense.metrics]


def all_points(record: Record) -> List[Point]:
    """Dense and the rates."""
    return [record.dense, *record.points]


def values_of(record: Record, metric: str) -> np.ndarray:
    """A metric at the dense model and at each rate; NaN where it was not finite."""
    return np.array([math.nan if p.metrics[metric] is None else p.metrics[metric] for p in all_points(record)])


def saved_share(point: Point, dense: Point) -> float:
    """The share of the dense model's parameters that a point has removed or zeroed."""
    return 1 - point.nonzero_parameters / dense.nonzero_parameters if dense.nonzero_parameters else 0.0


def removes(record: Record) -> bool:
    """Whether the denoiser really shrank at any rate."""
    return any(point.parameters < record.dense.parameters for point in record.points)


def holds(point: Point, dense: Point, tolerance: float) -> bool | None:
    """Whether QUALITY is surely not worse than dense by more than the tolerance; None where that cannot be said.

    Decided on the interval of the paired differences and not on their mean: a rate that might be worse does not hold.
    """
    score, ends = dense.metrics.get(QUALITY), point.intervals.get(QUALITY)
    if score is None or score <= 0 or ends is None:
        return None
    return ends[0] >= -tolerance * score


def last_good(record: Record, tolerance: float = TOLERANCE) -> Point | None:
    """The point of the highest rate that holds, as all lower ones measured do."""
    good = None
    for point in record.points:
        if not holds(point, record.dense, tolerance):
            break
        good = point
    return good


def dense_cost(name: str, point: Point, dense: Point) -> float:
    """What the dense model costs where `point` costs getattr(point, name)."""
    return getattr(point, COSTS[name].dense) if COSTS[name].dense else getattr(dense, name)


def images_of(record: Record) -> int:
    """How many images were made at each rate."""
    return len(record.samples) * record.settings["seeds"]


def fid_is_empty(record: Record) -> bool:
    """Whether there are fewer images than FID's features, so that it estimates a covariance that it cannot."""
    return images_of(record) < record.notes.get("fid_feature_size", 0)


def left_out(record: Record) -> str:
    """A sentence on the modules that the method did not know how to prune, "" if there are none."""
    modules = record.notes.get("left_out") or {}
    reasons: Dict[str, List[str]] = {}
    for name, why in modules.items():
        reasons.setdefault(why, []).append(name)
    parts = [f"{counted(len(names), 'module')} ({names[0]}{', …' if len(names) > 1 else ''}), as {why}"
             for why, names in reasons.items()]
    return f"Left out: {'; '.join(parts)}." if parts else ""


def counted(count: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_order(records: Sequence[Record]) -> List[Record]:
    """By method as METHODS lists them, others after those."""
    order = list(METHODS)
    return sorted(records, key=lambda r: (order.index(r.method) if r.method in order else len(order), r.method))


def winners(measured: Sequence[tuple]) -> List[Record]:
    """Of (record, point) at one rate: the record of the highest QUALITY first, then those not surely below it.

    A method is surely below where the 95 % interval of its paired differences to the best lies below 0.
    """
    finite = [(record, point) for record, point in measured if point.metrics[QUALITY] is not None]
    if not finite:
        return []
    best, top = max(finite, key=lambda pair: pair[1].metrics[QUALITY])
    found, seeds = [best], best.settings["seeds"]
    for record, point in finite:
        if record is not best:
            ends = mean_interval(by_sample(point.per_image[QUALITY], seeds) - by_sample(top.per_image[QUALITY], seeds))
            if ends is None or ends[1] >= 0:
                found.append(record)
    return found

"""What a record says: values relative to dense, their intervals, how far a variant holds, what it saves. No torch."""
from __future__ import annotations

import math
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np

from pruning import check_name
from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.metrics.intervals import by_sample, mean_interval
from pruning.records.record import Point, Record

QUALITY = "clip_score"  # the metric that decides how far a model can be pruned
SIMILARITY = "lpips_dense"  # the metric that shows beside it how far images move from those of the dense model
TOLERANCE = 0.05  # the share of the dense model's QUALITY that may be lost
COLLAPSED = 0.5  # QUALITY has collapsed below this share of the dense model's
ARROWS = {"higher": "↑", "lower": "↓"}


class Cost(NamedTuple):
    """How figures and tables show what a denoiser costs, a field of Point."""

    title: str
    unit: str
    scale: float  # from the field's unit to the unit shown
    dense: str = ""  # the field of the same point that holds dense's value, "" if the dense point holds it


COSTS = {
    "parameters": Cost("parameters", "million", 1e-6),
    "weight_bytes": Cost("weights on disk", "MB", 1e-6),
    "peak_bytes": Cost("peak memory, one image", "MB", 1e-6),
    "macs": Cost("multiply-accumulates per call", "billion, one latent", 1e-9),
    "denoiser_seconds": Cost("time of a denoiser call", "ms, a batch", 1e3, "dense_denoiser_seconds"),
    "image_seconds": Cost("time of an image", "s", 1, "dense_image_seconds"),
}


# ---- metrics

def metrics_of(*records: Record) -> List[str]:
    """Return the metrics that all records have, in the order of METRICS. Raises UserError for an unknown metric."""
    for record in records:
        for name in record.dense.metrics:
            check_name("metric", name, METRICS)
    return [name for name in METRICS if all(name in record.dense.metrics for record in records)]


def relative_metrics(record: Record) -> List[str]:
    """Return the metrics about quality that have a value relative to dense."""
    return [name for name in metrics_of(record) if METRICS[name].relative and not METRICS[name].cost]


def paired_metrics(metrics: Sequence[str]) -> List[str]:
    """Return those metrics whose interval is that of the paired difference to dense."""
    return [name for name in metrics if METRICS[name].interval == "difference"]


def relative(metric: str, value: float | None, dense: float | None) -> float:
    """Return a value relative to the dense model: higher is better and dense is 1. NaN if there is no such value."""
    entry = METRICS[metric]
    if value is None or dense is None or not entry.relative:
        return math.nan
    if entry.relative == "1 - value":
        return 1 - value
    if entry.relative == "value":
        return value
    if entry.better == "higher":
        return value / dense if dense > 0 else math.nan
    return dense / value if dense > 0 and value > 0 else math.nan


def formula(metric: str) -> str:
    """Return a label that says how relative() computes its value."""
    entry = METRICS[metric]
    if entry.relative == "1 - value":
        return f"1 − {metric}"
    if entry.relative == "value":
        return metric
    return f"{metric} ÷ dense" if entry.better == "higher" else f"dense ÷ {metric}"


def relative_curve(record: Record, metric: str) -> List[float]:
    """Return a metric relative to the dense model, at dense and at each rate."""
    return [relative(metric, point.metrics[metric], record.dense.metrics[metric]) for point in all_points(record)]


def values_of(record: Record, metric: str) -> np.ndarray:
    """Return a metric at dense and at each rate, float (1 + rates,); NaN if it was not finite."""
    return np.array([math.nan if p.metrics[metric] is None else p.metrics[metric] for p in all_points(record)], float)


def interval(metric: str, point: Point, dense: Point) -> Tuple[float, float]:
    """Return the ends of a metric's 95 % interval in the metric's unit, NaN if there is none.

    For a paired difference, both ends are dense's value plus the end of the difference.
    """
    ends, base = point.intervals.get(metric), 0.0
    if METRICS[metric].interval == "difference":
        base = dense.metrics[metric]
    return (math.nan, math.nan) if ends is None or base is None else (base + ends[0], base + ends[1])


def relative_interval(metric: str, point: Point, dense: Point) -> Tuple[float, float]:
    """Return the ends of a metric's 95 % interval relative to dense, the lower one first."""
    low, high = sorted(relative(metric, end, dense.metrics[metric]) for end in interval(metric, point, dense))
    return low, high


def feature_size(record: Record, metric: str) -> int:
    """Return how many features a metric's network gives, 0 if the record does not say."""
    return record.notes.feature_sizes.get(METRICS[metric].backbone or "", 0)


def unreliable(record: Record, metric: str) -> bool:
    """Return whether a metric is biased for few images and there are fewer images than features."""
    return METRICS[metric].biased and images_of(record) < feature_size(record, metric)


def floor(record: Record, metric: str) -> float | None:
    """Return a metric's value for a set of as many real images, None if it was not measured."""
    return record.dense.floors.get(metric) if METRICS[metric].against == "reference" else None


# ---- points

def all_points(record: Record) -> List[Point]:
    """Return dense and the points of all rates."""
    return [record.dense, *record.points]


def images_of(record: Record) -> int:
    """Return how many images were generated at each rate."""
    return len(record.samples) * record.settings["seeds"]


def saved_share(point: Point, dense: Point) -> float:
    """Return the share of the dense model's parameters that a point has removed or zeroed."""
    return 1 - point.nonzero_parameters / dense.nonzero_parameters if dense.nonzero_parameters else 0.0


def removes(record: Record) -> bool:
    """Return whether the denoiser became smaller at any rate."""
    return any(point.parameters < record.dense.parameters for point in record.points)


def dense_cost(name: str, point: Point, dense: Point) -> float:
    """Return what the dense model costs, to compare with getattr(point, name)."""
    return getattr(point, COSTS[name].dense) if COSTS[name].dense else getattr(dense, name)


def holds(point: Point, dense: Point, tolerance: float) -> bool | None:
    """Return whether a point's QUALITY is within the tolerance of dense, None if that cannot be decided.

    The lower end of the 95 % interval of the paired differences decides, so a rate that may be worse does not hold.
    """
    score, ends = dense.metrics.get(QUALITY), point.intervals.get(QUALITY)
    if score is None or score <= 0 or ends is None:
        return None
    return ends[0] >= -tolerance * score


def last_good(record: Record, tolerance: float = TOLERANCE) -> Point | None:
    """Return the point of the highest rate at which it and all lower rates hold, None if there is none."""
    good = None
    for point in record.points:
        if not holds(point, record.dense, tolerance):
            break
        good = point
    return good


def winners(measured: Sequence[Tuple[Record, Point]]) -> List[Record]:
    """Return the record of the highest QUALITY at one rate, followed by the records that may be as good.

    A record is worse if the 95 % interval of its paired differences to the best lies below 0. Records that were
    measured on different samples have no such interval.
    """
    finite = [(record, point) for record, point in measured if point.metrics[QUALITY] is not None]
    if not finite:
        return []
    best, top = max(finite, key=lambda pair: pair[1].metrics[QUALITY])
    found = [best]
    for record, point in finite:
        if record is not best:
            ends = _paired_interval(record, point, best, top)
            if ends is None or ends[1] >= 0:
                found.append(record)
    return found


def _paired_interval(record: Record, point: Point, other: Record, other_point: Point):
    """Return the 95 % interval of QUALITY's paired differences between two records, None if there are no pairs."""
    seeds = record.settings["seeds"]
    values = [each.per_image.get(QUALITY) for each in (point, other_point)]
    if None in values or record.samples != other.samples or seeds != other.settings["seeds"]:
        return None
    own, others = (by_sample(each, seeds) for each in values)
    return mean_interval(own - others)


# ---- records

def in_order(records: Sequence[Record]) -> List[Record]:
    """Sort records by method as METHODS lists them, other methods last, and by variant."""
    order = list(METHODS)
    return sorted(records, key=lambda r: (order.index(r.method) if r.method in order else len(order), r.variant))

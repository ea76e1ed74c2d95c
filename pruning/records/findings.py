"""What a record says: values relative to dense, their intervals, how far a variant holds, what it saves. No torch."""
from __future__ import annotations

import math
from typing import Callable, List, NamedTuple, Sequence, Tuple

import numpy as np

from pruning import check_name
from pruning.methods import BASELINES, METHODS
from pruning.metrics import METRICS
from pruning.metrics.intervals import by_sample, mean_interval, samples_needed
from pruning.records.record import Point, Record

QUALITY = "clip_score"  # the metric that decides how far a model can be pruned
SIMILARITY = "lpips_dense"  # the metric that shows beside it how far images move from those of the dense model
TOLERANCE = 0.05  # the share of the dense model's QUALITY that may be lost
COLLAPSED = 0.5  # QUALITY has collapsed below this share of the dense model's
ARROWS = {"higher": "↑", "lower": "↓"}


class Time(NamedTuple):
    """How figures and tables show a time, a field of Point: as a ratio to the time of dense."""

    title: str
    dense: str  # the field of the same point that holds dense's time


TIMES = {
    "denoiser_seconds": Time("time of a denoiser call", "dense_denoiser_seconds"),
    "image_seconds": Time("time of an image", "dense_image_seconds"),
}
SAME = 0.02  # ratios that differ less from 1 are no difference: two copies of one denoiser differ by as much
SECONDS = "generation_time"  # the metric that compares moments of the machine; figures show TIMES instead


# ---- metrics

def metrics_of(*records: Record) -> List[str]:
    """Return the metrics that all records have, in the order of METRICS. Raises UserError for an unknown metric."""
    for record in records:
        for name in record.dense.metrics:
            check_name("metric", name, METRICS)
    return [name for name in METRICS if all(name in record.dense.metrics for record in records)]


def drawn_metrics(*records: Record) -> List[str]:
    """Return the metrics that all records have and that figures show in their own units."""
    return [name for name in metrics_of(*records) if name != SECONDS]


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


def saved_parameters(point: Point, dense: Point) -> float:
    """Return the share of the dense model's parameters that a point has removed or zeroed."""
    return 1 - point.nonzero_parameters / dense.nonzero_parameters if dense.nonzero_parameters else 0.0


def saved_macs(point: Point, dense: Point) -> float:
    """Return the share of the dense model's multiply-accumulates that a point does without."""
    return 1 - point.macs / dense.macs if dense.macs else 0.0


def saved_time(point: Point, dense: Point) -> float:
    """Return the share of the dense model's time of an image that a point does without, NaN if it has no interval."""
    ratio, low, _ = time_ratio("image_seconds", point, dense)
    return 1 - ratio if math.isfinite(low) or not point.rate else math.nan


def saved_time_interval(point: Point, dense: Point) -> Tuple[float, float]:
    """Return the ends of the 95 % interval of saved_time(), NaN if the record has none."""
    _, low, high = time_ratio("image_seconds", point, dense)
    return 1 - high, 1 - low


GAP = 0.2  # of a rate or a share saved: between points further apart, a straight line would invent a curve
# By what methods are compared: its name -> its share of the dense model's.
SAVED = {"multiply-accumulates saved": saved_macs, "parameters removed or zeroed": saved_parameters,
         "image time saved": saved_time}


def saves(record: Record, what: str) -> bool:
    """Return whether a variant saves anything of one of SAVED, beyond what two copies of a denoiser differ by."""
    if SAVED[what] is saved_time and works_as_dense(record):
        return False
    return any(SAVED[what](point, record.dense) > SAME for point in record.points)


def removes(record: Record) -> bool:
    """Return whether the denoiser became smaller at any rate."""
    return any(point.parameters < record.dense.parameters for point in record.points)


def works_as_dense(record: Record) -> bool:
    """Return whether a variant does the same work as dense, as zeros do: then any difference in time is noise."""
    return not (removes(record) or is_baseline(record))


def time_ratio(name: str, point: Point, dense: Point) -> Tuple[float, float, float]:
    """Return one of TIMES as a ratio to dense's, and the ends of its 95 % interval, NaN if the record has none.

    Without an interval, the ratio of a masked denoiser is NaN too: it does the same work as dense, so any difference
    was noise.
    """
    low, high = point.ratio_intervals.get(name) or (math.nan, math.nan)
    if point.rate and math.isnan(low) and (point.parameters, point.macs) == (dense.parameters, dense.macs):
        return math.nan, low, high
    return getattr(point, name) / getattr(point, TIMES[name].dense), low, high


def same_time(name: str, point: Point, dense: Point) -> bool:
    """Return whether one of TIMES cannot be told from dense's: its interval comes within SAME of a ratio of 1."""
    _, low, high = time_ratio(name, point, dense)
    return low <= 1 + SAME and high >= 1 - SAME


def holds(point: Point, dense: Point, tolerance: float) -> bool | None:
    """Return whether a point's QUALITY is within the tolerance of dense, None if that cannot be decided.

    The 95 % interval of the paired differences decides: it lies above the limit, below it, or on both sides.
    """
    score, ends = dense.metrics.get(QUALITY), point.intervals.get(QUALITY)
    if score is None or score <= 0:
        return None
    if point.metrics[QUALITY] is None:
        return False
    if ends is None or ends[0] < -tolerance * score <= ends[1]:
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


def samples_to_decide(point: Point, record: Record, tolerance: float) -> float:
    """Return about how many samples would decide whether a point holds, NaN if its values of images do not say.

    For a point that holds() cannot decide.
    """
    values = [each.per_image.get(QUALITY) for each in (point, record.dense)]
    if None in values or point.intervals.get(QUALITY) is None:
        return math.nan
    own, others = (by_sample(each, record.settings["seeds"]) for each in values)
    return samples_needed(own - others, -tolerance * record.dense.metrics[QUALITY])


def losses(point: Point, dense: Point) -> np.ndarray | None:
    """Return how much QUALITY each image lost beside dense's of the same noise, as a share of dense's mean, (n,).

    An image that is not finite has lost all. None if the record lacks the values of the images.
    """
    score, values = dense.metrics.get(QUALITY), [each.per_image.get(QUALITY) for each in (point, dense)]
    if score is None or score <= 0 or None in values:
        return None
    own, others = (np.array(each, float) for each in values)
    return np.nan_to_num((others - own) / score, nan=1.0)


def failures(point: Point, dense: Point, tolerance: float) -> Tuple[int, float] | None:
    """Return how many images lost more QUALITY than the tolerance, and the largest loss; None if that is unknown."""
    lost = losses(point, dense)
    return None if lost is None else (int((lost > tolerance).sum()), float(lost.max()))


def worst_images(record: Record, count: int, tolerance: float = TOLERANCE) -> Tuple[Point | None, List[int]]:
    """Return the point of the answer, and the positions of the images that lose most there, the worst first.

    The point of the answer is that of last_good(), or of the lowest rate if none is good. (None, []) if unknown.
    """
    point = last_good(record, tolerance) or next(iter(record.points), None)
    lost = point and losses(point, record.dense)
    return (point, np.argsort(-lost, kind="stable")[:count].tolist()) if lost is not None else (None, [])


class Scored(NamedTuple):
    """QUALITY of a record at one share of what is saved: the mean, and the values of the images, (n,)."""

    record: Record
    mean: float
    values: np.ndarray | None


def at_saving(record: Record, share: Callable[[Point, Point], float], level: float) -> Scored | None:
    """Return QUALITY at which a share of dense is saved, None if the record does not say.

    share: one of SAVED. Between two measured points that are at most GAP apart, each image's value is interpolated
    linearly.
    """
    known = [point for point in all_points(record) if math.isfinite(share(point, record.dense))]
    points = sorted(known, key=lambda point: share(point, record.dense))
    shares = [share(point, record.dense) for point in points]
    for low, high, before, after in zip(shares, shares[1:], points, points[1:]):
        if low < level <= high <= low + GAP:
            weight = (level - low) / (high - low)
            mean = _between(before.metrics[QUALITY], after.metrics[QUALITY], weight)
            values = _between(before.per_image.get(QUALITY), after.per_image.get(QUALITY), weight)
            return Scored(record, math.nan if mean is None else float(mean), values)
    return None


def _between(left, right, weight: float) -> np.ndarray | None:
    """Return (1 - weight) * left + weight * right, None if one is None. None within a list counts as NaN."""
    if left is None or right is None:
        return None
    return (1 - weight) * np.array(left, float) + weight * np.array(right, float)


def winners(measured: Sequence[Scored]) -> List[Record]:
    """Return the record of the highest QUALITY at one saving, followed by the records that may be as good.

    A record is worse if the 95 % interval of its paired differences to the best lies below 0. Records that were
    measured on different samples have no such interval.
    """
    finite = [scored for scored in measured if math.isfinite(scored.mean)]
    if not finite:
        return []
    best = max(finite, key=lambda scored: scored.mean)
    found = [best.record]
    for scored in finite:
        if scored is not best:
            ends = _paired_interval(scored, best)
            if ends is None or ends[1] >= 0:
                found.append(scored.record)
    return found


def _paired_interval(scored: Scored, other: Scored):
    """Return the 95 % interval of QUALITY's paired differences between two records, None if there are no pairs."""
    records = (scored.record, other.record)
    seeds = [record.settings["seeds"] for record in records]
    if scored.values is None or other.values is None or records[0].samples != records[1].samples \
            or seeds[0] != seeds[1]:
        return None
    return mean_interval(by_sample(scored.values - other.values, seeds[0]))


# ---- records

def is_baseline(record: Record) -> bool:
    """Return whether a record is not of pruning, but of what a user could do instead."""
    return record.method in BASELINES


def named(record: Record) -> str:
    """Return 'magnitude pruning of shapes-unet', or of a baseline, which prunes nothing, 'steps on shapes-unet'."""
    return f"{record.variant} {'on' if is_baseline(record) else 'pruning of'} {record.model}"


def in_order(records: Sequence[Record]) -> List[Record]:
    """Sort records by method as METHODS lists them, other methods last, and by variant."""
    order = list(METHODS)
    return sorted(records, key=lambda r: (order.index(r.method) if r.method in order else len(order), r.variant))

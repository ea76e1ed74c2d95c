"""A record -> how far its model can be pruned and what that saves, in one or two sentences. No torch."""
from __future__ import annotations

import math
from typing import Sequence

from pruning.metrics import intervals
from pruning.records.findings import (
    QUALITY,
    TOLERANCE,
    failures,
    holds,
    images_of,
    interval,
    last_good,
    removes,
    same_time,
    samples_to_decide,
    saved_parameters,
    time_ratio,
)
from pruning.records.record import Point, Record
from pruning.records.words import counted, number

MOST_SAMPLES = 10_000  # beyond, the number of samples that would decide is not told


def answer(record: Record, tolerance: float = TOLERANCE) -> str:
    """Return how far the model can be pruned, in one or two sentences that begin with 'How far?'."""
    dense, begin = record.dense, f"How far? {record.variant} pruning of {record.model}"
    score = dense.metrics.get(QUALITY)
    if not record.points:
        return f"{begin}: no rate has been measured yet."
    if score is None or score <= 0:
        why = "was not measured" if QUALITY not in dense.metrics else f"of the dense model is {number(score)}"
        return f"{begin}: unknown, because {QUALITY} {why}."
    if len(record.samples) < intervals.MIN_SAMPLES:
        return (f"{begin}: unknown, because there are {counted(len(record.samples), 'sample')} and a 95 % interval "
                f"needs {intervals.MIN_SAMPLES}.")
    good = last_good(record, tolerance)
    beyond = next((point for point in record.points if not holds(point, dense, tolerance)), None)
    within = f"within {100 * tolerance:g} % of dense by {QUALITY}"
    has, decided = "", True
    if beyond:
        has, decided = share_of_dense(beyond, dense, tolerance), holds(beyond, dense, tolerance) is not None
    few = "" if decided else f"{counted(images_of(record), 'image')} are too few to decide"
    if few:
        has += f"; {needed(beyond, record, tolerance)} would decide"
    if good is None and few:
        return f"{begin}: {few} whether rate {beyond.rate:g} stays {within}. It has {has}."
    if good is None:
        return f"{begin}: no measured rate stays {within}; rate {beyond.rate:g} has {has}."
    text = (f"{begin} stays {within} up to rate {good.rate:g}, which has {share_of_dense(good, dense, tolerance)} and "
            f"{_saving(good, record)}.")
    if beyond is None:
        return f"{text} No higher rate was measured."
    if few:
        return f"{text} {few} on the next rate, {beyond.rate:g}: it has {has}."
    return f"{text} The next rate, {beyond.rate:g}, does not: it has {has}."


def needed(point: Point, record: Record, tolerance: float) -> str:
    """Return 'about 110': how many samples would decide whether a point holds."""
    count = samples_to_decide(point, record, tolerance)
    noun = "image" if record.settings["seeds"] == 1 else "caption"
    if not count <= MOST_SAMPLES:
        return f"more than {counted(MOST_SAMPLES, noun)}" if count > MOST_SAMPLES else "more"
    return f"about {counted(int(float(f'{count:.2g}')), noun)}"


def share_of_dense(point: Point, dense: Point, tolerance: float | None = None) -> str:
    """Return a point's QUALITY as '97.1 % of dense (95 % interval 95.9 to 98.3)', from the paired differences.

    With a tolerance, also how many images lost more, and the largest loss.
    """
    score, dense_score = point.metrics[QUALITY], dense.metrics[QUALITY]
    if score is None:
        return f"no finite {QUALITY}"
    low, high = interval(QUALITY, point, dense)
    known = [f"95 % interval {100 * low / dense_score:.1f} to {100 * high / dense_score:.1f}"] if low == low else []
    lost = tolerance is not None and failures(point, dense, tolerance)
    if lost:
        known.append(_failed(*lost, len(point.per_image[QUALITY]), f"{100 * tolerance:g} %"))
    ends = f" ({'; '.join(known)})" if known else ""
    return f"{100 * score / dense_score:.1f} % of dense{ends}".replace("-", "−")


def _failed(count: int, most: float, images: int, limit: str) -> str:
    """Return '4 of 32 images lose over 5 %, the worst 17 %'."""
    if not count:
        return f"no image loses over {limit}"
    return f"{count} of {counted(images, 'image')} {'loses' if count == 1 else 'lose'} over {limit}, " \
           f"the worst {100 * most:.0f} %"


def _saving(point: Point, record: Record) -> str:
    share = f"{100 * saved_parameters(point, record.dense):.1f} % of the parameters"
    if not removes(record):
        return f"{share} zero, which saves neither time nor space with dense kernels"
    return f"{share} removed; {time_beside_dense(point, record.dense)}"


def time_beside_dense(point: Point, dense: Point) -> str:
    """Return how long the denoiser takes beside dense, "" if the record does not say."""
    call, *call_ends = time_ratio("denoiser_seconds", point, dense)
    image, *image_ends = time_ratio("image_seconds", point, dense)
    if math.isnan(call):
        return ""
    if same_time("denoiser_seconds", point, dense):
        return f"no difference in time can be told: a denoiser call takes {_ends(call_ends)} times as long"
    if math.isnan(call_ends[0]):
        return (f"a denoiser call takes {call:.2f} times as long as dense, an image {image:.2f} times; this record "
                "does not say how sure these ratios are")
    return (f"a denoiser call takes {call:.2f} times as long as dense (95 % interval {_ends(call_ends)}), an image "
            f"{image:.2f} times ({_ends(image_ends)})")


def _ends(ends: Sequence[float]) -> str:
    return "{:.2f} to {:.2f}".format(*ends)

"""A record -> how far its model can be pruned and what that saves, in one or two sentences. No torch."""
from __future__ import annotations

import math
from typing import Dict, List, Sequence, Tuple

from pruning.methods import METHODS
from pruning.metrics import intervals
from pruning.records.findings import (
    QUALITY,
    SAME,
    TOLERANCE,
    failures,
    holds,
    images_of,
    interval,
    is_baseline,
    last_good,
    named,
    removes,
    same_time,
    samples_to_decide,
    saved_macs,
    saved_parameters,
    saved_time,
    time_ratio,
    works_as_dense,
)
from pruning.records.record import Point, Record
from pruning.records.words import counted, listed, number, percent

CALLS = "the denoiser's calls for an image together take"  # of a baseline, which makes other calls than dense
MOST_SAMPLES = 10_000  # beyond, the number of samples that would decide is not told
MOST_TRIED = 500  # beyond, a run with as many is not the next thing to try


def answer(record: Record, tolerance: float = TOLERANCE, with_failures: bool = True) -> str:
    """Return how far the model can be pruned, in one or two sentences that begin with 'How far?'.

    with_failures: also say how many images lose more than the tolerance.
    """
    dense, begin = record.dense, f"How far? {named(record)}"
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
    beyond = _beyond(record, tolerance)
    lost = tolerance if with_failures else None
    within = f"within {100 * tolerance:g} % of dense by {QUALITY}"
    has, decided = "", True
    if beyond:
        has, decided = share_of_dense(beyond, dense, lost), holds(beyond, dense, tolerance) is not None
    few = "" if decided else f"{counted(images_of(record), 'image')} are too few to decide"
    if few:
        has += f"; {needed(beyond, record, tolerance)} would decide"
    if good is None and few:
        return f"{begin}: {few} whether rate {beyond.rate:g} stays {within}. It has {has}."
    if good is None:
        return f"{begin}: no measured rate stays {within}; rate {beyond.rate:g} has {has}."
    text = (f"{begin} stays {within} up to rate {good.rate:g}, which has {share_of_dense(good, dense, lost)} and "
            f"{_saving(good, record)}.")
    if beyond is None:
        return f"{text} No higher rate was measured."
    if few:
        return f"{text} {few} on the next rate, {beyond.rate:g}: it has {has}."
    return f"{text} The next rate, {beyond.rate:g}, does not: it has {has}."


def brief(record: Record, tolerance: float = TOLERANCE) -> str:
    """Return the answer for a terminal: how far, what is saved, and what the next rate has, without intervals of times.

    The summary has the rest.
    """
    dense, good = record.dense, last_good(record, tolerance)
    if good is None or QUALITY not in dense.metrics:
        return answer(record, tolerance, with_failures=False)
    beyond = _beyond(record, tolerance)
    saved = "all weights as they were" if is_baseline(record) else \
        f"{100 * saved_parameters(good, dense):.1f} % of the parameters {'removed' if removes(record) else 'zero'}"
    call, *_ = time_ratio("denoiser_seconds", good, dense)
    time = "no difference in time" if math.isnan(call) or same_time("denoiser_seconds", good, dense) else \
        f"{CALLS if is_baseline(record) else 'a call takes'} {call:.2f} times as long"
    text = (f"How far? {named(record)} stays within {100 * tolerance:g} % of dense by "
            f"{QUALITY} up to rate {good.rate:g}: {share_of_dense(good, dense)}, {saved}, and {time}.")
    if beyond is None:
        return f"{text} No higher rate was measured."
    next_rate = f"The next rate, {beyond.rate:g}, has {_share(beyond, dense)}"
    few = "" if holds(beyond, dense, tolerance) is not None else \
        ", which needs more images"
    return f"{text} {next_rate}{few}."


def lead(records: Sequence[Record], tolerance: float = TOLERANCE) -> str:
    """Return what pruning can save within the tolerance, and whether a baseline saves more time, in a few sentences."""
    good = [(record, point) for record in records if not is_baseline(record)
            for point in [last_good(record, tolerance)] if point]
    if not good:
        return (answer(records[0], tolerance)[len("How far? "):] if len(records) == 1 else
                f"No measured rate of any variant is safely within {100 * tolerance:g} % of the dense {QUALITY}.")
    within = f"Within {100 * tolerance:g} % of the dense {QUALITY}"
    if len(records) == 1:
        (record, point), = good
        gains = listed([f"keeps {_share(point, record.dense)}", *(_gains(record, point) or ["saves nothing"])])
        return f"{within}, {record.variant} pruning goes up to rate {point.rate:g}. It {gains}."
    best: Dict[str, List[str]] = {}  # variant and rate -> what it saves most of
    for share in (saved_macs, saved_parameters):
        record, point = max(good, key=lambda pair, share=share: share(pair[1], pair[0].dense))
        best.setdefault(_at(record, point), []).extend(_gains(record, point, share))
    gains = [f"{which} {' and '.join(each)}" for which, each in best.items() if each]
    text = f"{within}, {'; '.join(gains) or 'no variant saves anything'}."
    return f"{text} {beside_baselines(records, tolerance)}".strip()


def _gains(record: Record, point: Point, *shares) -> List[str]:
    """Return 'saves 40 % of the multiply-accumulates' and 'removes 43 % of the parameters', if it does.

    shares: saved_macs, saved_parameters or both, which is the default.
    """
    words = {saved_macs: "saves {} of the multiply-accumulates",
             saved_parameters: "removes {} of the parameters" if removes(record) else
                               "zeroes {} of the parameters, which makes nothing smaller or faster"}
    found = {share: share(point, record.dense) for share in shares or words}
    return [words[share].format(percent(value)) for share, value in found.items() if value >= 0.005]


def beside_baselines(records: Sequence[Record], tolerance: float = TOLERANCE) -> str:
    """Return how much time the baselines save beside the fastest pruning, and what pruning alone gives if it is slower.

    "" if no baseline saves time within the tolerance.
    """
    good = [(record, point) for record in records for point in [last_good(record, tolerance)] if point]
    times = [(saved_time(point, record.dense), record, point) for record, point in good if not works_as_dense(record)]
    ranked = sorted((each for each in times if each[0] > SAME), key=lambda each: -each[0])
    fastest = next((each for each in ranked if not is_baseline(each[1])), None)
    shown = [each for each in ranked if each is fastest or is_baseline(each[1])]
    if shown in ([], [fastest]):
        return ""
    each_saves = listed([f"{_at(record, point)} saves {percent(time)}" for time, record, point in shown])
    text = f"Of the time of an image, {each_saves}{'' if fastest else '; pruning saves none'}."
    if shown[0] is fastest:
        return text
    text += " For time alone, pruning is not the best choice."
    smallest = max((pair for pair in good if removes(pair[0])), default=None,
                   key=lambda pair: saved_parameters(pair[1], pair[0].dense))
    if smallest is None:
        return text
    return (f"{text} Only pruning makes the model smaller: {_at(*smallest)} {_gains(*smallest, saved_parameters)[0]}. "
            "Both can be used together.")


def _at(record: Record, point: Point) -> str:
    return f"{record.variant} at rate {point.rate:g}"


def failed(record: Record, tolerance: float = TOLERANCE) -> str:
    """Return how many images fail at the rate of the answer, or at the lowest if none holds; "" if that is unknown."""
    point = last_good(record, tolerance) or next(iter(record.points), None)
    lost = point and failures(point, record.dense, tolerance)
    if not lost:
        return ""
    return f"Failures at rate {point.rate:g}: {_failed(*lost, images_of(record), f'{100 * tolerance:g} %')}."


def next_step(record: Record, tolerance: float = TOLERANCE, saved: bool = False) -> Tuple[str, Dict[str, List[str]]]:
    """Return what to try next, as its purpose and the flags that change; "" and {} if QUALITY says nothing.

    The first that applies of what follows.
    More images, if few more decide on a rate; lower or higher rates, if none or all hold; a saved model, if it is
    smaller and not `saved` yet; another method.
    """
    if not (record.dense.metrics.get(QUALITY) or 0) > 0:
        return "", {}
    if len(record.samples) < intervals.MIN_SAMPLES:
        return "for an answer", {"--num_images": ["32"], "--overwrite": []}
    rates, good = [point.rate for point in record.points], last_good(record, tolerance)
    undecided = _beyond(record, tolerance)
    more = samples_to_decide(undecided, record, tolerance) if undecided \
        and holds(undecided, record.dense, tolerance) is None else math.nan
    if len(record.samples) < more <= MOST_TRIED:
        return f"to decide on rate {undecided.rate:g}", {"--num_images": [str(math.ceil(more / 8) * 8)],
                                                         "--overwrite": []}
    if rates and good is None and rates[0] > 0.02:
        return "to find a rate that holds", {"--rates": [f"{rates[0] * share:.2g}" for share in (0.25, 0.5)]}
    if good and good.rate == rates[-1] < 0.9 and not is_baseline(record) and \
            not getattr(METHODS.get(record.method), "limited", False):
        higher = [rate / 10 for rate in range(1, 10) if rate / 10 > good.rate + 0.01]
        return "to find the rate that fails", {"--rates": [f"{rate:g}" for rate in higher[:3]]}
    if good and removes(record) and not saved:
        return "to keep the pruned model", {"--rates": [f"{good.rate:g}"], "--save_pruned": ["pruned"]}
    why = "to compare another method" if removes(record) else "for a smaller and faster model"
    return why, {"--method": ["joint" if record.method == "structured" else "structured"]}


def _beyond(record: Record, tolerance: float) -> Point | None:
    """Return the first point that does not hold, or of which that cannot be decided; None if all hold."""
    return next((point for point in record.points if not holds(point, record.dense, tolerance)), None)


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


def _share(point: Point, dense: Point) -> str:
    """Return a point's QUALITY as '97.1 %' of dense."""
    score = point.metrics[QUALITY]
    return "no finite value" if score is None else \
        f"{100 * score / dense.metrics[QUALITY]:.1f} %".replace("-", "−")


def _failed(count: int, most: float, images: int, limit: str) -> str:
    """Return '4 of 32 images lose over 5 %, the worst 17 %'."""
    if not count:
        return f"no image loses over {limit}"
    return f"{count} of {counted(images, 'image')} {'loses' if count == 1 else 'lose'} over {limit}, " \
           f"the worst {100 * most:.0f} %"


def _saving(point: Point, record: Record) -> str:
    if is_baseline(record):
        return time_beside_dense(point, record.dense, CALLS)
    share = f"{100 * saved_parameters(point, record.dense):.1f} % of the parameters"
    if not removes(record):
        return f"{share} zero, which saves neither time nor space with dense kernels"
    return f"{share} removed; {time_beside_dense(point, record.dense)}"


def time_beside_dense(point: Point, dense: Point, what: str = "a denoiser call takes") -> str:
    """Return how long the denoiser takes beside dense, "" if the record does not say."""
    call, *call_ends = time_ratio("denoiser_seconds", point, dense)
    image, *image_ends = time_ratio("image_seconds", point, dense)
    if math.isnan(call):
        return ""
    if same_time("denoiser_seconds", point, dense):
        return f"no difference in time can be told: {what} {_ends(call_ends)} times as long"
    if math.isnan(call_ends[0]):
        return (f"{what} {call:.2f} times as long as dense, an image {image:.2f} times; this record "
                "does not say how sure these ratios are")
    return (f"{what} {call:.2f} times as long as dense (95 % interval {_ends(call_ends)}), an image "
            f"{image:.2f} times ({_ends(image_ends)})")


def _ends(ends: Sequence[float]) -> str:
    return "{:.2f} to {:.2f}".format(*ends)

"""Records -> text that a stranger can read. No torch."""
from __future__ import annotations

import textwrap
from typing import List, Sequence

from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.metrics.intervals import FEWEST
from pruning.records.findings import (
    ARROWS,
    COLLAPSED,
    COSTS,
    QUALITY,
    TOLERANCE,
    all_points,
    counted,
    dense_cost,
    fid_is_empty,
    holds,
    images_of,
    in_order,
    interval,
    last_good,
    left_out,
    metrics_of,
    rate_folder,
    relative,
    removes,
    saved_share,
    winners,
)
from pruning.records.record import Point, Record

# ---- one record


def summary(record: Record, tolerance: float = TOLERANCE) -> str:
    """How far the method holds and what that saves, then the tables behind it."""
    parts = [_wrap(answer(record, tolerance)), _header(record), _metric_table(record), _legend(record),
             _cost_table(record), _wrap(_collapse(record)), _wrap(_gain(record, tolerance)),
             _wrap(_noise(record)), _wrap(left_out(record)), _wrap(fid_note(record))]
    return "\n\n".join(part for part in parts if part) + "\n"


def answer(record: Record, tolerance: float = TOLERANCE) -> str:
    """How far the model can be pruned, in one or two sentences."""
    dense, who = record.dense, f"{record.method} pruning of {record.model}"
    score = dense.metrics.get(QUALITY)
    if not record.points:
        return f"How far? {who}: no rate has been measured yet."
    if score is None or score <= 0:
        why = "was not measured" if QUALITY not in dense.metrics else f"of the dense model is {_number(score)}"
        return f"How far? {who}: it cannot be said, as {QUALITY} {why}."
    if len(record.samples) < FEWEST:
        return (f"How far? {who}: it cannot be said of {counted(len(record.samples), 'sample')}, an interval takes "
                f"{FEWEST} or more.")
    good = last_good(record, tolerance)
    beyond = next((point for point in record.points if not holds(point, dense, tolerance)), None)
    within = f"within {100 * tolerance:g} % of dense by {QUALITY}"
    if good is None:
        return f"How far? {who}: no rate measured stays surely {within}; {_doubt(beyond, dense)}."
    text = (f"How far? {who} stays {within} up to rate {good.rate:g}, which has {share_of_dense(good, dense)} and "
            f"{_saving(good, record)}.")
    return text + (f" Not surely at the next: {_doubt(beyond, dense)}." if beyond else " No higher rate was measured.")


def _doubt(point: Point, dense: Point) -> str:
    return f"rate {point.rate:g} has {share_of_dense(point, dense)}"


def share_of_dense(point: Point, dense: Point) -> str:
    """'97.1 % of dense (95 % interval 95.9 to 98.3)', by the paired differences."""
    score, dense_score = point.metrics[QUALITY], dense.metrics[QUALITY]
    if score is None:
        return f"no finite {QUALITY}"
    low, high = interval(QUALITY, point, dense)
    spread = f" (95 % interval {100 * low / dense_score:.1f} to {100 * high / dense_score:.1f})" if low == low else ""
    return f"{100 * score / dense_score:.1f} % of dense{spread}".replace("-", "−")


def _saving(point: Point, record: Record) -> str:
    share = f"{100 * saved_share(point, record.dense):.1f} % of the parameters"
    if not removes(record):
        return f"{share} zero, which saves neither time nor space with dense kernels"
    return f"{share} removed; {_time(point)}"


def _header(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    help_text = f" ({METHODS[record.method].help})" if record.method in METHODS else ""
    code = record.notes.get("code")
    return "\n".join([
        f"{record.method} pruning of {record.model}{help_text}",
        _wrap(f"{counted(images_of(record), 'image')} of {record.dataset} at every rate, {protocol(record)}, "
              f"on {record.settings['device']}; {versions}" + (f"; code {', '.join(code)}" if code else "")),
        f"A rate is the share of {record.dense.unit} asked for, sparsity the share reached."])


def protocol(record: Record) -> str:
    """The settings that every figure names."""
    settings, seeds = record.settings, record.settings["seeds"]
    return (f"seed {settings['seed']}{f' and {seeds - 1} more' if seeds > 1 else ''}, {settings['steps']} steps, "
            f"guidance {settings['guidance_scale']:g}")


def _metric_table(record: Record) -> str:
    metrics, dense = metrics_of(record), record.dense
    rows = [["rate", "sparsity", *(f"{name} {ARROWS[METRICS[name].better]}" for name in metrics)],
            ["", "", *(METRICS[name].unit for name in metrics)]]
    for point in all_points(record):
        rows.append([rate_folder(point.rate), f"{point.sparsity:.3f}", *(
            _number(point.metrics[name]) + _reach(name, point, dense) for name in metrics)])
    note = ("±: half the 95 % interval; of clip_score and lpips for the paired difference to dense, of others for the "
            "value. The record has both ends.")
    return _table(rows) + "\n" + _wrap(note)


def _reach(metric: str, point: Point, dense: Point) -> str:
    low, high = interval(metric, point, dense)
    return f" ± {float(f'{(high - low) / 2:.2g}'):g}" if high > low else ""


def _legend(record: Record) -> str:
    metrics = metrics_of(record)
    lines = [f"{name} {ARROWS[METRICS[name].better]} {METRICS[name].better} is better: {METRICS[name].help}"
             + (f" [{record.backbones[name]}]" if name in record.backbones else "") for name in metrics]
    if any(point.metrics[name] is None for point in all_points(record) for name in metrics):
        lines.append("–: not finite" + (", as of images that are equal" if "psnr_dense" in metrics else ""))
    return "\n".join(map(_wrap, lines))


def _cost_table(record: Record) -> str:
    """What a denoiser costs at each rate, times as shares of dense's, which were taken in turn with them."""
    rows = [["rate", "parameters", "not zero", "weights", "peak memory", "MACs", "call", "image"],
            ["", "million", "million", "MB", "MB", "billion", "÷ dense", "÷ dense"]]
    for point in all_points(record):
        row = [rate_folder(point.rate)]
        for name, cost in COSTS.items():
            value = getattr(point, name)
            row.append(f"{value / dense_cost(name, point, record.dense):.2f}" if cost.dense
                       else _number(cost.scale * value))
        row.insert(2, _number(1e-6 * point.nonzero_parameters))
        rows.append(row)
    return "What it costs (MACs: one latent; peak memory: one image; call: of the denoiser, a batch)\n" + _table(rows)


def _collapse(record: Record) -> str:
    dense = record.dense
    if not record.points or not (dense.metrics.get(QUALITY) or 0) > 0:
        return ""
    fallen = next((point for point in record.points
                   if not relative(QUALITY, point.metrics[QUALITY], dense.metrics[QUALITY]) >= COLLAPSED), None)
    if fallen is None:
        last = record.points[-1]
        return (f"Collapse: {QUALITY} does not fall below half of dense up to rate {last.rate:g}, which has "
                f"{share_of_dense(last, dense)}; an unrelated image may score well above 0 too, so look at the images.")
    if fallen.metrics[QUALITY] is None:
        return f"Collapse: {QUALITY} is not finite at rate {fallen.rate:g}."
    return (f"Collapse: {QUALITY} first falls below half of dense at rate {fallen.rate:g}, "
            f"to {share_of_dense(fallen, dense)}.")


def _gain(record: Record, tolerance: float) -> str:
    if not record.points:
        return ""
    dense, last = record.dense, record.points[-1]
    good = last_good(record, tolerance)
    points = [last] if good in (None, last) else [good, last]
    size = f"{dense.weight_bytes / 1e6:,.1f}"
    if removes(record):
        return "Gain: " + "; ".join(
            f"at rate {point.rate:g}, parameters fall from {dense.parameters:,} to {point.parameters:,} "
            f"({_change(point.parameters, dense.parameters)}), weights from {size} to "
            f"{point.weight_bytes / 1e6:,.1f} MB, multiply-accumulates by {_change(point.macs, dense.macs)}, "
            f"and {_time(point)}" for point in points) + "."
    zeroed = "; ".join(f"at rate {point.rate:g}, {100 * saved_share(point, dense):.1f} % of the parameters are zero "
                       f"and {_time(point)}" for point in points)
    return (f"Gain: none with dense kernels and files: {zeroed}. The file still holds all {dense.parameters:,} "
            f"parameters ({size} MB): zeros do not shrink it, nor do they make dense kernels faster.")


def _change(value: float, dense: float) -> str:
    return f"{100 * (value / dense - 1):+.1f} %".replace("-", "−") if dense else "no change"


def _time(point: Point) -> str:
    """Timed in turn with dense, so that a busy machine slows both; generation_time is of one run after another."""
    now, before = 1000 * point.denoiser_seconds, 1000 * point.dense_denoiser_seconds
    image = point.image_seconds / point.dense_image_seconds
    return (f"a denoiser call takes {now / before:.2f} times as long as dense ({_number(now)} and {_number(before)} "
            f"ms), an image {image:.2f} times")


def _noise(record: Record) -> str:
    """What other noise alone changes, where that was measured."""
    spread = {name: value for name, value in record.notes.get("seed_spread", {}).items() if value is not None}
    if not spread:
        return ""
    apart = ", ".join(f"{name} {_number(spread[name])}" for name in METRICS if name in spread)
    return (f"Noise: {apart} is what the dense model has between one noise seed and another (of clip_score and lpips "
            "the standard deviation of the difference of two means). A change no larger than that is no change.")


def fid_note(record: Record) -> str:
    """What to know before comparing FIDs, "" where there is none."""
    if "fid" not in record.dense.metrics:
        return ""
    size, count = record.notes.get("fid_feature_size"), images_of(record)
    floor = record.notes.get("floors", {}).get("fid")
    text = (f"FID is biased upwards at small N, here {counted(count, 'image')} against "
            f"{record.notes.get('reference_images', 'the')} reference images in {size} features"
            + (f"; as many real images have {_number(floor)}" if floor is not None else "")
            + ": compare at equal N and reference only.")
    empty = " With fewer images than features it says next to nothing: read kid."
    return text + (empty if fid_is_empty(record) else "")


# ---- several records

def comparison_summary(records: Sequence[Record], tolerance: float = TOLERANCE, warning: str = "") -> str:
    """How far each method holds, which wins at each rate, and tables of rate by method."""
    records = in_order(records)
    rates = sorted({point.rate for record in records for point in all_points(record)})
    at = {(record.method, point.rate): (record, point) for record in records for point in all_points(record)}
    methods = [record.method for record in records]

    def table(title, shown):
        rows = [[rate_folder(rate), *(shown(*at[method, rate]) if (method, rate) in at else "" for method in methods)]
                for rate in rates]
        return f"{title}\n" + _table([["rate", *methods], *rows])

    first = records[0]
    metrics = metrics_of(first)
    parts = [_wrap(f"WARNING: {warning}") if warning else "",
             "\n".join(_wrap(answer(record, tolerance)) for record in records),
             f"Pruning methods on {first.model}\n" + _wrap(
                 f"{counted(images_of(first), 'image')} of {first.dataset} at every rate, {protocol(first)}, "
                 f"on {first.settings['device']}")]
    if QUALITY in metrics:
        best = [f"  {rate:>5g}  {_best([at[method, rate] for method in methods if (method, rate) in at])}"
                for rate in rates if rate > 0]
        if best:
            parts.append(f"Best by {QUALITY} at equal rate, and which are not surely worse (paired, 95 %)\n"
                         + "\n".join(best))
    for name in metrics:
        unit = f" [{METRICS[name].unit}]" if METRICS[name].unit else ""
        parts.append(table(
            f"{name}{unit} {ARROWS[METRICS[name].better]} {METRICS[name].better} is better",
            lambda record, point, name=name: _number(point.metrics[name]) + _reach(name, point, record.dense)))
    parts.append(table("share of the denoiser's parameters removed or zeroed",
                       lambda record, point: f"{saved_share(point, record.dense):.3f}"))
    parts.append(_wrap(f"{units(records)} Only removal shrinks the file and the time."))
    if any(None in point.metrics.values() for _, point in at.values()):
        parts.append("–: not finite")
    parts.append(_wrap(fid_note(first)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _best(measured: List[tuple]) -> str:
    """The winners at a rate in words."""
    best, *level = [record.method for record in winners(measured)] or [""]
    if not best:
        return "none is finite"
    text = best + (f"; {' and '.join(level)} within the noise" if level else "")
    text += " (the only one measured)" if len(measured) == 1 else ""
    shares = [relative(QUALITY, point.metrics[QUALITY], record.dense.metrics[QUALITY]) for record, point in measured]
    return text + ("; all are below half of dense" if not max(shares) >= COLLAPSED else "")


def units(records: Sequence[Record]) -> str:
    """What a rate means for each method, in words."""
    return ("A rate is a share of what the method prunes ("
            + "; ".join(f"{record.method}: {record.dense.unit}, {'removed' if removes(record) else 'zeroed'}"
                        for record in records) + "), so equal rates do not save equally.")


# ---- words and numbers

def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}".replace("-", "−")


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _wrap(text: str) -> str:
    return textwrap.fill(text, 110, subsequent_indent="  ", break_on_hyphens=False)

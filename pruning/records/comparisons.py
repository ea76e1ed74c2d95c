"""The figures of several records: the variants of a model, and several models. No torch."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pruning.records.answers import lead
from pruning.records.drawing import (
    SAFE,
    SAFE_TEXT,
    STYLE,
    WIDTH,
    Badge,
    band_note,
    curve,
    draw_badges,
    end_of,
    in_percent,
    label_ends,
    legend_entry,
    level,
    panels,
    rate_axis,
    ratio_note,
    save,
    save_png,
    save_svg,
    small_print,
    title,
    value_axis,
)
from pruning.records.findings import (
    GAP,
    QUALITY,
    SAVED,
    SIMILARITY,
    TOLERANCE,
    all_points,
    formula,
    images_of,
    in_order,
    is_baseline,
    last_good,
    metrics_of,
    relative,
    relative_curve,
    relative_interval,
    removes,
    saved_time,
    saved_time_interval,
    saves,
)
from pruning.records.grids import draw_rows, height_of, variant_rows
from pruning.records.palette import Line, lines_of, variant_lines
from pruning.records.record import Record
from pruning.records.summaries import compile_note, protocol, setup
from pruning.records.words import counted, listed, percent

FRONTIER = (0.6, 1.06)  # of the dense QUALITY: what the frontiers show, as nobody wants less; more if a variant has it
HIGHEST = 1.5  # what is above is drawn here


# ---- the variants of a model

@rc_context(STYLE)
def draw_comparison(found: Dict[Path, Record], path: Path, tolerance: float = TOLERANCE, warning: str = "") -> Path:
    """Draw QUALITY over what is saved, and below it the images of one caption by variants and rates.

    found: records by path; the images of each lie in images/ beside it. The SVG leaves the images out. warning: how
    the records were measured differently, if they were.
    """
    records, (caption, rows) = in_order(list(found.values())), variant_rows(found, tolerance)
    if not rows:
        return save(draw_frontiers(records, tolerance, warning), path)
    save_svg(draw_frontiers(records, tolerance, warning), path.with_suffix(".svg"))
    return save_png(draw_frontiers(records, tolerance, warning, caption, rows), path)


@rc_context(STYLE)
def draw_frontiers(records: Sequence[Record], tolerance: float, warning: str, caption: str = "", rows=()) -> Figure:
    """Return the figure of frontiers, and below them of rows of images of one caption if there are any."""
    saving = {what: [record for record in records if saves(record, what)] for what in SAVED}
    shown = {what: those for what, those in saving.items() if those and QUALITY in metrics_of(*records)}
    lines, notes = variant_lines(records), _notes(records, shown, tolerance)
    parts = [rows[::2], rows[1::2]] if len(rows) > 1 and max(len(row.files) for row in rows) <= 4 else [rows]
    heights = [max(2.2, 0.8 + 0.15 * sum(1.2 + each.variant.count("+") for each in those)) for those in shown.values()]
    tall, low = sum(heights) + 1.6, height_of(parts[0], WIDTH / len(parts)) + 0.5 if rows else 0
    figure = Figure(figsize=(WIDTH, tall + low), layout="constrained")
    upper, *lower = figure.subfigures(2, 1, height_ratios=(tall, low)) if rows else [figure]
    labelled = []
    if shown:
        every = upper.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        labelled = [(axes, _draw_frontier(axes, what, those, lines, tolerance))
                    for axes, (what, those) in zip(every, shown.items())]
    else:
        upper.text(0.5, 0.5, f"no variant saves anything, or {QUALITY} was not measured", ha="center", color="0.4")
    title(upper, f"WARNING: measured differently. {warning}" if warning else
          f"Pruning {records[0].model}. {lead(records, tolerance)}")
    small_print(upper, *notes)
    if rows:
        title(lower[0], f"“{caption}”, framed at the safe rate of each variant")
        for axes, part in zip(lower[0].subplots(1, len(parts), squeeze=False)[0], parts):
            draw_rows(axes, part, WIDTH / len(parts))
    label_ends(figure, *labelled)
    for (axes, _), (what, those) in zip(labelled, shown.items()):
        draw_badges(axes, [badge for record in those for badge in _badges(record, what, lines, tolerance)])
    return figure


def _badges(record: Record, what: str, lines: Dict[str, Line], tolerance: float) -> List[Badge]:
    """Return the mark of the safe rate; none if no rate is safe, or if it is not known what that saves."""
    good, dense = last_good(record, tolerance), record.dense
    if good is None or not math.isfinite(SAVED[what](good, dense)):
        return []
    height = relative(QUALITY, good.metrics[QUALITY], dense.metrics[QUALITY])
    return [Badge(SAVED[what](good, dense), min(height, HIGHEST), f"{good.rate:g}", lines[record.variant])]


def _draw_frontier(axes, what: str, records: Sequence[Record], lines: Dict[str, Line], tolerance: float) -> list:
    """Draw QUALITY over one of SAVED, with each safe rate in a large mark. Returns the ends of the lines."""
    share, ends, shares, heights = SAVED[what], [], [], []
    level(axes, 1)
    for record in records:
        line, points = lines[record.variant], all_points(record)
        x = [share(point, record.dense) for point in points]
        y = _in_sight(x, relative_curve(record, QUALITY))
        curve(axes, x, y, [relative_interval(QUALITY, point, record.dense) for point in points], line)
        if SAVED[what] is saved_time:
            low, high = np.array([saved_time_interval(point, record.dense) for point in points]).T
            axes.hlines(y, low, high, color=line.colour, linewidth=0.9)
        if any(value >= FRONTIER[0] for value in y[1:]):
            ends.append((*end_of(x, y, FRONTIER[0]), record.variant.replace("+", "\n+"), line))
        shares, heights = [*shares, *x], [*heights, *y]
    for drawn in axes.lines:
        drawn.set_clip_on(True)  # what is lower leaves the panel
    axes.annotate(f"within {100 * tolerance:g} %", (1, 1), xycoords="axes fraction", xytext=(-3, -3),
                  textcoords="offset points", ha="right", va="top", fontsize=8, color=SAFE_TEXT)
    top = max([FRONTIER[1], *(height + 0.03 for height in heights if math.isfinite(height))])
    axes.set_ylim(FRONTIER[0], top)
    axes.axhspan(1 - tolerance, top, color=SAFE, zorder=0, linewidth=0)
    visible = [x for x, height in zip(shares, heights) if math.isfinite(x) and height >= FRONTIER[0]]
    axes.set_xlim(min([-0.02, *visible]) - 0.01, max([0.1, *visible]) + 0.04)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    in_percent(axes.xaxis)
    in_percent(axes.yaxis)
    axes.set_xlabel(f"{what} →")
    axes.set_ylabel(f"{QUALITY} of dense ↑")
    return ends


def _in_sight(x: Sequence[float], y: Sequence[float]) -> List[float]:
    """Return y, HIGHEST at most, without values that lie below the panel and that no line leads to: those are NaN."""
    return [min(value, HIGHEST) if value >= FRONTIER[0] or i and y[i - 1] >= FRONTIER[0] and abs(x[i] - x[i - 1]) <= GAP
            else math.nan for i, value in enumerate(y)]


def _notes(records: Sequence[Record], shown: Dict[str, list], tolerance: float) -> list:
    undrawn = [f"{listed(others)} (no {what})" for what, those in shown.items()
               for others in [[record.variant for record in records if record not in those and not is_baseline(record)]]
               if others]
    below = [record.variant for record in records if record.points
             and not any(value >= FRONTIER[0] for value in relative_curve(record, QUALITY)[1:])] if shown else []
    kinds = {"Solid: units removed": any(map(removes, records)),
             "dashed: weights zeroed": any(not removes(each) and not is_baseline(each) for each in records),
             "dash-dotted: nothing pruned, over time alone": any(map(is_baseline, records))}
    return [f"{setup(records[0])}. {'; '.join(kind for kind, there in kinds.items() if there)}.",
            "A number in a mark: the safe rate, the highest whose whole interval is within "
            f"{100 * tolerance:g} % of dense. Rates count what each method prunes, so they do not compare.",
            f"{band_note([QUALITY])} {ratio_note(records)}", *map(compile_note, records),
            f"Not drawn: {'; '.join(undrawn)}." if undrawn else "",
            f"Below {percent(FRONTIER[0])} at every measured rate: {listed(below)}." if below else ""]


def _rates(record: Record) -> list:
    return [point.rate for point in all_points(record)]


# ---- several models

@rc_context(STYLE)
def draw_models(records: Sequence[Record], path: Path) -> Path | None:
    """Draw several models: a panel a variant that more than one has, a line a model, and quality relative to dense.

    The records are of one data set and were measured alike but for the model and its own settings. Returns None if
    they share neither QUALITY nor SIMILARITY, or no variant.
    """
    records = in_order([record for record in records if not is_baseline(record)])
    name = next((name for name in (QUALITY, SIMILARITY) if name in metrics_of(*records)), None)
    models = sorted({record.model for record in records})
    variants = list(dict.fromkeys(record.variant for record in records))
    shared = [variant for variant in variants if sum(record.variant == variant for record in records) > 1]
    if name is None or not shared:
        return None
    lines = lines_of(models)
    figure, all_axes = panels(len(shared))
    for axes, variant in zip(all_axes, shared):
        drawn = [record for record in records if record.variant == variant]
        for record in drawn:
            ends = [relative_interval(name, point, record.dense) for point in all_points(record)]
            curve(axes, _rates(record), relative_curve(record, name), ends, lines[record.model])
        level(axes, 1)
        rate_axis(axes, [rate for record in drawn for rate in _rates(record)])
        axes.set_title(variant.replace("+", "\n+"), fontsize=8.5)
    value_axis(all_axes[0], [0.9, 1.02, *(value for record in records if record.variant in shared
                                          for value in relative_curve(record, name))])
    for axes in all_axes:
        axes.set_ylim(*all_axes[0].get_ylim())
        in_percent(axes.yaxis)
    all_axes[0].set_ylabel(f"{formula(name)} ↑")
    title(figure, f"What pruning does to {listed(models)}: {formula(name)} by pruning rate")
    all_axes[0].legend(handles=[legend_entry(model, lines[model]) for model in models], loc="lower left", fontsize=8)
    settings = "; ".join(f"{model}: {protocol(next(record for record in records if record.model == model))}"
                         for model in models)
    alone = [variant for variant in variants if variant not in shared]
    small_print(figure, f"{records[0].dataset}, {counted(images_of(records[0]), 'image')} at each rate; {settings}.",
                band_note([name]), f"Measured on one model alone: {listed(alone)}." if alone else "")
    return save(figure, path)

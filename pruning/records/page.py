"""Records -> report.html: one file that holds its numbers, its images and its code, and needs no network. No torch.

The files in template/ say how the page looks and what its controls do. All that the controls show is computed here, for
every position of the tolerance slider, by the functions that the summaries use.
"""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import LogNorm, Normalize, to_hex

from pruning.data.faults import sentences
from pruning.metrics import METRICS
from pruning.records.answers import answer, lead, needed
from pruning.records.drawing import noise_levels
from pruning.records.findings import (
    ARROWS,
    QUALITY,
    SAVED,
    TIMES,
    TOLERANCE,
    all_points,
    failures,
    holds,
    images_of,
    in_order,
    interval,
    last_good,
    losses,
    metrics_of,
    relative,
    relative_interval,
    removes,
    saved_macs,
    saved_parameters,
    time_ratio,
    works_as_dense,
)
from pruning.records.layers import FLOOR, share_of
from pruning.records.palette import Line, variant_lines
from pruning.records.record import Point, Record
from pruning.records.summaries import best_at_equal_savings, bias_note, compile_note, reach, setup, units
from pruning.records.tables import Table, cost_table, metric_table, results_csv, time_cell
from pruning.records.thumbnails import SHOWN, Thumbnails, thumbnails
from pruning.records.words import listed, percent, rate_label

TEMPLATE = Path(__file__).parent / "template"
# Positions of the slider: shares of the dense model's QUALITY that may be lost. The tolerance asked for is added.
TOLERANCES = (*(n / 200 for n in range(1, 11)), *(n / 100 for n in range(6, 11)), 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
DOTS = 256  # images of a point that are drawn one by one, beside those whose pictures are shown
PALETTE = [to_hex(colour) for colour in matplotlib.colormaps["cividis"](np.linspace(0, 1, 64))]


class Saving(NamedTuple):
    """What a point saves, as a share of what the dense model needs."""

    title: str
    share: Callable[[Point, Point], float]  # of a point and dense


def _less(field: str) -> Callable[[Point, Point], float]:
    """Return the function from a point and dense to the share by which a field is less, NaN if a record lacks it."""
    def share(point, dense):
        own, before = getattr(point, field), getattr(dense, field)
        return 1 - own / before if own is not None and before else math.nan
    return share


SAVINGS = {
    "macs": Saving("multiply-accumulates saved", saved_macs),
    "parameters": Saving("parameters removed or zeroed", saved_parameters),
    "file": Saving("size of a saved file saved", _less("file_bytes")),
    "memory": Saving("weights in memory saved", _less("weight_bytes")),
    "denoiser_seconds": Saving("time of a call saved, in turn with dense",
                               lambda point, dense: 1 - time_ratio("denoiser_seconds", point, dense)[0]),
    "image_seconds": Saving("time of an image saved, in turn with dense",
                            lambda point, dense: 1 - time_ratio("image_seconds", point, dense)[0]),
}
# The columns of the table of safe rates that are about the rate: of _cells() -> head.
COLUMNS = {"keeps": f"{QUALITY} kept", "macs": "compute saved", "parameters": "parameters",
           "denoiser_seconds": "call time ÷ dense"}


def _saved(what: str, point: Point, record: Record) -> float:
    """Return a point's share of one of SAVINGS. NaN for the times of a variant that works as dense: they are noise."""
    return math.nan if what in TIMES and works_as_dense(record) else SAVINGS[what].share(point, record.dense)


def page(found: Dict[Path, Record], tolerance: float = TOLERANCE, warning: str = "",
         left_out: Sequence[str] = ()) -> str:
    """Return the report of the variants of one model and dataset as HTML.

    found: records by path; the images of each lie in images/ beside it, and perhaps a file of layer sensitivities.
    warning: how the records were measured differently, if they were. left_out: why other records are not shown.
    """
    records = in_order(list(found.values()))
    images = thumbnails(found)
    data = _data(found, records, images, tolerance)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(str(TEMPLATE)), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.globals["file"] = lambda name: Markup((TEMPLATE / name).read_text("utf-8"))
    return environment.get_template("report.html").render(
        data=data, records=records, setup=setup(records[0]), warning=warning, left_out=left_out,
        notes=_notes(records), undrawn=_undrawn(records, data["savings"]), shown=SHOWN, unreadable=images.unreadable,
        equal_savings=[_equal_savings(records, what) for what in SAVED if len(records) > 1],
        tables=[(record.variant, [metric_table(record, tolerance), cost_table(record)]) for record in records],
        provenance=_provenance(found))


def _data(found: Dict[Path, Record], records: Sequence[Record], images: Thumbnails, tolerance: float) -> Dict[str, Any]:
    """Return what the page's controls show."""
    tolerances, lines = sorted({*TOLERANCES, tolerance}), variant_lines(records)
    folders = {record.variant: path.parent for path, record in found.items()}
    return {
        "model": records[0].model, "quality": QUALITY, "cells": COLUMNS,
        "tolerances": tolerances, "chosen": tolerances.index(tolerance),
        "leads": [lead(records, each) for each in tolerances], "first": _first(records, tolerance),
        "metrics": {name: {"title": f"{name} {ARROWS[METRICS[name].better]}", "unit": METRICS[name].unit,
                           "better": METRICS[name].better, "levels": noise_levels(records[0], name)}
                    for name in metrics_of(*records) if not METRICS[name].cost},
        "savings": {name: saving.title for name, saving in SAVINGS.items()
                    if any(math.isfinite(_saved(name, point, record)) for record in records
                           for point in record.points or [record.dense])},
        "variants": [_variant(record, folders[record.variant], images.places[record.variant], tolerances,
                              lines[record.variant]) for record in records],
        "palette": PALETTE, "files": images.files, "csv": results_csv(records),
    }


def _variant(record: Record, folder: Path, places: Dict[int, List[Optional[int]]], tolerances: Sequence[float],
             line: Line) -> Dict[str, Any]:
    drawn = sorted({*range(min(DOTS, images_of(record))), *places})  # images that are drawn one by one
    captions = [sample["caption"] for sample in record.samples]
    return {
        "name": record.variant, "colour": line.colour, "marker": line.marker, "dashed": line.dashes != "-",
        "images": images_of(record), "answers": [_answer(record, each) for each in tolerances],
        "points": [_point(record, point, tolerances, drawn) for point in all_points(record)],
        "maps": _maps(record, folder), "places": places, "captions": {k: captions[k % len(captions)] for k in drawn},
    }


# ---- the answer

def _answer(record: Record, tolerance: float) -> Dict[str, Any]:
    """Return the place of the safe point in all_points(), None if there is none, and texts about it and the next."""
    good = last_good(record, tolerance)
    beyond = next((point for point in record.points if not holds(point, record.dense, tolerance)), None)
    after, undecided = "none measured" if record.points else "", False
    if beyond:
        undecided = holds(beyond, record.dense, tolerance) is None
        after = f"{beyond.rate:g}: {_kept(beyond, record)}"
    if undecided and QUALITY in beyond.intervals:
        after += f"\nneeds {needed(beyond, record, tolerance)}"
    return {"safe": record.points.index(good) + 1 if good else None,
            "rate": rate_label(good.rate) if good else "undecided" if undecided else "none", "next": after,
            "words": answer(record, tolerance)[len("How far? "):]}


def _equal_savings(records: Sequence[Record], what: str) -> Table:
    rows = [[f"{level:g}", best] for level, best in best_at_equal_savings(records, what)]
    return Table(f"Best {QUALITY} at equal shares of {what}", ["share", "variant"], rows)


def _first(records: Sequence[Record], tolerance: float) -> Dict[str, Any]:
    """Return what is chosen at first: the saving across the frontier, and the place of the variant that saves most."""
    saving = "macs" if any(map(removes, records)) else "parameters"
    good = [last_good(record, tolerance) for record in records]
    shares = [SAVINGS[saving].share(point, record.dense) if point else -1.0 for point, record in zip(good, records)]
    return {"saving": saving, "variant": shares.index(max(shares))}


def _point(record: Record, point: Point, tolerances: Sequence[float], drawn: Sequence[int]) -> Dict[str, Any]:
    lost, savings = losses(point, record.dense), {name: _short(_saved(name, point, record)) for name in SAVINGS}
    of_images = {} if lost is None else {
        "losses": {k: _short(lost[k]) for k in drawn}, "worst": percent(-lost.max()),
        "quantiles": list(map(_short, np.quantile(lost, (0.05, 0.25, 0.5, 0.75, 0.95)))),
        "failing": [failures(point, record.dense, each)[0] for each in tolerances]}
    return {
        "rate": point.rate, "label": rate_label(point.rate), "sparsity": _short(point.sparsity),
        "metrics": {name: list(map(_short, (point.metrics[name], *interval(name, point, record.dense))))
                    for name in metrics_of(record)},
        "savings": savings, "reach": {name: [_short(1 - end) for end in ends] for name, ends in
                                      point.ratio_intervals.items() if ends and savings[name] is not None},
        "cells": _cells(record, point), **of_images,
    }


def _cells(record: Record, point: Point) -> Dict[str, str]:
    """Return what a point keeps and saves, as COLUMNS of the table of safe rates show it."""
    dense = record.dense
    low, high = relative_interval(QUALITY, point, dense) if QUALITY in point.metrics else (math.nan, math.nan)
    ends = f"\n({100 * low:.1f} to {100 * high:.1f})".replace("-", "−") if high > low else ""
    return {"keeps": _kept(point, record) + ends, "macs": percent(saved_macs(point, dense)),
            "parameters": f"{percent(saved_parameters(point, dense))} {'removed' if removes(record) else 'zeroed'}",
            "denoiser_seconds": time_cell("denoiser_seconds", point, dense).replace(" (", "\n(")}


def _kept(point: Point, record: Record) -> str:
    """Return a point's QUALITY as '97.1 %' of dense's, '–' if it has none."""
    kept = relative(QUALITY, point.metrics.get(QUALITY), record.dense.metrics.get(QUALITY))
    return f"{100 * kept:.1f} %".replace("-", "−") if math.isfinite(kept) else "–"


def _short(value: Optional[float]) -> Optional[float]:
    """Return a number in five digits, None if it is not finite."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


# ---- layers

def _maps(record: Record, folder: Path) -> List[Dict[str, Any]]:
    """Return maps of rate by layer: what layers lost, their errors, and what was found by --sensitivity."""
    points = [point for point in record.points if point.layer_rates]
    names = list(dict.fromkeys(name for point in points for name in point.layer_rates))
    shares = {"parameters": record.dense.layer_parameters, "compute": record.dense.layer_macs}
    shares = {what: [share_of(name, each) for name in names] for what, each in shares.items() if each}
    rates, maps = [point.rate for point in points], []
    for title, field, norm in (("share lost", "layer_rates", Normalize(0, 1)),
                               ("error of its output", "layer_errors", LogNorm(FLOOR, 1))):
        values = [[getattr(point, field).get(name) for name in names] for point in points]
        if any(getattr(point, field) for point in points):
            maps.append(_map(title, names, rates, values, shares, norm))
    file = folder / f"{record.variant}_sensitivity.json"
    if file.is_file():
        found = json.loads(file.read_bytes())
        layers = found["layers"].values()
        maps.append(_map("change of the guided output if this layer alone is pruned", list(found["layers"]),
                         found["rates"], list(zip(*(layer["change"] for layer in layers))),
                         {"parameters": [layer["parameters"] for layer in layers],
                          "compute": [layer["macs"] for layer in layers]}, LogNorm(FLOOR, 1)))
    return maps


def _map(title: str, names: List[str], rates: List[float], values: Sequence[Sequence[Optional[float]]],
         shares: Dict[str, List[float]], norm: Normalize) -> Dict[str, Any]:
    """Return a map of rates × layers, with the place in PALETTE of the colour of each value."""
    values = np.array(values, float)  # None becomes NaN
    shades = norm(values.clip(norm.vmin, norm.vmax)) * (len(PALETTE) - 1)
    return {"title": title, "names": names, "rates": rates, "scale": [f"{norm.vmin:g}", f"{norm.vmax:g}"],
            "values": [list(map(_short, row)) for row in values],
            "shades": [[round(shade) if known else None for shade, known in zip(*row)]
                       for row in zip(np.ma.filled(shades, 0).tolist(), np.isfinite(values).tolist())],
            "shares": {what: list(map(_short, each)) for what, each in shares.items()}}


# ---- what to know

def _undrawn(records: Sequence[Record], savings: Dict[str, str]) -> str:
    """Return which variants are not drawn over time, "" if all are or if the page has no axis of time."""
    names = [record.variant for record in records if works_as_dense(record)]
    if not names or not set(TIMES) & set(savings):
        return ""
    return f"Not drawn over time: {listed(names)}, as zeros take as long as other numbers."


def _notes(records: Sequence[Record]) -> List[str]:
    notes = [units(records)]
    if not all(map(removes, records)):
        notes.append("Zeros shrink no file and make no dense kernel faster; only removal does.")
    for record in records:
        notes += [reach(record), compile_note(record)]
    return [note for note in (*notes, *sentences(records[0].notes.faults), bias_note(records[0])) if note]


def _provenance(found: Dict[Path, Record]) -> List[tuple]:
    """Return (title, rows of name and value): what all records share, then what is of each record."""
    first = next(iter(found.values()))
    shared = {"model": first.model, "dataset": first.dataset, "samples": len(first.samples), **first.settings}
    groups = [("Settings", shared), ("Networks behind the metrics", first.backbones), ("Versions", first.versions)]
    for path, record in found.items():
        groups.append((record.variant, {"record": path.name, **record.options, "code": ", ".join(record.notes.code),
                                        "rates asked for": ", ".join(f"{rate:g}" for rate in record.notes.rates)}))
    return [(title, [(name, _text(value)) for name, value in rows.items() if value != ""]) for title, rows in groups]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)

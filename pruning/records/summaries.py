"""Records -> texts made of sentences and tables. No torch."""
from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

from pruning.data.faults import sentences
from pruning.methods import METHODS
from pruning.metrics import METRICS
from pruning.records.answers import CALLS, answer, lead, share_of_dense, time_beside_dense
from pruning.records.findings import (
    ARROWS,
    COLLAPSED,
    GAP,
    QUALITY,
    SAVED,
    TOLERANCE,
    Scored,
    all_points,
    at_saving,
    feature_size,
    floor,
    images_of,
    in_order,
    is_baseline,
    last_good,
    metrics_of,
    named,
    relative,
    removes,
    saved_parameters,
    unreliable,
    winners,
)
from pruning.records.record import Point, Record
from pruning.records.tables import comparison_tables, cost_table, metric_table, sensitivity_table, wrapped
from pruning.records.words import change, counted, listed, number, rate_list

LEVELS = [level / 10 for level in range(1, 10)]  # shares saved, at which variants are compared
_COLLAPSE = f"{100 * COLLAPSED:g} % of dense"


# ---- one record

def summary(record: Record, tolerance: float = TOLERANCE) -> str:
    """Return how far the variant holds and what that saves, then the tables and what to know about them."""
    parts = [wrapped(answer(record, tolerance)), _header(record), str(metric_table(record, tolerance)),
             _legend(record), str(cost_table(record)), wrapped(compile_note(record)),
             wrapped(_collapse(record)), wrapped(_gain(record, tolerance)), wrapped(_how_to(record)),
             wrapped(_noise(record)),
             wrapped(reach(record)), "\n".join(map(wrapped, sentences(record.notes.faults))),
             wrapped(bias_note(record))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    help_text = f" ({METHODS[record.method].help})" if record.method in METHODS else ""
    options = ", ".join(f"{name} {value}" for name, value in record.options.items())
    code = f"; code {', '.join(record.notes.code)}" if record.notes.code else ""
    return "\n".join(map(wrapped, [
        f"{named(record)}{help_text}" + (f"; options: {options}" if options else ""),
        f"{setup(record)}, on {record.settings['device']}; {versions}{code}",
        f"A rate is the share of {record.dense.unit} asked for, sparsity the share reached."]))


def protocol(record: Record) -> str:
    """Return the settings that every figure and every text names."""
    settings, seeds = record.settings, record.settings["seeds"]
    return (f"seed {settings['seed']}{f' and {seeds - 1} more' if seeds > 1 else ''}, {settings['steps']} steps, "
            f"guidance {settings['guidance_scale']:g}")


def setup(record: Record) -> str:
    """Return the data set, the number of images and the settings."""
    return f"{counted(images_of(record), 'image')} of {record.dataset} at each rate, {protocol(record)}"


def _legend(record: Record) -> str:
    return "\n".join(wrapped(
        f"{name} {ARROWS[METRICS[name].better]} {METRICS[name].better} is better: {METRICS[name].help}"
        + (f" [{record.backbones[name]}]" if name in record.backbones else "")) for name in metrics_of(record))


def _collapse(record: Record) -> str:
    dense = record.dense
    if not record.points or not (dense.metrics.get(QUALITY) or 0) > 0:
        return ""
    fallen = next((point for point in record.points if _has_collapsed(point, dense)), None)
    if fallen is None:
        last = record.points[-1]
        return (f"Collapse: {QUALITY} does not fall below {_COLLAPSE} up to rate {last.rate:g}, which has "
                f"{share_of_dense(last, dense)}. Unrelated images may score well above 0 too, so look at the images.")
    if fallen.metrics[QUALITY] is None:
        return f"Collapse: {QUALITY} is not finite at rate {fallen.rate:g}."
    return (f"Collapse: {QUALITY} first falls below {_COLLAPSE} at rate {fallen.rate:g}, which has "
            f"{share_of_dense(fallen, dense)}.")


def _has_collapsed(point: Point, dense: Point) -> bool:
    return not relative(QUALITY, point.metrics[QUALITY], dense.metrics[QUALITY]) >= COLLAPSED  # NaN has collapsed too


def _gain(record: Record, tolerance: float) -> str:
    if not record.points:
        return ""
    dense, last = record.dense, record.points[-1]
    good = last_good(record, tolerance)
    points = [last] if good in (None, last) else [good, last]
    if removes(record):
        return "Gain: " + "; ".join(
            f"at rate {point.rate:g}, parameters fall from {dense.parameters:,} to {point.parameters:,} "
            f"({change(point.parameters, dense.parameters)}), weights from {_sizes(dense)} to {_sizes(point)}, "
            f"multiply-accumulates by {change(point.macs, dense.macs)}, and {time_beside_dense(point, dense)}"
            for point in points) + "."
    if is_baseline(record):
        return "Gain: time alone; the weights stay as they are. " + " ".join(
            f"At rate {point.rate:g}, {time_beside_dense(point, dense, CALLS)}." for point in points)
    times = [time_beside_dense(point, dense) for point in points]
    zeroed = "; ".join(f"at rate {point.rate:g}, {100 * saved_parameters(point, dense):.1f} % of the parameters are "
                       "zero" + (f", and {time}" if time else "") for point, time in zip(points, times))
    return (f"Gain: none with dense kernels and files: {zeroed}. The denoiser still holds all {dense.parameters:,} "
            f"parameters ({_sizes(points[-1])}): zeros neither shrink it nor make dense kernels faster.")


def _how_to(record: Record) -> str:
    """Return what to pass to diffusers to draw as a baseline did, "" for a method."""
    call = {"steps": "pipeline(prompt, …)", "cache": "diffusers' MagCacheConfig(…)"}.get(record.method)
    told = {point.rate: ", ".join(
        f"{name}={'the list in the record' if isinstance(value, list) else format(value, 'g')}"
        for name, value in point.drawing.items()) for point in record.points}
    return f"How to draw so, by {call}: " + "; ".join(
        f"at rate {rate:g} with {text}" for rate, text in told.items()) + "." if call and told else ""


def _sizes(point: Point) -> str:
    """Return '21.2 MB in memory and 10.6 MB in a saved file'."""
    file = f" and {point.file_bytes / 1e6:,.1f} MB in a saved file" if point.file_bytes is not None else ""
    return f"{point.weight_bytes / 1e6:,.1f} MB in memory{file}"


def _noise(record: Record) -> str:
    spread = {name: record.dense.seed_spread.get(name) for name in metrics_of(record)}
    spread = {name: value for name, value in spread.items() if value is not None}
    if not spread:
        return ""
    values = ", ".join(f"{name} {number(value)}" for name, value in spread.items())
    of_means = [name for name in spread if METRICS[name].against != "dense"]
    meaning = f" ({listed(of_means)}: standard deviation of the difference between two seeds)" if of_means else ""
    return (f"Noise: another noise seed alone changes the dense model by {values}{meaning}. Smaller differences are "
            "noise.")


def compile_note(record: Record) -> str:
    """Return at which rates torch.compile fell back to plain execution, "" if at none."""
    rates = [point.rate for point in all_points(record) if point.compiled is False]
    return (f"torch.compile fell back to plain execution for {record.variant} at {rate_list(rates)}, so times there "
            "are those of plain execution.") if rates else ""


def reach(record: Record) -> str:
    """Return what share of the parameters the method can reach, what the others are, and where removal is inexact."""
    last, total = all_points(record)[-1], record.dense.parameters
    names: Dict[str, List[str]] = {}
    for name, why in {name: why for point in all_points(record) for name, why in point.skipped_modules.items()}.items():
        names.setdefault(why, []).append(name)
    text = ""
    if last.unreached:
        others = [f"{_share(count / total)} {why}{_named(names.get(why, []))}" for why, count in last.unreached.items()]
        text = (f"{record.variant} can reach {_share(1 - sum(last.unreached.values()) / total)} of the parameters. "
                f"The others: {'; '.join(others)}.")
    elif names:  # a record that does not say how many parameters these hold
        text = f"Not pruned: {'; '.join(f'{why}{_named(those)}' for why, those in names.items())}."
    if last.inexact:
        text += f" Removing differs from masking: {next(iter(last.inexact.values()))}{_named(list(last.inexact))}."
    return text.strip()


def _named(names: List[str], most: int = 3) -> str:
    """Return the number of names and the first of them, in brackets."""
    some = f"{', '.join(names[:most])}{', …' if len(names) > most else ''}"
    return f" ({counted(len(names), 'module')}: {some})" if names else ""


def _share(share: float) -> str:
    """Return a share in percent; what is small is not nothing, and what is large not all."""
    shown = f"{100 * share:.1f}"
    return f"{'below 0.1' if shown == '0.0' and share else 'over 99.9' if shown == '100.0' and share < 1 else shown} %"


def bias_note(record: Record) -> str:
    """Return what to know before comparing the metrics that are biased for few images, "" if there are none."""
    return " ".join(_bias(record, name) for name in metrics_of(record) if METRICS[name].biased)


def _bias(record: Record, metric: str) -> str:
    size, count, real = feature_size(record, metric), record.notes.reference_images, floor(record, metric)
    reference = counted(count, "reference image") if count else "the reference images"
    text = (f"{metric} is biased upward for few images. It compares {counted(images_of(record), 'image')} with "
            + reference + (f" by {counted(size, 'feature')}" if size else "")
            + (f"; as many real images score {number(real)}" if real is not None else "")
            + ". Compare values only for the same number of images and the same reference.")
    if not unreliable(record, metric):
        return text
    others = [name for name in metrics_of(record)
              if METRICS[name].against == METRICS[metric].against and not METRICS[name].biased]
    return (f"{text} With fewer images than features, {metric} says almost nothing"
            + (f": read {listed(others, 'or')} instead." if others else "."))


# ---- several records

def comparison_summary(records: Sequence[Record], tolerance: float = TOLERANCE, warning: str = "") -> str:
    """Return how far each variant holds, which is best where equal shares are saved, and tables of rate by variant.

    records: of one model and dataset. warning: how they were measured differently, if they were.
    """
    records = in_order(records)
    first = records[0]
    parts = [wrapped(f"WARNING: {warning}") if warning else "",
             wrapped(lead(records, tolerance)), "\n".join(wrapped(answer(record, tolerance)) for record in records),
             f"Pruning methods on {first.model}\n" + wrapped(f"{setup(first)}, on {first.settings['device']}"),
             *(_equal_savings(records, what) for what in SAVED),
             *map(str, comparison_tables(records, tolerance)),
             wrapped(f"{units(records)} Only removal makes the denoiser smaller and faster.")]
    if any(None in point.metrics.values() for record in records for point in all_points(record)):
        parts.append("–: not finite, or without bound as for equal images")
    parts += [wrapped(compile_note(record)) for record in records]
    parts.append(wrapped(bias_note(first)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _equal_savings(records: Sequence[Record], what: str) -> str:
    rows = best_at_equal_savings(records, what)
    title = wrapped(f"Best {QUALITY} at equal shares of {what}, interpolated between measured rates at most {GAP:g} "
                    "apart, and variants that may be as good by the 95 % interval of paired differences")
    return "\n".join([title, *(f"  {level:>5g}  {best}" for level, best in rows)]) if rows else ""


def best_at_equal_savings(records: Sequence[Record], what: str) -> List[Tuple[float, str]]:
    """Return (share saved, the best variant there and those that may be as good) for each of LEVELS that is reached.

    what: is saved, one of SAVED.
    """
    if QUALITY not in metrics_of(*records):
        return []
    reached = {level: [scored for scored in (at_saving(record, SAVED[what], level) for record in records) if scored]
               for level in LEVELS}
    return [(level, _best(measured)) for level, measured in reached.items() if measured]


def _best(measured: Sequence[Scored]) -> str:
    best, *level = [record.variant for record in winners(measured)] or [""]
    if not best:
        return "none is finite"
    text = best + (f"; {listed(level)} may be as good" if level else "")
    text += " (no other was measured there)" if len(measured) == 1 else ""
    fallen = all(not relative(QUALITY, scored.mean, scored.record.dense.metrics[QUALITY]) >= COLLAPSED
                 for scored in measured)
    return text + (f"; all are below {_COLLAPSE}" if fallen else "")


def units(records: Sequence[Record]) -> str:
    """Return what a rate means for each variant, in a sentence."""
    shares = "; ".join(f"{record.variant}: {record.dense.unit}, {'removed' if removes(record) else 'zeroed'}"
                       for record in records if not is_baseline(record))
    return f"A rate is a share of what the method prunes ({shares}), so equal rates do not save equally."


# ---- the sensitivity of layers

def ends_of_sensitivity(found: dict, most: int = 3) -> str:
    """Return the layers that the output depends on most and least. found: see sweep.measure_sensitivity."""
    order, middle = _by_sensitivity(found)
    return wrapped(f"The guided output of {found['model']} depends most on {listed(order[:most])}, and least on "
                   f"{listed(order[:-most - 1:-1])}, if one layer alone is pruned by {found['variant']} to rate "
                   f"{found['rates'][middle]:g}.")


def _by_sensitivity(found: dict) -> Tuple[List[str], int]:
    """Return the layers by their change, the largest first, and the position of the rate at which they changed."""
    rates, layers = found["rates"], found["layers"]
    middle = rates.index(0.7) if 0.7 in rates else len(rates) // 2
    return sorted(layers, key=lambda name: -layers[name]["change"][middle]), middle


def sensitivity_summary(found: dict, most: int = 12) -> str:
    """Return a table of the layers that the output depends on most and least. found: see sweep.measure_sensitivity."""
    order, middle = _by_sensitivity(found)
    rates = found["rates"]
    shown = order if len(order) <= 2 * most else [*order[:most], *order[-most:]]
    table = sensitivity_table(found, shown)
    few = f", {most} at each end" if len(shown) < len(order) else ""
    return "\n\n".join([
        wrapped(f"How much the guided output of {found['model']} changes if one layer alone is pruned by "
                f"{found['variant']}, on {counted(found['images'], 'calibration image')}. Change: squared, relative to "
                f"the output, to first order. Layers by their change at {rates[middle]:g}{few} of {len(order)}."),
        str(table)]) + "\n"

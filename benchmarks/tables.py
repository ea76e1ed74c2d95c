"""The tables of README.md and docs/ that tell what the shipped records in results/bundled/ hold.

example:
  python benchmarks/tables.py           # print them
  python benchmarks/tables.py --write   # put them into the pages
"""
from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tabulate import tabulate

from pruning.methods import BASELINES
from pruning.records.findings import (
    QUALITY,
    SIMILARITY,
    TOLERANCE,
    failures,
    last_good,
    removes,
    saved_macs,
    saved_parameters,
    time_ratio,
)
from pruning.records.record import Point, Record, read_record

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("shapes-unet", "shapes-mmdit")
NONE = "–"
RECOVERED = "+recovery_steps=200"
JOINT_RECOVERED = f"joint{RECOVERED}+calibration_images=128"
NORM = "+criterion=norm+refit=off"
# What a row is called -> the variant of its record, and in the table of units its rates.
ANSWERS = {
    "`joint`": "joint",
    "`joint`, with recovery": JOINT_RECOVERED,
    "`joint --budget parameters`": "joint+budget=parameters",
    "`structured`": "structured",
    "`attention_heads`": "attention_heads",
    "`blocks`": "blocks",
    "`modulation`": "modulation",
    "`reconstruct`": "reconstruct",
    "`reconstruct --pattern 2:4`": "reconstruct+pattern=2-4",
    "`magnitude`": "magnitude",
    "fewer steps, dense": "steps",
    "diffusers' cache, dense": "cache",
}
ZEROING = {f"`{name}`": name for name in ("magnitude", "wanda", "sparsegpt", "iterative", "reconstruct")}
ZEROING["`reconstruct --recovery_steps 200`"] = f"reconstruct{RECOVERED}"
UNITS = {
    "`joint`": ("joint", (0.34, 0.45, 0.5, 0.6, 0.7)),
    "`joint --recovery_steps 200 --calibration_images 128`": (JOINT_RECOVERED, (0.5, 0.6, 0.7)),
    "`joint --budget parameters`": ("joint+budget=parameters", (0.5, 0.6, 0.7)),
    "`modulation`": ("modulation", (0.75, 0.875, 0.95)),
    "`blocks`": ("blocks", (0.11, 0.17, 0.22, 0.33, 0.34)),
    "`structured`": ("structured", (0.3, 0.5, 0.7, 0.8)),
    "`structured --allocation guided`": ("structured+allocation=guided", (0.3, 0.5, 0.7, 0.8)),
    "`structured --criterion norm --refit off`": (f"structured{NORM}", (0.3, 0.5, 0.7)),
    "`attention_heads`": ("attention_heads", (0.3, 0.4, 0.5, 0.6)),
    "`attention_heads --criterion norm --refit off`": (f"attention_heads{NORM}", (0.3, 0.5)),
}


def record_of(model: str, variant: str) -> Optional[Record]:
    """Return a shipped record, or None if the variant was not measured on this model."""
    path = ROOT / "results/bundled" / model / "shapes" / f"{variant}.json"
    return read_record(path) if path.exists() else None


def less(share: float) -> str:
    """Return how a table shows what is saved of a cost, as a share of dense."""
    return f"−{100 * share:.0f} %".replace("−0 %", "0 %")


def answer(record: Optional[Record]) -> List[str]:
    """Return safe rate, parameters, multiply-accumulates, time and failures of a record."""
    if record is None:
        return 5 * [NONE]
    point, dense = last_good(record), record.dense
    if point is None:
        return ["none", *4 * [NONE]]
    count, _ = failures(point, dense, TOLERANCE)
    time = f"{time_ratio('denoiser_seconds', point, dense)[0]:.2f}"
    if record.method in BASELINES:
        return [f"{point.rate:g}", "same", "same", time, str(count)]
    if not removes(record):
        return [f"{point.rate:g}", f"{100 * saved_parameters(point, dense):.0f} % zero", "same", "same", str(count)]
    return [f"{point.rate:g}", less(saved_parameters(point, dense)), less(saved_macs(point, dense)), time, str(count)]


def answers() -> str:
    """The safe rate of each method on both models, what it saves, and how many images fail there."""
    rows = []
    for name, variant in ANSWERS.items():
        pairs = zip(*(answer(record_of(model, variant)) for model in MODELS))
        rows.append([name, *(left if left == right == "same" else f"{left}, {right}" for left, right in pairs)])
    return table(["method", "safe rate", "parameters", "MACs", "time", "failures"], rows)


def quality(record: Optional[Record], rate: float) -> str:
    """Return the share of dense QUALITY in per cent and SIMILARITY of a record at a rate, as `96.6 / 0.066`."""
    point = at(record, rate)
    if point is None:
        return ""
    return f"{100 * point.metrics[QUALITY] / record.dense.metrics[QUALITY]:.1f} / {point.metrics[SIMILARITY]:.3f}"


def at(record: Optional[Record], rate: float) -> Optional[Point]:
    """Return the point of a record at a rate, or None if there is none."""
    return next((point for point in record.points if point.rate == rate), None) if record else None


def zeroing() -> str:
    """What the methods that zero keep at high rates."""
    places = [(model, rate) for model in MODELS for rate in (0.5, 0.7, 0.8, 0.9)]
    rows = [[name, *(quality(record_of(model, variant), rate) for model, rate in places)]
            for name, variant in ZEROING.items()]
    return table(["method", *(f"{model} {rate}" for model, rate in places)], rows)


def patterns() -> str:
    """What they keep if two of every four weights stay."""
    rows = [[name, *(quality(record_of(model, f"{variant}+pattern=2-4"), 0.5) for model in MODELS)]
            for name, variant in ZEROING.items() if variant in ("magnitude", "wanda", "sparsegpt", "reconstruct")]
    return table(["`--pattern 2:4`", *MODELS], rows)


def units() -> str:
    """What the methods that remove keep, and the share of multiply-accumulates, parameters and time that is left."""
    rows = []
    for name, (variant, rates) in UNITS.items():
        for rate in rates:
            cells: List[str] = []
            for model in MODELS:
                record = record_of(model, variant)
                point = at(record, rate)
                cells += [quality(record, rate), cost(point, record.dense) if point else ""]
            if any(cells):
                rows.append([f"{name} {rate:g}", *cells])
    left = "MACs, parameters, time"
    return table(["method and rate", MODELS[0], left, MODELS[1], left], rows)


def cost(point: Point, dense: Point) -> str:
    """Return the shares of dense multiply-accumulates, parameters and time of a call, as `0.66, 0.50, 0.74`."""
    time = time_ratio("denoiser_seconds", point, dense)[0]
    return f"{point.macs / dense.macs:.2f}, {point.parameters / dense.parameters:.2f}, {time:.2f}"


def table(header: List[str], rows: List[List[str]]) -> str:
    """Return a table of GitHub's Markdown."""
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


# Name of a mark in a page -> the page and the function that makes the table.
TABLES: Dict[str, Tuple[str, Callable[[], str]]] = {
    "answers": ("README.md", answers),
    "zeroing": ("docs/methods.md", zeroing),
    "patterns": ("docs/methods.md", patterns),
    "units": ("docs/methods.md", units),
}


def with_table(text: str, name: str, made: str) -> str:
    """Return a page's text with the table between the marks `<!-- name: … -->` and `<!-- end of name -->`."""
    marked = re.compile(rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}{made}\n{found[2]}", text)


def main() -> None:
    """Print the tables, or put them into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    write = parser.parse_args().write
    for name, (page, make) in TABLES.items():
        path = ROOT / page
        if write:
            path.write_text(with_table(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")
        else:
            print(f"{page}, {name}:\n\n{make()}\n")


if __name__ == "__main__":
    main()

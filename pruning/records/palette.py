"""Which line stands for which method, metric or model, in every figure and in report.html. No torch."""
from __future__ import annotations

from typing import Dict, NamedTuple, Sequence

from matplotlib.colors import to_hex, to_rgb

from pruning.records.findings import is_baseline, removes
from pruning.records.record import Record


class Line(NamedTuple):
    """How a variant, a metric or a model is drawn."""

    colour: str
    marker: str
    dashes: str = "-"
    filled: bool = True  # whether the marker is, as that of a method's default variant


# Name -> its line. Methods, and metrics among themselves, differ for normal, protanopic and deuteranopic eyes, and
# stand out from white; tests/test_plots.py computes how far.
LINES = {
    "joint": Line("#0055DD", "o"),
    "structured": Line("#EF9C10", "s"),
    "attention_heads": Line("#520052", "D"),
    "blocks": Line("#4ABDC5", "v"),
    "modulation": Line("#6B5200", "h"),
    "magnitude": Line("#3AB5FF", "o"),
    "iterative": Line("#9C9442", "^"),
    "reconstruct": Line("#A50842", "P"),
    "wanda": Line("#635AAD", "X"),
    "sparsegpt": Line("#003108", "*"),
    "steps": Line("#000000", "<"),
    "cache": Line("#808080", ">"),
    "clip_score": Line("#0052F7", "o"),
    "pick_score": Line("#00B1FF", "s"),
    "fid": Line("#EF9C10", "D"),
    "lpips": Line("#4A084A", "v"),
    "lpips_dense": Line("#63BDAD", "P"),
    "ssim_dense": Line("#526300", "X"),
}
SPARE = (Line("#D35900", "p"), Line("#430090", "<"), Line("#90A67A", ">"), Line("#7A6490", "h"), Line("#4390FF", "*"))
SHADES = ((1, 0.35), (0, 0.4), (1, 0.6), (0, 0.65))  # of other variants of a method: (white or black, its share)


def lines_of(names: Sequence[str]) -> Dict[str, Line]:
    """Return a line for each name: its own, or for a name that LINES lacks the next spare one."""
    unknown = [name for name in dict.fromkeys(names) if name not in LINES]
    return {name: LINES[name] if name in LINES else SPARE[unknown.index(name) % len(SPARE)]._replace(
        filled=unknown.index(name) < len(SPARE)) for name in names}


def variant_lines(records: Sequence[Record]) -> Dict[str, Line]:
    """Return a line for each variant: solid if it removes, dashed if it zeroes, dash-dotted if it prunes nothing.

    Variants with other options than the default ones have a shade of their method's colour and open markers.
    """
    methods, lines = lines_of(sorted({record.method for record in records})), {}
    for record in sorted(records, key=lambda record: record.variant):
        line = methods[record.method]._replace(
            dashes="-." if is_baseline(record) else "-" if removes(record) else "--")
        if record.variant != record.method:
            others = [name for name in lines if name != record.method and name.split("+")[0] == record.method]
            towards, share = SHADES[len(others) % len(SHADES)]
            colour = [(1 - share) * part + share * towards for part in to_rgb(line.colour)]
            line = line._replace(colour=to_hex(colour), filled=False)
        lines[record.variant] = line
    return lines

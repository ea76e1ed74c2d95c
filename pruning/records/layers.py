"""The figures of layers: what each layer lost, and how sensitive each layer is. No torch."""
from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from pruning.records.drawing import STYLE, WIDTH, save, small_print, title
from pruning.records.record import Record
from pruning.records.summaries import protocol

FLOOR = 1e-6  # errors below are drawn alike
LABELS = 50  # blocks that can be named below a figure


@rc_context(STYLE)
def draw_layers(record: Record, path: Path) -> Optional[Path]:
    """Draw for each layer what it lost at each rate, its output's error, and its share of parameters and of compute.

    Returns None if no point of the record says what layers lost.
    """
    points = [point for point in record.points if point.layer_rates]
    if not points:
        return None
    names = list(points[0].layer_rates)
    rates = [point.rate for point in points]
    lost = np.array([[point.layer_rates.get(name, np.nan) for name in names] for point in points])
    maps = [("share lost", lost, Normalize(0, 1))]
    if any(point.layer_errors for point in points):
        errors = np.array([[point.layer_errors.get(name, np.nan) for name in names] for point in points])
        maps.append(("output error", errors.clip(FLOOR), LogNorm(FLOOR, 1)))
    shares = {what: {name: share_of(name, each) for name in names} for what, each in (
        ("parameters", record.dense.layer_parameters), ("multiply-accumulates", record.dense.layer_macs)) if each}
    errors = "of this layer alone, squared, relative to its dense output"
    if record.method == "blocks":
        errors = "of the final latents without this block alone, squared, relative to their variance"
    notes = [f"{record.model}, {protocol(record)}. Each column is a layer or a group of units, as the denoiser "
             "lists them; its name begins as the label below says. White: not measured.",
             "Share lost: of the layer's weights or units." + (
                 f" Output error: {errors}, before the re-fit in order and before recovery." if len(maps) > 1 else "")
             + " Below: the share of the layer, or of the module that holds the units."]
    return _draw(f"What {record.variant} pruning took from each layer of {record.model}", names, rates,
                 "pruning rate", maps, shares, notes, path)


@rc_context(STYLE)
def draw_sensitivity(found: Dict, path: Path) -> Path:
    """Draw how much the guided output changes if one layer alone is pruned. found: see sweep.measure_sensitivity."""
    names, rates = list(found["layers"]), found["rates"]
    layers = [found["layers"][name] for name in names]
    changes = np.array([[layer["change"][i] for layer in layers] for i in range(len(rates))])
    shares = {"parameters": {name: layer["parameters"] for name, layer in found["layers"].items()},
              "multiply-accumulates": {name: layer["macs"] for name, layer in found["layers"].items()}}
    notes = [f"{found['model']}, {found['images']} calibration images. Each column is a layer, as the denoiser "
             "lists them; its name begins as the label below says.",
             "Change: squared change of the guided output, relative to the output, if this layer alone is pruned by "
             f"{found['variant']}; to first order, from random probes. Dark layers can be pruned, bright ones cannot."]
    return _draw(f"Where {found['model']} can be pruned by {found['variant']}", names, rates, "rate of the layer",
                 [("change of the output", changes.clip(FLOOR), LogNorm(FLOOR, 1))], shares, notes, path)


def _draw(headline: str, names: List[str], rates: Sequence[float], rate_label: str, maps: Sequence[tuple],
          shares: Dict[str, Dict[str, float]], notes: List[str], path: Path) -> Path:
    """Draw maps above bars of the layers' shares. A map is (label, values of rates × layers, norm of the colours)."""
    shares = {what: each for what, each in shares.items() if any(name in each for name in names)}
    heights = [max(1.3, 0.22 * len(rates))] * len(maps) + [0.8] * len(shares)
    figure = Figure(figsize=(WIDTH, sum(heights) + 2.2), layout="constrained")
    every = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    edges = np.arange(len(names) + 1)
    for axes, (label, values, norm) in zip(every, maps):
        axes.grid(False)
        image = axes.pcolormesh(edges, np.arange(len(rates) + 1), np.ma.masked_invalid(values), norm=norm,
                                cmap="cividis", rasterized=True)
        axes.set_yticks(np.arange(len(rates)) + 0.5)
        axes.set_yticklabels([f"{rate:g}" for rate in rates], fontsize=8)
        axes.set_ylabel(rate_label, fontsize=9)
        bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, format=lambda value, _: f"{value:g}")
        bar.set_label(label, fontsize=9)
        bar.ax.tick_params(labelsize=8)
    for axes, (what, each) in zip(every[len(maps):], shares.items()):
        axes.bar(edges[:-1] + 0.5, [100 * each.get(name, 0.0) for name in names], width=1.0, color="0.35")
        axes.set_ylabel(f"% of\n{what.replace('multiply-accumulates', 'MACs')}", fontsize=9)
        axes.tick_params(labelsize=8)
    blocks = _blocks(names)
    for axes in every:
        for start in list(blocks.values())[1:]:
            axes.axvline(start, color="0.85" if axes in every[:len(maps)] else "0.6", linewidth=0.6)
    ends = [*list(blocks.values())[1:], len(names)]
    middles = {name: (start + end) / 2 for (name, start), end in zip(blocks.items(), ends)}
    named, last = {}, -len(names)
    for name, middle in middles.items():  # a label that would overlap is left out
        if middle - last >= len(names) / LABELS:
            named[name], last = middle, middle
    every[-1].set_xlim(0, len(names))
    every[-1].set_xticks(list(named.values()))
    every[-1].set_xticklabels(list(named), rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    for axes in every:
        axes.tick_params(axis="x", length=0)
    title(figure, headline)
    small_print(figure, *notes)
    return save(figure, path)


def share_of(name: str, shares: Dict[str, float]) -> float:
    """Return the share of a layer, of a module, or of the module whose units a name such as "attn1.heads" means."""
    if name in shares:
        return shares[name]
    inside = [each for each in shares if each.startswith(f"{name}.")]
    module = name.rpartition(".")[0]
    return sum(shares[each] for each in inside or [each for each in shares if each.startswith(f"{module}.")])


def _blocks(names: List[str]) -> Dict[str, int]:
    """Return the blocks of layers and where each starts. Layers of a block have names that begin alike."""
    blocks: Dict[str, int] = {}
    for place, name in enumerate(names):
        first, *others = name.split(".")
        blocks.setdefault(f"{first}.{others[0]}" if others and others[0].isdigit() else first, place)
    return blocks

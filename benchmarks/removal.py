"""Measure what removal saves, beside masks and other libraries: parameters, MACs, memory and time of a denoiser call.

The large models have the shapes of published models and random weights, as time depends on shapes alone. Finished
rows are kept: the same command continues from them.

example:
  python benchmarks/removal.py --models sd15 --methods structured attention_heads --rates 0.3 0.5
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

import copy
import gc
import json
import re
import textwrap
import time
import warnings
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import denoisers, peers
from benchmarks.denoisers import MODELS
from benchmarks.widths import measure_widths
from pruning import UserError, cli, methods, whole_file
from pruning.methods import METHODS
from pruning.metrics import costs
from pruning.models import pipelines, provenance
from pruning.records import drawing, palette
from pruning.records.record import write_json

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
DEFAULT = ("sd15", "sd3", *pipelines.MODELS)
AIM = 0.10  # largest difference of time and MACs, as shares of dense, that a removing method should have at rate 0.5
NOT_INSTALLED = "not installed (pip install torch-pruning)"


class Pruner(NamedTuple):
    """A method of METHODS, or a peer. If a peer fails, its error is its result."""

    help: str
    on_big: str  # the rates at which it prunes models of random weights by default: "all", "one" or "none"
    peer: Optional[Callable[[Any, float, dict], str]] = None  # see benchmarks/peers.py


PRUNERS = {
    "structured": Pruner(METHODS["structured"].help, "all"),
    "attention_heads": Pruner(METHODS["attention_heads"].help, "all"),
    "magnitude": Pruner("zero weights in place", "one"),
    "torch_masks": Pruner("mask every layer with torch.nn.utils.prune.l1_unstructured", "none", peers.torch_masks),
    "torch_pruning": Pruner("remove channels and heads of all layers with Torch-Pruning's MagnitudePruner", "one",
                            peers.torch_pruning),
}


def measure(dense, call: dict, name: str, rate: float, rounds: int) -> dict:
    """Prune a copy of `dense` and return its costs, or {"error": text} if a peer fails.

    name: one of PRUNERS, or "dense" to measure the copy unpruned.
    """
    denoiser, note, started = copy.deepcopy(dense), "", time.perf_counter()
    peer = PRUNERS[name].peer if name in PRUNERS else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if peer:
                note = peer(denoiser, rate, call)
            elif name != "dense":
                # How much is removed does not depend on which units go, and norms need no calibration.
                by_norm = {"criterion": "norm", "refit": False} if methods.METHODS[name].removes else {}
                methods.prune(name, denoiser, rate, **by_norm)
        costs.synchronize(denoiser.device)
        prune_seconds = time.perf_counter() - started
        macs = costs.count_macs(denoiser, call)
        for module in denoiser.modules():
            if hasattr(module, "weight_mask"):  # torch.nn.utils.prune computes such a weight in every call,
                del module.weight  # so it counts as memory of the call
        peak = costs.peak_bytes(denoiser, call)
        dense_seconds, seconds = costs.denoiser_seconds([dense, denoiser], call, rounds)
        return {"parameters": costs.count_parameters(denoiser)["parameters"], "macs": macs, "peak_bytes": peak,
                "seconds": seconds, "dense_seconds": dense_seconds, "prune_seconds": prune_seconds, "note": note}
    except ModuleNotFoundError as error:
        if error.name != "torch_pruning":
            raise
        return {"error": NOT_INSTALLED}
    except Exception as error:
        if not peer:
            raise
        return {"error": peers.error_line(error)}


def protocol(name: str, device: str, dtype: str, args) -> dict:
    """Return the settings that decide a model's numbers. latent None: the model's own size; layers None: all blocks."""
    model, kind = MODELS[name], torch.device(device).type
    return {"latent": args.latent or model.latents.get(kind), "dtype": dtype, "rounds": args.rounds or model.rounds,
            "layers": (args.layers or model.layers[kind]) if model.layers else None}


def planned_rows(name: str, args) -> List[tuple]:
    """Return (model, pruner, rate) of each row to measure for a model, the dense model first."""
    rates = {"all": args.rates, "one": [min(args.rates, key=lambda rate: abs(rate - 0.5))], "none": []}
    few = MODELS[name].denoiser and not args.peers_on_big
    return [(name, "dense", 0.0)] + [(name, pruner, rate) for pruner in args.methods
                                     for rate in rates[PRUNERS[pruner].on_big if few else "all"]]


def benchmark(data: dict, path: Path, device: str, dtype: str, args) -> None:
    """Measure every row that is asked for and missing in `data`, and write `data` to `path` after each row.

    Raises UserError if `data` holds rows of these models that were measured with other settings.
    """
    if args.overwrite:
        data["rows"] = [row for row in data["rows"] if row["model"] not in args.models]
    rows = {(row["model"], row["method"], row["rate"]): row for row in data["rows"]}
    settings = {name: protocol(name, device, dtype, args) for name in args.models}
    for row in data["rows"]:
        if row["settings"] != settings.get(row["model"], row["settings"]):
            raise UserError(f"in {path}, {row['model']} was measured with {row['settings']}, not with "
                            f"{settings[row['model']]}: use the same settings, another --output_dir, or --overwrite")
    todo = {name: [key for key in planned_rows(name, args)
                   if key not in rows or rows[key].get("error") == NOT_INSTALLED] for name in args.models}
    order = [*MODELS, "dense", *PRUNERS]
    with tqdm(total=sum(map(len, todo.values())), unit="row", disable=not any(todo.values())) as bar:
        for name in filter(todo.get, todo):
            bar.set_description(name)
            dense, call = denoisers.build(name, settings[name], device)
            for key in todo[name]:
                bar.set_description(" ".join(map(str, key)))
                measured = measure(dense, call, *key[1:], settings[name]["rounds"])
                rows[key] = dict(zip(("model", "method", "rate"), key), settings=settings[name], **measured)
                data["rows"] = sorted(rows.values(), key=lambda row: (
                    order.index(row["model"]), order.index(row["method"]), row["rate"]))
                write_json(data, path)
                bar.update()
                gc.collect()  # modules and their hooks are cycles of references
            del dense, call


def shares(row: dict, dense: dict) -> Dict[str, float]:
    """Return a row's costs relative to dense. Its time is relative to the dense calls that alternated with its own."""
    return {**{name: row[name] / dense[name] for name in ("parameters", "macs", "peak_bytes")},
            "seconds": row["seconds"] / row["dense_seconds"]}


def title(row: dict) -> str:
    """Return the model and the settings of a row in words."""
    model, settings = MODELS[row["model"]], row["settings"]
    parts = [f"latent {settings['latent'] or 'of its own size'}", settings["dtype"],
             f"timed {settings['rounds']} times",
             f"{settings['layers']} of {model.config['num_layers']} blocks" if settings["layers"] else "",
             "random weights" if model.denoiser else ""]
    return f"{row['model']} ({', '.join(filter(None, parts))})"


def setup(data: dict) -> str:
    """Return how the numbers were measured, in words."""
    versions = ", ".join(f"{name} {data['versions'][name]}" for name in ("python", "torch", "diffusers"))
    return (f"Measured on {data['machine']['device']}, {data['machine']['threads']} threads, {versions}. Costs are "
            "shares of the dense model's, whose calls (one latent) are timed in alternation with the pruned ones. "
            "A rate is the share of its units that a method prunes.")


def table(data: dict) -> str:
    """Return everything measured, in Markdown."""
    lines = [setup(data), "", *(f"- `{name}`: {pruner.help}" for name, pruner in PRUNERS.items())]
    for row in data["rows"]:
        cells = [f"`{row['method']}`", f"{row['rate']:g}"]
        if row["method"] == "dense":
            dense = row
            lines += ["", f"**{title(row)}**. Dense: {row['parameters'] / 1e6:,.1f} M parameters, "
                      f"{row['macs'] / 1e9:,.3g} GMACs, {row['peak_bytes'] / 1e9:,.3g} GB peak memory, "
                      f"{1000 * row['seconds']:,.4g} ms per call.", "",
                      "| method | rate | parameters | MACs | peak memory | time | time to prune | |", "|---" * 8 + "|"]
            continue
        if "error" in row:
            cells += [""] * 5 + [row["error"]]
        else:
            cells += [f"{share:.2f}" for share in shares(row, dense).values()]
            cells += [f"{row['prune_seconds']:.2g} s", row["note"]]
            if row["rate"] == 0.5 and row["method"] in METHODS and METHODS[row["method"]].removes:
                near = abs(shares(row, dense)["seconds"] - shares(row, dense)["macs"]) <= AIM
                cells[-1] = f"time is {'within' if near else 'NOT within'} {AIM:.2f} of MACs"
        lines.append("| " + " | ".join(cells) + " |")
    if data["widths"]:
        multiples = list(data["widths"][0]["times"])
        lines += ["", "Time per unit of width of a pair of layers, one into a width near 1024 or 1536 and one out of "
                  "it, relative to widths that are multiples of 64.", "",
                  "| width is a multiple of | " + " | ".join(multiples) + " |", "|---" * (1 + len(multiples)) + "|"]
        for row in data["widths"]:
            times = " | ".join(f"{row['times'][multiple]:.2f}" for multiple in multiples)
            lines.append(f"| {row['layer']}, {row['dtype']} | {times} |")
    return "\n".join(lines) + "\n"


@rc_context(drawing.STYLE)
def draw(data: dict, path: Path) -> None:
    """Draw a panel for each model: the shares of dense's MACs as lines and of its time as markers, against the rate."""
    dense = {row["model"]: row for row in data["rows"] if row["method"] == "dense"}
    rows = [row for row in data["rows"] if row["method"] in PRUNERS and "seconds" in row]
    line_of = palette.lines_of(list(PRUNERS))  # methods have the colours of the other figures
    lines = {name: line_of[name] if name in METHODS else line_of[name]._replace(dashes="--")
             for name in PRUNERS if any(row["method"] == name for row in rows)}
    columns = min(2, len(dense))
    figure = Figure(figsize=(drawing.WIDTH, 2.7 * -(-len(dense) // columns) + 1.2), layout="constrained")
    for i, (name, base) in enumerate(dense.items()):
        axes = figure.add_subplot(-(-len(dense) // columns), columns, i + 1)
        for pruner, line in lines.items():
            own = [row for row in rows if (row["model"], row["method"]) == (name, pruner)]
            rates = [row["rate"] for row in own]
            axes.plot([0, *rates], [1, *(shares(row, base)["macs"] for row in own)], line.dashes,
                      color=line.colour)
            axes.plot(rates, [shares(row, base)["seconds"] for row in own], line.marker, color=line.colour,
                      markeredgecolor="white", markeredgewidth=0.6)
        axes.set_title(textwrap.fill(title(base), 50))
        axes.set(xlabel="pruning rate", ylabel="share of dense\n(lines: MACs, markers: time)", xlim=(0, 1))
        axes.set_ylim(bottom=0)
    handles = [axes.plot([], [], line.dashes, color=line.colour, marker=line.marker)[0] for line in lines.values()]
    figure.legend(handles, list(lines), loc="outside right center", fontsize=9, frameon=False)
    drawing.title(figure, "What pruning saves: costs of a denoiser call")
    drawing.small_print(figure, setup(data))
    drawing.save(figure, path)


def read(path: Path, header: dict) -> dict:
    """Return the rows and widths in the file at `path`, or none if there is no file.

    header: the machine and the versions of this run. Raises UserError if the file has others or cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**header, "rows": [], "widths": []}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for name, value in header.items():
        if data.get(name) != value:
            raise UserError(f"{path} was measured with {name} {data.get(name)}, and this run has {value}: use another "
                            "--output_dir, or remove the file")
    return data


def main(argv=None) -> None:
    """Measure the missing rows, then print and draw all rows."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--models", nargs="+", type=cli.one_of("model", MODELS), default=list(DEFAULT),
                        help="models to prune")
    parser.add_argument("--methods", nargs="+", type=cli.one_of("method", PRUNERS), default=list(PRUNERS),
                        help="; ".join(f"{name}: {pruner.help}" for name, pruner in PRUNERS.items()))
    parser.add_argument("--rates", nargs="+", type=cli.rate, default=list(RATES), help="pruning rates")
    parser.add_argument("--peers_on_big", action="store_true", help="measure masks and other libraries at every rate "
                        "on models of random weights too (default: at one rate, and torch_masks at none, as it holds "
                        "three times the weights)")
    parser.add_argument("--rounds", type=cli.positive, help="how often dense and pruned calls are timed, in "
                        "alternation (default: "
                        + ", ".join(f"{name} {model.rounds}" for name, model in MODELS.items()) + ")")
    parser.add_argument("--latent", type=cli.positive, help="side of the latent (default: the model's own; on the "
                        "CPU " + ", ".join(f"{n} {m.latents['cpu']}" for n, m in MODELS.items() if m.latents) + ")")
    parser.add_argument("--layers", type=cli.positive, help="blocks of transformers (default: all; on the CPU "
                        + ", ".join(f"{n} {m.layers['cpu']}" for n, m in MODELS.items() if m.layers) + ")")
    parser.add_argument("--widths", action="store_true", help="time layers of even and odd widths, and no models")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    parser.add_argument("--dtype", type=cli.one_of("dtype", ("float32", "float16", "bfloat16")),
                        help="dtype of the models (default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks", help="where results go")
    parser.add_argument("--overwrite", action="store_true", help="measure these models, or the widths, again")
    args = parser.parse_args(argv)
    args.rates = sorted(set(args.rates))

    device = pipelines.pick_device(args.device)
    header = {"machine": provenance.machine(device), "versions": provenance.package_versions()}
    label = re.sub(r"[^a-z0-9]+", "-", header["machine"]["device"].lower()).strip("-")
    path = args.output_dir / f"removal_{label}.json"
    data = read(path, header)
    if not args.widths:
        benchmark(data, path, device, args.dtype or ("float32" if device == "cpu" else "bfloat16"), args)
    elif args.overwrite or not data["widths"]:
        data["widths"] = measure_widths(device, args.rounds or 15)
        write_json(data, path)
    with whole_file(args.output_dir / "removal.md") as part:
        part.write_text(table(data), encoding="utf-8")
    if data["rows"]:
        draw(data, args.output_dir / "removal.png")
    print(table(data))
    print(path)


if __name__ == "__main__":
    cli.run(main)

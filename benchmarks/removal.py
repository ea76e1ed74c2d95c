"""Measure what removal gains: parameters, MACs, memory and time of a denoiser call, beside masks and other libraries.

Big models have the shapes of published ones and random weights, as time depends on shapes alone. Finished rows are
kept; the same command goes on from them.

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
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import diffusers
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import peers
from benchmarks.widths import measure_widths
from pruning import UserError, cli, methods, whole_file
from pruning.data import Sample
from pruning.methods import METHODS, surgery
from pruning.metrics import costs
from pruning.models import pipelines
from pruning.records import plots
from pruning.records.record import write_json

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
AIM = 0.10  # how near a removing method's share of dense's time at rate 0.5 is to be to its share of the MACs
NOT_INSTALLED = "not installed (pip install torch-pruning)"


class Model(NamedTuple):
    """A model to measure; all but the rounds describe one of random weights, a bundled one has its own."""

    rounds: int  # in which dense and pruned are timed in turn
    denoiser: str = None  # class in diffusers
    config: Dict[str, Any] = {}
    latents: Dict[str, int] = {}  # side: the published one on CUDA, one that the CPU does in seconds
    inputs: Callable[[int], Dict[str, tuple]] = None  # side of the latent -> shapes of a call's arguments
    layers: Dict[str, int] = {}  # how many blocks are built, where all would not fit


MODELS = {
    "sd15": Model(  # Stable Diffusion 1.5; what is not named here is the class's default too
        9, "UNet2DConditionModel",
        {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
         "attention_head_dim": 8, "cross_attention_dim": 768},
        {"cpu": 32, "cuda": 64},
        lambda side: {"sample": (1, 4, side, side), "timestep": (1,), "encoder_hidden_states": (1, 77, 768)}),
    "sd3": Model(  # Stable Diffusion 3 medium, with the 333 caption tokens that its pipeline gives
        3, "SD3Transformer2DModel",
        {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
         "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
         "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192},
        {"cpu": 48, "cuda": 128},
        lambda side: {"hidden_states": (1, 16, side, side), "timestep": (1,), "pooled_projections": (1, 2048),
                      "encoder_hidden_states": (1, 333, 4096)},
        {"cpu": 6, "cuda": 24}),
    **{name: Model(20) for name in pipelines.MODELS},
}


class Way(NamedTuple):
    """A way to prune: one of METHODS, or a peer, of which also counts what goes wrong."""

    help: str
    on_big: str  # rates that a model of random weights is measured at by default
    peer: Callable[[Any, float, dict], str] = None  # (denoiser, rate, call), in place -> a note for the table


WAYS = {
    "structured": Way(METHODS["structured"].help, "all"),
    "attention_heads": Way(METHODS["attention_heads"].help, "all"),
    "magnitude": Way("zero weights in place: a mask", "one"),
    "torch_masks": Way("torch.nn.utils.prune.l1_unstructured on every layer", "none", peers.torch_masks),
    "torch_pruning": Way("Torch-Pruning's MagnitudePruner: channels and heads of all layers", "one",
                         peers.torch_pruning),
}


def random_denoiser(name: str, settings: dict, device: str) -> Tuple[Any, dict]:
    """A denoiser of random weights and the call that it is timed with.

    Built without memory, then filled once: weights uniform with a standard deviation of 1 / sqrt(fan in), norms 1,
    biases 0. Then each unit that can be removed is scaled by a factor of its own between 1/2 and 2, as otherwise
    the units of a layer would differ in nothing that a ranking could find.
    """
    model = MODELS[name]
    config = {**model.config, "num_layers": settings["layers"]} if model.layers else model.config
    torch.manual_seed(0)
    diffusers.logging.set_verbosity_error()  # of .to(dtype)
    with torch.device("meta"):
        denoiser = getattr(diffusers, model.denoiser)(**config).to(getattr(torch, settings["dtype"]))
    denoiser = denoiser.to_empty(device=device).eval()
    with torch.no_grad():
        for key, tensor in [*denoiser.named_parameters(), *denoiser.named_buffers()]:
            bound = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound) if tensor.dim() > 1 else tensor.fill_(float(key.endswith("weight")))
        for group in surgery.survey(denoiser, "heads", "neurons", "channels")[0]:
            scale = torch.exp2(2 * torch.rand(group.units) - 1)
            for layer, dim in group.layers(scored=True):
                own = group.by_unit(layer.weight, dim)
                own.mul_(scale.to(own).view([-1 if d == dim + 1 else 1 for d in range(own.dim())]))
    inputs = model.inputs(settings["latent"])
    return denoiser, {key: torch.randn(shape).to(device, denoiser.dtype) for key, shape in inputs.items()}


def bundled_denoiser(name: str, settings: dict, device: str) -> Tuple[Any, dict]:
    """A bundled model's denoiser and its pipeline's own call, without guidance, which would double the batch."""
    pipeline = pipelines.load_pipeline(name, device, settings["dtype"])
    size = pipelines.sampling_settings(pipeline, name)["image_size"]
    call = pipelines.first_call(
        pipeline, [Sample("benchmark", "a large red circle", None)], seed=0, guidance_scale=1.0, batch_size=1,
        image_size=settings["latent"] * pipeline.vae_scale_factor if settings["latent"] else size)
    return getattr(pipeline, pipelines.denoiser_name(pipeline)).eval(), call


def measure(dense, call: dict, way: str, rate: float, rounds: int) -> dict:
    """Prune a copy of `dense` and measure it; for a peer that fails, what it said."""
    denoiser, note, started = copy.deepcopy(dense), "", time.perf_counter()
    peer = WAYS[way].peer if way in WAYS else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if peer:
                note = peer(denoiser, rate, call)
            elif way != "dense":
                methods.prune(way, denoiser, rate)
        costs.synchronize(denoiser.device)
        prune_seconds = time.perf_counter() - started
        macs = costs.count_macs(denoiser, call)
        for module in denoiser.modules():
            if hasattr(module, "weight_mask"):  # of torch.nn.utils.prune, which makes weights anew in each call:
                del module.weight  # so they count as memory of the call
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
        return {"error": peers.said(error)}


def protocol(name: str, device: str, dtype: str, args) -> dict:
    """What decides a row's numbers besides its rate; a latent or layers of None are the model's own."""
    model, kind = MODELS[name], torch.device(device).type
    return {"latent": args.latent or model.latents.get(kind), "dtype": dtype, "rounds": args.rounds or model.rounds,
            "layers": (args.layers or model.layers[kind]) if model.layers else None}


def planned(name: str, args) -> List[tuple]:
    """(model, way, rate) of a model's rows, the dense model first."""
    some = {"all": args.rates, "one": [min(args.rates, key=lambda rate: abs(rate - 0.5))], "none": []}
    few = MODELS[name].denoiser and not args.peers_on_big
    return [(name, "dense", 0.0)] + [(name, way, rate) for way in args.methods
                                     for rate in some[WAYS[way].on_big if few else "all"]]


def benchmark(data: dict, path: Path, device: str, dtype: str, args) -> None:
    """Measure every row that is asked for and not there yet; the file is written after each."""
    if args.overwrite:
        data["rows"] = [row for row in data["rows"] if row["model"] not in args.models]
    rows = {(row["model"], row["method"], row["rate"]): row for row in data["rows"]}
    settings = {name: protocol(name, device, dtype, args) for name in args.models}
    for row in data["rows"]:
        if row["settings"] != settings.get(row["model"], row["settings"]):
            raise UserError(f"{path} has {row['model']} measured with {row['settings']}, not with "
                            f"{settings[row['model']]}: use the same settings, another --output_dir, or --overwrite")
    todo = {name: [key for key in planned(name, args) if key not in rows or rows[key].get("error") == NOT_INSTALLED]
            for name in args.models}
    order = [*MODELS, "dense", *WAYS]
    with tqdm(total=sum(map(len, todo.values())), unit="row", disable=not any(todo.values())) as bar:
        for name in filter(todo.get, todo):
            bar.set_description(name)
            build = random_denoiser if MODELS[name].denoiser else bundled_denoiser
            dense, call = build(name, settings[name], device)
            for key in todo[name]:
                bar.set_description(" ".join(map(str, key)))
                measured = measure(dense, call, *key[1:], settings[name]["rounds"])
                rows[key] = dict(zip(("model", "method", "rate"), key), settings=settings[name], **measured)
                data["rows"] = sorted(rows.values(), key=lambda row: (
                    order.index(row["model"]), order.index(row["method"]), row["rate"]))
                write_json(data, path)
                bar.update()
                gc.collect()  # modules and their hooks refer to each other
            del dense, call


def shares(row: dict, dense: dict) -> Dict[str, float]:
    """A row's costs relative to the dense model's; its time to that of the dense calls in between."""
    return {**{name: row[name] / dense[name] for name in ("parameters", "macs", "peak_bytes")},
            "seconds": row["seconds"] / row["dense_seconds"]}


def describe(row: dict) -> str:
    """A row's model and settings in words."""
    model, settings = MODELS[row["model"]], row["settings"]
    parts = [f"latent {settings['latent'] or 'of its own size'}", settings["dtype"], f"timed {settings['rounds']} x",
             f"{settings['layers']} of {model.config['num_layers']} blocks" if settings["layers"] else "",
             "random weights" if model.denoiser else ""]
    return f"{row['model']} ({', '.join(filter(None, parts))})"


def origin(data: dict) -> str:
    """Where the numbers come from."""
    versions = ", ".join(f"{name} {data['versions'][name]}" for name in ("python", "torch", "diffusers"))
    return (f"On {data['machine']['device']}, {data['machine']['threads']} threads, {versions}. Shares of dense, whose "
            "calls (one latent) are timed in turn with the pruned ones. A rate is a share of what the method prunes.")


def table(data: dict) -> str:
    """Everything measured, in Markdown."""
    lines = [origin(data), "", *(f"- `{name}`: {way.help}" for name, way in WAYS.items())]
    for row in data["rows"]:
        cells = [f"`{row['method']}`", f"{row['rate']:g}"]
        if row["method"] == "dense":
            dense = row
            lines += ["", f"**{describe(row)}**. Dense: {row['parameters'] / 1e6:,.1f} M parameters, "
                      f"{row['macs'] / 1e9:,.3g} GMACs, {row['peak_bytes'] / 1e9:,.3g} GB at most, "
                      f"{1000 * row['seconds']:,.4g} ms a call.", "",
                      "| method | rate | parameters | MACs | peak memory | time | pruning takes | |", "|---" * 8 + "|"]
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
        lines += ["", "Time over width of a pair of layers, into a width near 1024 or 1536 and out of it, relative to "
                  "multiples of 64.", "", "| width is a multiple of | " + " | ".join(multiples) + " |",
                  "|---" * (1 + len(multiples)) + "|"]
        for row in data["widths"]:
            times = " | ".join(f"{row['times'][multiple]:.2f}" for multiple in multiples)
            lines.append(f"| {row['layer']}, {row['dtype']} | {times} |")
    return "\n".join(lines) + "\n"


@rc_context(plots.STYLE)
def draw(data: dict, path: Path) -> None:
    """A panel a model: the share of dense's MACs as lines and of its time as markers, over the rate."""
    dense = {row["model"]: row for row in data["rows"] if row["method"] == "dense"}
    rows = [row for row in data["rows"] if row["method"] in WAYS and "seconds" in row]
    names = [*METHODS, *(way for way in WAYS if way not in METHODS)]  # ours have the colours of the other figures
    lines = {way: plots.LINES[names.index(way) % len(plots.LINES)] for way in WAYS
             if any(row["method"] == way for row in rows)}
    columns = min(2, len(dense))
    figure = Figure(figsize=(4.8 * columns + 1.5, 3.3 * -(-len(dense) // columns) + 1.2), layout="constrained")
    for i, (name, base) in enumerate(dense.items()):
        axes = figure.add_subplot(-(-len(dense) // columns), columns, i + 1)
        for way, line in lines.items():
            own = [row for row in rows if (row["model"], row["method"]) == (name, way)]
            rates = [row["rate"] for row in own]
            axes.plot([0, *rates], [1, *(shares(row, base)["macs"] for row in own)], color=line.colour)
            axes.plot(rates, [shares(row, base)["seconds"] for row in own], line.marker, color=line.colour,
                      markeredgecolor="white", markeredgewidth=0.6)
        axes.set_title(textwrap.fill(describe(base), 50))
        axes.set(xlabel="pruning rate", ylabel="share of dense\n(lines: MACs, markers: time)", xlim=(0, 1))
        axes.set_ylim(bottom=0)
    handles = [axes.plot([], [], color=line.colour, marker=line.marker)[0] for line in lines.values()]
    figure.legend(handles, list(lines), loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle("What pruning gains: costs of a denoiser call")
    figure.supxlabel(textwrap.fill(origin(data), int(16 * figure.get_figwidth()), break_on_hyphens=False),
                     fontsize=8, color="0.3", x=0.02, ha="left")
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150)


def read(path: Path, header: dict) -> dict:
    """The rows measured so far. Raises UserError where they are of another machine or other versions."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**header, "rows": [], "widths": []}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for name, value in header.items():
        if data.get(name) != value:
            raise UserError(f"{path} was measured with {name} {data.get(name)}, now it is {value}: use another "
                            "--output_dir, or remove the file")
    return data


def main(argv=None) -> None:
    """Measure what is missing, then print and draw all that is there."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--models", nargs="+", type=cli.name_in("model", MODELS), default=list(MODELS),
                        help="what to prune")
    parser.add_argument("--methods", nargs="+", type=cli.name_in("method", WAYS), default=list(WAYS),
                        help="; ".join(f"{name}: {way.help}" for name, way in WAYS.items()))
    parser.add_argument("--rates", nargs="+", type=cli.rate, default=list(RATES), help="pruning rates")
    parser.add_argument("--peers_on_big", action="store_true", help="measure masks and other libraries at every rate "
                        "on models of random weights too; else at one rate, torch_masks (3 x the weights) at none")
    parser.add_argument("--rounds", type=cli.positive, help="in which dense and pruned are timed in turn (default: "
                        + ", ".join(f"{name} {model.rounds}" for name, model in MODELS.items()) + ")")
    parser.add_argument("--latent", type=cli.positive, help="side of the latent (default: the model's own; on the "
                        "CPU " + ", ".join(f"{n} {m.latents['cpu']}" for n, m in MODELS.items() if m.latents) + ")")
    parser.add_argument("--layers", type=cli.positive, help="blocks of sd3 (default: all 24; on the CPU 6)")
    parser.add_argument("--widths", action="store_true", help="instead of models, time layers of even and odd widths")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", type=cli.name_in("dtype", ("float32", "float16", "bfloat16")),
                        help="(default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks", help="where results go")
    parser.add_argument("--overwrite", action="store_true", help="measure these models, or the widths, afresh")
    args = parser.parse_args(argv)
    args.rates = sorted(set(args.rates))

    device = pipelines.pick_device(args.device)
    header = {"machine": pipelines.machine(device), "versions": pipelines.versions()}
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

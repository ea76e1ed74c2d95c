"""Calibration of denoisers of published sizes with random weights: what each part takes in time and memory.

Input moments are gathered for the group of layers that holds the widest one, as many layers as fit the memory given.
Then the widest layer is pruned by one step of `reconstruct`, and the widest layer behind units is put in order as
`structured` and `attention_heads` do. What the whole model takes follows from the multiply-accumulates of both.

example:
  python benchmarks/calibration.py --models sd15 --memory 4
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

import time

import torch

from benchmarks import denoisers
from benchmarks.big_models import in_own_process, peak_resident_bytes
from pruning import UserError, cli
from pruning.methods import greedy, moments, probes, reconstruct, surgery
from pruning.methods.calibration import GIB, Calibration, answer

RATE = 0.5
MODELS = {name: denoisers.MODELS[name] for name in ("sd15", "sd3", "flux")}
BLOCKS = {"sd3": 24, "flux": 2}  # blocks to build, also on a CPU
COLUMNS = ("model", "blocks", "a call, s", "moments, GiB in groups", "group measured: layers, GiB",
           "gathering it, s a call", "a probed call, s", "a step of the widest layer: inputs, s",
           f"all layers at {RATE}, min", "order of the widest layer: inputs, units, s", "all orders, min",
           "peak memory, GiB: model + rest")


def measure(name: str, device: str, calls: int, memory: float) -> list:
    """Calibrate a fresh model, prune and order its widest layers, and return a row of the table."""
    model, before = MODELS[name], peak_resident_bytes()
    settings = {"latent": model.latents[torch.device(device).type], "dtype": "float32", "layers": BLOCKS.get(name)}
    denoiser, arguments = denoisers.random_denoiser(model, settings, device)
    size = sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())
    with torch.no_grad():
        recorded = [(arguments, answer(denoiser, arguments).cpu())] * calls
        call_seconds, _ = timed(answer, denoiser, arguments)
    calibration = Calibration(lambda: recorded, 0, first_batch=1, memory=int(memory * GIB))
    layers = moments.prunable_layers(denoiser)
    sizes = {key: moments.moment_bytes(layer) for key, layer in layers.items()}
    groups = moments.memory_groups(sizes, calibration.memory)
    widest = max(sizes, key=sizes.get)
    group = {key: layers[key] for key in next(each for each in groups if widest in each)}

    gathering, sums = timed(moments.input_sums, denoiser, dict.fromkeys(range(calls), arguments), [1.0] * calls, group,
                            0)
    gathered = moments.Moments(calibration.folder / "moments-uniform", list(layers))
    while sums:
        key, (total, mean, count) = sums.popitem()
        gathered.write(key, total.div_(count), mean.div_(count))
    del total
    probing, energies = timed(probes.row_energies, denoiser, probes.probed_calls(recorded, 1), None, layers, 0)
    calibration.keep("row energies", lambda: {key: energy.cpu() for key, energy in energies.items()})

    layer = layers[widest]
    first_step = round(reconstruct.SHARE * layer.weight.numel())
    solve = reconstruct.solver(denoiser, gathered, calibration, share=reconstruct.SHARE)
    stepping, _ = timed(lambda: next(solve(widest, layer, [first_step])))
    steps = len(list(reconstruct.steps([round(RATE * layer.weight.numel())], layer.weight.numel(), reconstruct.SHARE)))
    work = sum(each.weight.numel() * moments.as_rows(each).shape[-1] for each in layers.values())
    pruning = stepping * steps * work / (layer.weight.numel() * moments.as_rows(layer).shape[-1])

    # One matrix of moments stands for those of any layer as wide: how long its order takes does not depend on values.
    behind = [(each, width_of(each)) for each in surgery.survey(denoiser, *surgery.UNITS)[0]]
    behind.sort(key=lambda each: each[1])
    ordered, width = behind[-1]
    rows = torch.randn(width // 4, width, device=device)
    matrix = rows.T @ rows / len(rows)
    own = list(ordered.columns().values())[0]
    places = own.layer.weight[0, 0].numel()
    columns = greedy.Columns(moments.as_rows(own.layer).detach()[0], matrix, own.first * places,
                             own.count // ordered.units * places)
    ordering, _ = timed(greedy.order, [columns], ordered.units, ordered.norm_groups)
    orders = ordering * sum(each ** 3 * len(other.column_layers()) for other, each in behind) / width ** 3
    peak = peak_resident_bytes() - before
    return [f"{name}, {size / 4e6:,.0f} M", BLOCKS.get(name, "all"), f"{call_seconds:.1f}",
            f"{sum(sizes.values()) / GIB:.1f} in {len(groups)}",
            f"{len(group)}, {sum(sizes[key] for key in group) / GIB:.2f}", f"{gathering / calls:.1f}", f"{probing:.0f}",
            f"{moments.as_rows(layer).shape[-1]:,}, {stepping:.0f}", f"{pruning / 60:.0f}",
            f"{width:,}, {ordered.units:,} {ordered.kind.unit}, {ordering:.0f}", f"{orders / 60:.0f}",
            f"{size / GIB:.1f} + {(peak - size) / GIB:.1f}"]


def width_of(group: surgery.Group) -> int:
    """Return how many inputs the widest layer behind the units has."""
    return max(moments.as_rows(layer).shape[-1] for layer in group.column_layers().values())


def timed(run, *args) -> tuple:
    """Return the seconds that run(*args) takes, and what it returns."""
    started = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - started, result


def main(argv=None) -> None:
    """Measure each model in a process of its own, and print a table in Markdown."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--models", nargs="+", type=cli.one_of("model", MODELS), default=list(MODELS),
                        help="models to calibrate")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB of moments in memory together")
    parser.add_argument("--calls", type=int, default=2, help="calls to gather from")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the denoiser")
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("peak memory is read from /proc, which only Linux has")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in args.models:
        row = in_own_process(measure, name, args.device, args.calls, args.memory)
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    cli.run(main)

"""Calibrate and re-fit denoisers of published sizes with random weights: time and peak memory of one group of layers.

Moments are gathered for one group of layers that fits the memory given, and these layers are pruned by `reconstruct`.
From that, the time for the whole model follows.

example:
  python benchmarks/calibration.py --models sd15 --memory 4
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

import multiprocessing
import time

import torch

from benchmarks import denoisers
from benchmarks.big_models import peak_resident_bytes
from pruning import UserError, cli
from pruning.methods import moments, probes, reconstruct
from pruning.methods.calibration import GIB, Calibration, answer

RATE = 0.5
MODELS = {name: denoisers.MODELS[name] for name in ("sd15", "sd3", "flux")}
BLOCKS = {"sd3": 24, "flux": 2}  # blocks to build, also on a CPU


def measure(name: str, device: str, calls: int, memory: float) -> str:
    """Calibrate and prune one group of layers of a fresh model, and return a row of the table, in Markdown."""
    model, before = MODELS[name], peak_resident_bytes()
    settings = {"latent": model.latents[torch.device(device).type], "dtype": "float32",
                "layers": BLOCKS.get(name)}
    denoiser, arguments = denoisers.random_denoiser(model, settings, device)
    size = sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())
    with torch.no_grad():
        recorded = [(arguments, answer(denoiser, arguments).cpu())] * calls
        started = time.perf_counter()
        answer(denoiser, arguments)
        call_seconds = time.perf_counter() - started
    calibration = Calibration(lambda: recorded, 0, first_batch=1, memory=int(memory * GIB))
    layers = moments.prunable_layers(denoiser)
    sizes = {key: moments.moment_bytes(layer) for key, layer in layers.items()}
    groups = moments.memory_groups(sizes, calibration.memory)
    largest = max(sizes, key=sizes.get)
    group = {key: layers[key] for key in next(each for each in groups if largest in each)}

    started = time.perf_counter()
    sums = moments.input_sums(denoiser, dict.fromkeys(range(calls), arguments), [1.0] * calls, group, 0)
    gathering = (time.perf_counter() - started) / calls
    gathered = moments.Moments(calibration.folder / "moments-uniform", list(layers))
    while sums:
        key, (total, mean, count) = sums.popitem()
        gathered.write(key, total.div_(count), mean.div_(count))
    del total
    started = time.perf_counter()
    probed = probes.row_energies(denoiser, probes.probed_calls(recorded, 1), None, layers, 0)
    probing = time.perf_counter() - started
    calibration.keep("row energies", lambda: {key: energy.cpu() for key, energy in probed.items()})
    solve = reconstruct.solver(denoiser, gathered, calibration)
    started = time.perf_counter()
    for key, layer in group.items():
        weight, _ = next(solve(key, layer, [round(RATE * layer.weight.numel())]))
        layer.weight.data.copy_(weight)
    solving = time.perf_counter() - started
    peak = peak_resident_bytes() - before
    work = sum(layer.weight.numel() * moments.as_rows(layer).shape[-1] for layer in layers.values())
    own = sum(layer.weight.numel() * moments.as_rows(layer).shape[-1] for layer in group.values())
    total = len(groups) * gathering
    return (f"| {name}, {size / 4e6:,.0f} M | {call_seconds:.1f} | {sum(sizes.values()) / GIB:.1f} in {len(groups)} "
            f"| {len(group)}, {sum(sizes[key] for key in group) / GIB:.2f} | {gathering:.1f} | {probing:.0f} "
            f"| {solving:.0f} | {total:.0f} s a call, {solving * work / own / 60:.0f} min a rate "
            f"| {size / GIB:.1f} + {(peak - size) / GIB:.1f} |")


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
    print("| model | call, s | moments, GiB in groups | layers measured, GiB | gathering, s a call | a probed call, s "
          f"| pruning at {RATE}, s | all groups | peak memory, GiB: model + rest |")
    print("|---|---|---|---|---|---|---|---|---|")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in args.models:
            print(pool.apply(measure, (name, args.device, args.calls, args.memory)), flush=True)


if __name__ == "__main__":
    cli.run(main)

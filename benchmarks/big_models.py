"""Prune UNets of published sizes with random weights: seconds, and peak memory relative to the size of the model.

With --recovery, train them instead: core seconds a step, and peak memory beside what was reckoned before.

example:
  python benchmarks/big_models.py --models sd15 sdxl --rate 0.5
  python benchmarks/big_models.py --models sd15 --recovery 3
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from diffusers import UNet2DConditionModel, logging

from benchmarks import denoisers
from pruning import UserError, cli, methods
from pruning.methods import recovery
from pruning.methods.calibration import Calibration
from pruning.records.words import gigabytes

# name -> dtype
MODELS = {"sd15": torch.float32, "sdxl": torch.bfloat16}
BY_NORM = {"criterion": "norm", "refit": False}  # the time of calibration is measured by calibration.py
LATENTS, SIDE = 2, 16  # of a recorded call in recovery
CASES = (("magnitude", {"scope": "layer"}), ("magnitude", {"scope": "global"}),
         ("iterative", {"scope": "global", "recovery_steps": 0}), ("structured", BY_NORM), ("attention_heads", BY_NORM))


def build(name: str):
    """Return a UNet of MODELS in eval mode, with random weights. diffusers' own initialisation would take minutes."""
    logging.set_verbosity_error()  # .to(dtype) would warn
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**denoisers.MODELS[name].config).to(MODELS[name])
    denoiser.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.uniform_(-0.05, 0.05)
    return denoiser.eval()


def in_own_process(function, *arguments):
    """Return function(*arguments), called in a new process: a process does not return all the memory that it frees.

    The function is one of a file's own; what it gets and returns must be small.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measure(name: str, method: str, options: dict, rate: float) -> str:
    """Prune a fresh model by a method and return a row of the table, in Markdown."""
    before = peak_resident_bytes()
    denoiser = build(name)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    size = parameters * denoiser.dtype.itemsize
    started = time.perf_counter()
    methods.prune(method, denoiser, rate, **options)
    seconds, peak = time.perf_counter() - started, peak_resident_bytes() - before
    how = " ".join([method, ", ".join(f"{option}={value}" for option, value in options.items())]).strip()
    return (f"| {name}, {parameters / 1e6:,.0f} M, {str(denoiser.dtype)[6:]} | {how} | {seconds:.1f} "
            f"| {peak / size:.2f} |")


def measure_recovery(name: str, steps: int) -> str:
    """Train a fresh model for some steps with gradient checkpointing, and return a row of the table, in Markdown."""
    before = peak_resident_bytes()
    denoiser = build(name)
    shapes = {key: (LATENTS, *shape[1:]) for key, shape in denoisers.MODELS[name].inputs(SIDE).items()}
    calls = [(denoisers.random_inputs(shapes, denoiser), torch.randn(shapes["sample"]).to(denoiser.dtype))
             for _ in range(recovery.CALLS_PER_STEP)]
    calibration = Calibration(lambda: calls, 0, recompute=True)
    with recovery.training(denoiser, {}, calibration) as memory:
        started = time.process_time()  # of all cores, so that other processes do not count
        recovery.recover(denoiser, {}, calibration, steps, "0")
    seconds, peak = (time.process_time() - started) / steps, peak_resident_bytes() - before
    parameters, reckoned = sum(parameter.numel() for parameter in denoiser.parameters()), memory.split(";")[0]
    return (f"| {name}, {parameters / 1e6:,.0f} M, {str(denoiser.dtype)[6:]} | {seconds:.0f} "
            f"| {reckoned.replace('recovery takes ', '')} | {gigabytes(peak)} |")


def main(argv=None) -> None:
    """Prune a fresh model by each method of CASES, or train it, and print a table in Markdown."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--models", nargs="+", type=cli.one_of("model", MODELS), default=list(MODELS),
                        help="models to prune")
    parser.add_argument("--rate", type=cli.rate, default=0.5, help="pruning rate")
    parser.add_argument("--recovery", type=cli.positive, metavar="STEPS",
                        help=f"train for so many steps of {recovery.CALLS_PER_STEP} calls instead of pruning")
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("peak memory is read from /proc, which only Linux has")
    print("| model | core seconds a step | reckoned before | peak memory |\n|---|---|---|---|" if args.recovery else
          "| model | method | seconds | peak memory ÷ model |\n|---|---|---|---|")
    for name in args.models:
        if args.recovery:
            print(in_own_process(measure_recovery, name, args.recovery), flush=True)
            continue
        for method, options in CASES:
            print(in_own_process(measure, name, method, options, args.rate), flush=True)


if __name__ == "__main__":
    cli.run(main)

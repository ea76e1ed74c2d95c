"""Prune UNets of published sizes with random weights: seconds, and peak memory relative to the size of the model.

example:
  python benchmarks/big_models.py --models sd15 sdxl --rate 0.5
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
from diffusers import UNet2DConditionModel, logging

from benchmarks import denoisers
from pruning import UserError, cli, methods

# name -> dtype
MODELS = {"sd15": torch.float32, "sdxl": torch.bfloat16}
BY_NORM = {"criterion": "norm", "refit": False}  # the time of calibration is measured by calibration.py
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


def main(argv=None) -> None:
    """Prune a fresh model by each method of CASES, and print a table in Markdown."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--models", nargs="+", type=cli.one_of("model", MODELS), default=list(MODELS),
                        help="models to prune")
    parser.add_argument("--rate", type=cli.rate, default=0.5, help="pruning rate")
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("peak memory is read from /proc, which only Linux has")
    print("| model | method | seconds | peak memory ÷ model |\n|---|---|---|---|")
    # Each case runs in a process of its own, as a process does not return all the memory that it frees.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in args.models:
            for method, options in CASES:
                print(pool.apply(measure, (name, method, options, args.rate)), flush=True)


if __name__ == "__main__":
    cli.run(main)

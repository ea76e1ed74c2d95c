"""Say what of a model each method can reach, and about what a sweep takes, before anything large is fetched.

Only configs are read, no weights.

example:
  python pruning/check_model.py --model stabilityai/stable-diffusion-3.5-medium --num_images 50
"""
from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of pruning/, whose names must not shadow packages

from typing import Dict, List

from pruning import cli, methods
from pruning.data import DATASETS
from pruning.methods import unreached_by_reason
from pruning.models import pipelines, signature
from pruning.records.tables import Table, wrapped
from pruning.records.words import duration, gigabytes

POINTS = 10  # of a sweep: nine rates and the dense model
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def reach_table(denoiser) -> Table:
    """A row for each group of methods that reach the same, with the share of the parameters that these are."""
    from pruning.methods import reach
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    shares: Dict[str, List[str]] = {}
    for method, own in reach.by_method(denoiser).items():
        shares.setdefault(f"{100 * sum(own.values()) / total:.1f}", []).append(method)
    left = unreached_by_reason(reach.by_units(denoiser)[1])
    notes = ["Not reached by any method that removes units: " + ", ".join(
        f"{100 * count / total:.1f} % {why}" for why, count in left.items())] if left else []
    return Table("", ["methods", "reach, in % of the denoiser"],
                 [[", ".join(names), share] for share, names in shares.items()], notes, ["left", "right"])


def baselines_text(found, guidance_scale: float) -> str:
    """Return what can be measured to compare pruning with, and why other baselines cannot."""
    why = {name: methods.why_not(name, found, guidance_scale) for name in methods.BASELINES}
    return (f"To compare with: --baselines {' '.join(name for name in why if not why[name])}." + "".join(
        f" No {name}: {reason}." for name, reason in why.items() if reason))


def memory_text(found, dtype: str) -> str:
    """Return what the parts of a pipeline weigh, and what a sweep needs beside them."""
    from pruning.methods import reckoning
    trained = reckoning.without_activations(found.parts[found.denoiser]).total
    sizes = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in found.parts.items()}
    own = sizes.pop(found.denoiser)
    unknown = "".join(f" Not counted: {name} ({why})." for name, why in found.unknown.items())
    return (f"Weights in {dtype}: {gigabytes(own * BYTES[dtype])} for the denoiser of {own / 1e6:,.1f} million "
            f"parameters, {gigabytes(sum(sizes.values()) * BYTES[dtype])} for the other parts.{unknown} A sweep holds "
            "the denoiser twice, dense and pruned. Methods that calibrate gather moments within --calibration_memory. "
            f"Recovery and iterative train in float32, which takes {gigabytes(trained)} and what a call's activations "
            "take.")


def time_text(found, settings: dict, images: int, device: str, dtype: str) -> str:
    """Return about how long the denoiser works for an image and for a sweep, by a matrix product on this device."""
    from pruning.models import skeleton
    macs, speed = skeleton.count_macs(found, settings["image_size"]), skeleton.macs_a_second(device, dtype)
    twice = signature.guides_twice(found.pipeline, found.parts[found.denoiser], settings["guidance_scale"])
    calls = settings["steps"] * (2 if twice else 1)
    seconds = calls * macs / speed
    return (f"An image of {settings['image_size']} x {settings['image_size']} pixels in {settings['steps']} steps at "
            f"guidance {settings['guidance_scale']:g} takes the denoiser about {_macs(calls * macs)}. On {device} a "
            f"matrix product in {dtype} makes {_macs(speed)} a second. So an image takes {duration(seconds)} or more, "
            f"and a sweep of {images} images at {POINTS - 1} rates and dense "
            f"{duration(POINTS * images * seconds)} or more.")


def _macs(count: float) -> str:
    scale, unit = (1e12, "trillion") if count >= 1e12 else (1e9, "billion")
    return f"{float(f'{count / scale:.2g}'):,g} {unit} multiply-accumulates"


def main(argv=None) -> None:
    """Print what of the command line's model the methods can reach, and what a sweep takes."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", default=DATASETS["shapes"].default_model,
                        help="a bundled model, a pipeline folder or a hub id")
    parser.add_argument("--num_images", type=cli.positive, default=32, help="images a rate")
    cli.add_sampling_flags(parser)
    args = parser.parse_args(argv)
    from pruning.models import skeleton  # here, so that --help needs no torch
    device = pipelines.pick_device(args.device)
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    found = skeleton.load(args.model)
    denoiser = found.parts[found.denoiser]
    settings = skeleton.sampling(found, {name: getattr(args, name) for name in (
        "steps", "guidance_scale", "image_size")}, args.model)
    kind = type(found.pipeline).__name__
    print("\n\n".join([f"{args.model}: a {kind}, of which a {type(denoiser).__name__} is pruned",
                       str(reach_table(denoiser)), wrapped(baselines_text(found, settings["guidance_scale"])),
                       wrapped(memory_text(found, dtype)),
                       wrapped(time_text(found, settings, args.num_images, device, dtype))]))


if __name__ == "__main__":
    cli.run(main)

"""Measure how much a pruned model depends on the captions that it is calibrated on: the same prompts, other captions.

Flags that this program does not know go to pruning/test_single_rate.py.

example:
  python benchmarks/calibration_sets.py --method structured --rates 0.5 0.7 --calibration_images 32
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

import subprocess
import tempfile
from typing import Sequence

import numpy as np

from pruning import UserError, cli, data
from pruning.metrics import backbones, scores
from pruning.models import generation, pipelines

BATCH = 16


def prune(model: str, method: str, rate: float, seed: int, flags: Sequence[str], folder: Path) -> Path:
    """Prune a model with calibration captions that the seed chooses, and return the folder of the pruned model.

    Raises UserError if the command that prunes fails, which says why itself.
    """
    kept = folder / f"pruned-{rate:g}-{seed}"
    done = subprocess.run([sys.executable, str(ROOT / "pruning" / "test_single_rate.py"), "--model", model,
                           "--method", method, "--rate", str(rate), "--seed", str(seed), "--num_images", "1",
                           "--metrics", "clip_score", "--results_dir", str(folder / str(seed)),
                           "--save_pruned", str(kept), *flags], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{method} could not prune {model} to {rate:g}; the line above says why")
    return kept


def main(argv=None) -> None:
    """Print a row for each rate: what each calibration keeps, and how much the calibrations differ."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", default="shapes-unet", help="the dense model")
    parser.add_argument("--method", default="structured", help="a method that calibrates")
    parser.add_argument("--rates", nargs="+", type=cli.rate, default=[0.5], help="pruning rates")
    parser.add_argument("--calibrations", type=cli.positive, default=5, help="how many sets of captions")
    parser.add_argument("--num_images", type=cli.positive, default=128, help="captions that are measured")
    parser.add_argument("--seed", type=int, default=1, help="chooses the captions that are measured, and the noise")
    args, flags = parser.parse_known_args(argv)
    samples, _ = data.load_samples("shapes", args.num_images, args.seed)
    clip, perceptual = (backbones.load_backbone("bundled", family) for family in ("clip", "lpips"))
    captions, _ = backbones.embed_captions(clip, [sample.caption for sample in samples])

    def drawn(model: str):
        pipeline = pipelines.load_pipeline(model)
        sampling = {**pipelines.sampling_settings(pipeline, args.model), "seed": args.seed, "batch_size": BATCH}
        pixels = generation.generate(pipeline, samples, **sampling).pixels
        return pixels, scores.clip_score(backbones.describe("clip", clip, pixels), captions).mean()

    dense, dense_score = drawn(args.model)
    print("| method and rate | `clip_score`, % of dense | `lpips_dense` | standard deviations |\n|---|---|---|---|")
    for rate in args.rates:
        with tempfile.TemporaryDirectory() as folder:
            made = [drawn(str(prune(args.model, args.method, rate, args.seed + 1 + number, flags, Path(folder))))
                    for number in range(args.calibrations)]
        shares = [100 * score / dense_score for _, score in made]
        distances = [scores.lpips(perceptual, pixels, dense).mean() for pixels, _ in made]
        print(f"| `{' '.join([args.method, *flags])}` {rate:g} | {', '.join(f'{share:.1f}' for share in shares)} | "
              f"{', '.join(f'{distance:.3f}' for distance in distances)} | {np.std(shares, ddof=1):.1f}, "
              f"{np.std(distances, ddof=1):.3f} |", flush=True)


if __name__ == "__main__":
    cli.run(main)

"""Measure a pruned model beside its dense model with other steps, guidance and noise than it was calibrated with.

example:
  python benchmarks/other_settings.py my-pruned-model --dense shapes-unet --num_images 64
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

from pruning import cli, data
from pruning.metrics import backbones, scores
from pruning.models import generation, pipelines

BATCH = 16


def settings_of(own: dict, seed: int) -> dict:
    """Return name -> settings: the model's own, and one thing changed at a time."""
    guidance = own["guidance_scale"]
    return {"as calibrated": {}, "10 steps": {"steps": 10}, "50 steps": {"steps": 50},
            f"guidance {guidance * 0.6:g}": {"guidance_scale": guidance * 0.6},
            f"guidance {guidance * 1.5:g}": {"guidance_scale": guidance * 1.5}, "other noise": {"seed": seed + 1}}


def main(argv=None) -> None:
    """Print a row for each setting: clip_score dense and pruned, the share that stays, lpips_dense."""
    parser = cli.Parser(__doc__)
    parser.add_argument("pruned", type=Path, help="a folder that --save_pruned wrote")
    parser.add_argument("--dense", default="shapes-unet", help="the dense model")
    parser.add_argument("--num_images", type=int, default=64, help="captions of the shapes data set")
    parser.add_argument("--seed", type=int, default=1, help="chooses the captions and the noise")
    args = parser.parse_args(argv)
    samples, _ = data.load_samples("shapes", args.num_images, args.seed)
    clip, perceptual = (backbones.load_backbone("bundled", family) for family in ("clip", "lpips"))
    captions, _ = backbones.embed_captions(clip, [sample.caption for sample in samples])
    loaded = {name: pipelines.load_pipeline(name) for name in (args.dense, str(args.pruned))}
    own = pipelines.sampling_settings(loaded[args.dense], args.dense)
    print("| setting | clip_score dense | pruned | share | lpips_dense |\n|---|---|---|---|---|")
    for name, changed in settings_of(own, args.seed).items():
        sampling = {**own, "seed": args.seed, "batch_size": BATCH, **changed}
        images = [generation.generate(pipeline, samples, **sampling).pixels for pipeline in loaded.values()]
        dense, pruned = (scores.clip_score(backbones.describe("clip", clip, each), captions).mean() for each in images)
        distance = scores.lpips(perceptual, images[1], images[0]).mean()
        print(f"| {name} | {dense:.2f} | {pruned:.2f} | {100 * pruned / dense:.1f} % | {distance:.3f} |", flush=True)


if __name__ == "__main__":
    cli.run(main)

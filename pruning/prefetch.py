"""Fetch all that a run needs, model, data and metric networks, and say how to run without a network.

example:
  python pruning/prefetch.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset coco --num_images 50
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

import hashlib
import os
from typing import Dict, List

from tqdm import tqdm

from pruning import cli, data, metrics
from pruning.data import DATASETS
from pruning.metrics import BACKBONES, METRICS
from pruning.models import pipelines

# What the libraries read to stay off the network, and where each keeps what it fetched.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
CACHES = ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "PRUNING_CACHE")


def fetch(args) -> Dict[str, List[Path]]:
    """Bring everything to this machine: part -> its files."""
    found = {}
    samples, _ = data.load_samples(args.dataset, args.num_images, args.seed, args.data_dir)
    others = data.other_samples(args.dataset, samples, args.seed, args.data_dir)
    images = {sample.open_image.args[0] for sample in (*samples, *others)} if args.dataset != "shapes" else set()
    found[f"{args.dataset}, {len(images) or args.num_images} images"] = sorted(images)
    model = args.model or DATASETS[args.dataset].default_model
    found[f"model {model}"] = pipelines.fetch(model)
    kind = args.metric_backbones or DATASETS[args.dataset].backbones
    for family in sorted({METRICS[name].backbone for name in METRICS} - {None}):
        found[f"metric network {BACKBONES[kind][family]}"] = metrics.backbone_files(kind, family)
    return found


def digest(files: List[Path]) -> str:
    """SHA-256 over the names and contents of files, in their order; the first 16 hex digits."""
    total = hashlib.sha256()
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, desc="hashing", delay=2,
              leave=False) as bar:
        for file in files:
            total.update(file.name.encode())
            with open(file, "rb") as data:
                for chunk in iter(lambda: data.read(2 ** 20), b""):
                    total.update(chunk)
                    bar.update(len(chunk))
    return total.hexdigest()[:16]


def main(argv=None) -> None:
    """Parse the command line, fetch, print what is there and the environment of an offline run."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", help="a hub id, pipeline folder or bundled name (default: by dataset)")
    parser.add_argument("--dataset", type=cli.name_in("dataset", DATASETS), default="shapes", help="what to draw")
    parser.add_argument("--data_dir", type=Path, help="the data set's folder (default: fetched where it can be)")
    parser.add_argument("--num_images", type=cli.positive, default=32, help="images a rate of the run to come")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="of the run to come, chooses samples")
    parser.add_argument("--metric_backbones", type=cli.name_in("metric backbones", BACKBONES),
                        help="networks behind the metrics (default: by dataset)")
    args = parser.parse_args(argv)
    for part, files in fetch(args).items():
        size = sum(file.stat().st_size for file in files) / 1e6
        print(f"{part}: {len(files)} files, {size:,.1f} MB, sha256 {digest(files)}" if files else f"{part}: from code")
    print("\nAll is here. Where there is no network, run with:")
    for name, value in {**OFFLINE, **{name: os.environ[name] for name in CACHES if name in os.environ}}.items():
        print(f"export {name}={value}")


if __name__ == "__main__":
    cli.run(main)

"""Fetch the model, the data and the metric networks of a later run, and print how to run without a network.

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

from pruning import cli, data
from pruning.data import DATASETS
from pruning.data.faults import tell
from pruning.metrics import BACKBONES, DEFAULT, METRICS, backbones, check_networks
from pruning.models import pipelines
from pruning.progress import tqdm

# The variables that keep the libraries offline, and those that say where fetched files lie.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
CACHES = ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "PRUNING_CACHE")


def fetch(args) -> Dict[str, List[Path]]:
    """Fetch everything that a run with these arguments needs. Return {part: its files}; scenes and prompts have none.

    Raises UserError if a part is unknown or cannot be fetched.
    """
    found, kind = {}, args.metric_backbones or DATASETS[args.dataset].backbones
    check_networks(args.metrics or (), kind)
    samples, faults = data.load_samples(args.dataset, args.num_images, args.seed, args.data_dir)
    originals = DATASETS[args.dataset].originals
    reference = data.reference_samples(args.dataset, samples, args.data_dir)
    others, left_out = data.other_samples(args.dataset, samples, args.seed, args.data_dir) if originals else ([], {})
    tell({**faults, **left_out})
    images = {sample.file for sample in (*samples, *reference, *others)} - {None}
    found[f"{args.dataset}, {len(images) or args.num_images} {'images' if originals else 'prompts'}"] = sorted(images)
    model = args.model or DATASETS[args.dataset].default_model
    found[f"model {model}"] = pipelines.fetch(model)
    for family in sorted({METRICS[name].backbone for name in args.metrics or DEFAULT} - {None}):
        found[f"metric network {BACKBONES[kind][family]}"] = backbones.backbone_files(kind, family)
    return found


def digest(files: List[Path]) -> str:
    """Return the first 16 hex digits of the SHA-256 hash of the names and contents of `files`, in their order."""
    total = hashlib.sha256()
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, desc="hashing", delay=2,
              leave=False) as bar:
        for file in files:
            total.update(file.name.encode())
            with open(file, "rb") as content:
                for chunk in iter(lambda: content.read(2 ** 20), b""):
                    total.update(chunk)
                    bar.update(len(chunk))
    return total.hexdigest()[:16]


def main(argv=None) -> None:
    """Fetch what the command line names. Print the parts with their hashes, and the environment of an offline run."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", help="a hub id, pipeline folder or bundled name (default: that of the data set)")
    parser.add_argument("--dataset", type=cli.one_of("dataset", DATASETS), default="shapes",
                        help="the data set of the later run")
    parser.add_argument("--data_dir", type=Path,
                        help="the folder of the data set (default: fetch the data set if possible)")
    parser.add_argument("--num_images", type=cli.positive, default=32, help="images per rate of the later run")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="the later run's seed, which chooses samples")
    parser.add_argument("--metrics", nargs="+", type=cli.one_of("metric", METRICS),
                        help=f"metrics of the later run (default: {' '.join(DEFAULT)})")
    parser.add_argument("--metric_backbones", type=cli.one_of("metric backbones", BACKBONES),
                        help="the networks of the metrics (default: those of the data set)")
    args = parser.parse_args(argv)
    for part, files in fetch(args).items():
        size = sum(file.stat().st_size for file in files) / 1e6
        print(f"{part}: {len(files)} files, {size:,.1f} MB, sha256 {digest(files)}" if files else
              f"{part}: no images to fetch")
    print("\nEverything is on this machine. For a run without a network, set:")
    for name, value in {**OFFLINE, **{name: os.environ[name] for name in CACHES if name in os.environ}}.items():
        print(f"export {name}={value}")


if __name__ == "__main__":
    cli.run(main)

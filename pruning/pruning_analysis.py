"""Sweep a pruning method over rates: prune, make images, measure, record, draw.

example:
  python pruning/pruning_analysis.py --method magnitude --num_images 50 --dataset coco
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

import math
from dataclasses import replace
from typing import Callable, Dict, Optional

import numpy as np

from pruning import UserError, cli, distributed, sweep
from pruning.experiment import Experiment
from pruning.methods import BASELINES, METHODS, unreached_by_reason
from pruning.metrics import METRICS, scores
from pruning.records.answers import brief
from pruning.records.record import Point
from pruning.records.summaries import ends_of_sensitivity, sensitivity_summary, summary
from pruning.records.tables import wrapped
from pruning.steps import (
    add_seconds,
    compile_denoisers,
    count_costs,
    load_images,
    make_images,
    measure_images,
    observe_step,
    prune_copy,
    save_pruned,
    time_calls,
)

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def run_pruning_experiment(experiment: Experiment, rate: float, dense: Optional[Point] = None,
                           measured: Optional[Point] = None, save_to: Optional[Path] = None,
                           on_batch: Optional[Callable[[int, float], None]] = None) -> Optional[Point]:
    """Measure one point: prune the dense denoiser to `rate`, make the images, measure them. Rate 0 is the dense model.

    Of a baseline, the denoiser stays dense and the images are drawn in another way.

    dense: the dense model's point, for all rates but 0; its images are read from disk.
    measured: the point of an earlier run that lacks metrics; its images are read from disk if they are there.
    save_to: a folder for the pruned pipeline. on_batch(count, seconds_each): called for every batch of images, or
    of several processes for a batch of each.

    Several processes share out the images, and each measures its own. The main process returns the point, the others
    None.
    Raises UserError if the method cannot prune the denoiser, or images or the folder cannot be written.
    """
    seconds: Dict[str, float] = {}
    images = load_images(experiment, rate) if measured else None
    if images is None:
        with add_seconds("prune", seconds):
            denoiser, pruned = prune_copy(experiment, rate)
        with add_seconds("time", seconds):
            counts = count_costs(experiment, denoiser, rate)
            compiled = compile_denoisers(experiment, denoiser)
        with add_seconds("generate", seconds):
            images = make_images(experiment, rate, on_batch)
        if distributed.is_main:
            with add_seconds("time", seconds):
                times = time_calls(experiment, denoiser, rate, images)
                if compiled:
                    observe_step(experiment, compiled, len(experiment.batches[0]))
            measured = Point(
                rate=rate, sparsity=pruned.taken / pruned.total, unit=pruned.unit, units_total=pruned.total,
                units_asked=pruned.asked, units_taken=pruned.taken, skipped_modules=pruned.skipped_modules,
                unreached=unreached_by_reason(pruned.unreached), inexact=pruned.inexact,
                layer_rates={name: layer.rate for name, layer in pruned.layers.items()},
                layer_errors={name: layer.error for name, layer in pruned.layers.items() if layer.error is not None},
                **counts, **times, compiled=compiled and compiled.compiled,
                drawing=pruned.drawing, metrics={}, intervals={}, per_image={}, floors={}, seed_spread={}, seconds={})
    else:
        denoiser, seconds = None, dict(measured.seconds, measure=0.0)
        if on_batch:
            on_batch(len(images.finite), images.seconds_each)

    def measurements(features, rows=None, pixels=None, dense_pixels=None) -> Dict[str, Callable]:
        """Return {metric: the function that measures it}. A new metric is one more line here.

        features(family): what a network of BACKBONES makes of the images, (n, d). A metric with a value for each image
        gets the images in blocks: `pixels`, uint8 (n, size, size, 3), `dense_pixels`, the dense model's from the same
        noise, and `rows`, the positions of their samples. A metric of the whole set gets the features of all images.
        """
        perceptual = experiment.networks.get("lpips")
        return {
            "clip_score": lambda: scores.clip_score(features("clip"), experiment.captions(rows)),
            "kid": lambda: scores.kid(features("features"), experiment.reference["features"]),
            "cmmd": lambda: scores.cmmd(features("clip"), experiment.reference["clip"]),
            "fid": lambda: scores.fid(features("features"), experiment.reference["features"]),
            "lpips": lambda: scores.lpips(perceptual, pixels, experiment.originals(rows)),
            "lpips_dense": lambda: scores.lpips(perceptual, pixels, dense_pixels),
            "ssim_dense": lambda: scores.ssim(pixels, dense_pixels, experiment.device),
            "psnr_dense": lambda: scores.psnr(pixels, dense_pixels, experiment.device),
            "generation_time": lambda: images.seconds_each,
            "pick_score": lambda: scores.pick_score(features("preference"), experiment.captions(rows, "preference"),
                                                    experiment.networks["preference"].scale),
            "image_reward": lambda: scores.image_reward(experiment.networks["reward"], pixels,
                                                        [experiment.samples[row].caption for row in rows]),
        }

    with add_seconds("measure", seconds):
        chosen, seeds = experiment.record.settings["metrics"], experiment.record.settings["seeds"]
        everything = range(len(experiment.samples))
        values, features = measure_images(experiment, measurements, chosen, rate, everything, everything)
        between = between_seeds(experiment, measurements, chosen, seeds) if rate == 0 else {}
        if save_to and denoiser is None:
            denoiser, _ = prune_copy(experiment, rate)  # all processes together
        if not distributed.is_main:
            return None
        whole = measurements(features.get)
        means, per_image, intervals = scores.summarise(
            {name: values[name] if name in values else whole[name]() for name in chosen},
            images.finite, None if rate == 0 else dense.per_image, seeds)
        floors = floors_of(experiment, measurements) if rate == 0 else {}
        spread = seed_spread(per_image, seeds, between) if rate == 0 else {}
    point = replace(measured, metrics=means, intervals=intervals, per_image=per_image, floors=floors,
                    seed_spread=spread, seconds=seconds)
    if save_to:
        save_pruned(experiment, denoiser, save_to, point)
    return point


def floors_of(experiment: Experiment, measurements) -> Dict[str, float]:
    """Return what as many other real images score by each metric against the reference; {} if there are not as many."""
    if not experiment.floor_features:
        return {}
    measure = measurements(experiment.floor_features.get)
    return {name: measure[name]().value for name in experiment.record.settings["metrics"]
            if METRICS[name].against == "reference"}


def between_seeds(experiment: Experiment, measurements, names, seeds: int) -> Dict[str, np.ndarray]:
    """Return {metric: values} of the dense model's images of other seeds against those of the first seed."""
    count = len(experiment.samples) // seeds
    others = range(count, len(experiment.samples))
    against_dense = [name for name in names if METRICS[name].per_image and METRICS[name].against == "dense"]
    return measure_images(experiment, measurements, against_dense, 0.0, others, [row % count for row in others])[0]


def seed_spread(per_image: Dict[str, list], seeds: int, between: Dict[str, np.ndarray]) -> Dict[str, float]:
    """Return how far the dense model is from itself under other noise: smaller changes than that are noise.

    For a metric against the dense images: its mean between the images of the first seed and those of the others.
    That of psnr is infinite if two of these images are equal, and then null in the record.
    For other metrics: the standard deviation of the difference between the means of two seeds.
    """
    if seeds == 1:
        return {}

    def between_means(values: list) -> float:
        deviations = np.array(values, float).reshape(seeds, -1).std(axis=0, ddof=1)
        return math.sqrt(2 * np.mean(deviations ** 2) / deviations.size)
    # Values against the dense images are against themselves here, perhaps without bound: only `between` says anything.
    return {name: float(between[name].mean()) if name in between else between_means(values)
            for name, values in per_image.items()}


def main(argv=None) -> None:
    """Parse the command line, sweep, print the answer, where it is written and what to try next."""
    parser = cli.Parser(__doc__)
    cli.add_measuring_flags(parser)
    parser.add_argument("--num_images", type=cli.positive, default=32, help="images a rate")
    parser.add_argument("--rates", nargs="+", type=cli.rate,
                        help=f"rates to measure (default: {' '.join(map(str, RATES))})")
    parser.add_argument("--results_dir", type=Path, default=cli.RESULTS, help="where records and graphs go")
    parser.add_argument("--shard", type=cli.shard, metavar="i/n",
                        help="measure every n-th rate from the i-th on, as a part for merge_results.py")
    parser.add_argument("--sensitivity", action="store_true",
                        help="measure only how much the denoiser's output depends on each layer, without images")
    parser.add_argument("--baselines", nargs="+", type=cli.one_of("baseline", BASELINES),
                        help="measure also, each as a record of its own, what a user could do instead: " + "; ".join(
                            f"{name}: {METHODS[name].help}" for name in BASELINES))
    parser.add_argument("--verbose", action="store_true", help="print the tables too, which go to files in any case")
    args = parser.parse_args(argv)
    args.rates_by_default = args.rates is None
    args.rates = sorted(set(args.rates or RATES))
    if args.sensitivity and args.baselines:
        raise UserError("--sensitivity measures layers, and --baselines images; leave out one of them")
    if args.sensitivity:
        path, found = sweep.measure_sensitivity(args)
        print(sensitivity_summary(found) if args.verbose else ends_of_sensitivity(found))
        for file in (path.with_suffix(".png"), path.with_suffix(".txt"), path):
            print(cli.near(file))
        return
    args.all_rates = args.rates
    if args.shard:
        part, count = args.shard
        if count > len(args.rates):
            raise UserError(f"--shard {part}/{count}: there are only {len(args.rates)} rates to share out")
        args.rates = args.rates[part - 1::count]
    baselines = sweep.baseline_arguments(args)
    path, record = sweep.sweep(args, run_pruning_experiment)
    for own in baselines:
        _, measured = sweep.sweep(own, run_pruning_experiment)
        if distributed.is_main:
            print(summary(measured, args.tolerance) if args.verbose else wrapped(brief(measured, args.tolerance)))
    if distributed.is_main:
        if args.verbose:
            print(summary(record, args.tolerance))
        print(cli.closing(args, record, path, [__file__, *(sys.argv[1:] if argv is None else argv)]))


if __name__ == "__main__":
    cli.run(main)

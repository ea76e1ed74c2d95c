"""Time a sweep, plain generation of the same images, and a sweep as it is usually written, on one machine in one run.

example:
  python benchmarks/sweep.py --num_images 64 --parts bare usual
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

import contextlib
import cProfile
import io
import os
import platform
import pstats
import shutil
import subprocess
import tempfile
import time

import numpy as np
import torch
from torch.nn.utils import prune

from benchmarks import big_models
from pruning import cli, data, methods, pruning_analysis
from pruning.methods import magnitude, zeroing
from pruning.metrics import backbones, scores
from pruning.models import generation, pipelines
from pruning.records.record import read_record

METHOD = "magnitude"


def median_seconds(call, times: int = 1) -> float:
    """Return the median wall time of some calls."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def flags(model: str, count: int, folder) -> list:
    """Return the flags of a sweep of `count` images a rate that writes to `folder`."""
    return ["--model", model, "--method", METHOD, "--num_images", str(count), "--results_dir", str(folder)]


def own_record(model: str, folder: Path):
    """Return the record of a sweep that wrote to `folder`."""
    return read_record(folder / model / "shapes" / f"{METHOD}.json")


def our_sweep(model: str, count: int, folder: Path) -> None:
    """Run the command in this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pruning_analysis.main(flags(model, count, folder))


def plain_generation(pipeline, count: int, points: int, batch: int, steps: int, guidance_scale: float) -> None:
    """Make the images of a sweep with the plain pipeline, in the same batches, and do nothing else."""
    samples, _ = data.load_samples("shapes", count)
    for _ in range(points):
        for start in range(0, count, batch):
            some = samples[start:start + batch]
            pipeline(prompt=[sample.caption for sample in some], num_inference_steps=steps,
                     guidance_scale=guidance_scale, output_type="np",
                     generator=[generation.noise_generator(sample, 0) for sample in some])


def own_seconds(model: str, count: int, folder: Path, cache: Path) -> float:
    """Return the wall time of a sweep in a process that has imported all that a sweep needs, with this cache."""
    our_sweep(model, 1, folder / "warm-up")
    os.environ["PRUNING_CACHE"] = str(cache)
    return median_seconds(lambda: our_sweep(model, count, folder))


def bare_seconds(model: str, count: int, batch: int) -> float:
    """Return the wall time of loading the bundled model and making the images of a sweep plainly, after imports."""
    own = pipelines.MODELS[model]
    pipelines.load_pipeline(model)
    return median_seconds(lambda: plain_generation(
        pipelines.load_pipeline(model), count, 1 + len(pruning_analysis.RATES), batch, own.steps, own.guidance_scale))


def usual_way(model: str, count: int) -> tuple:
    """Run a sweep as it is usually written: one image at a time, and everything anew at each rate.

    Each rate loads the pipeline, prunes each layer with torch.nn.utils.prune, and gives torchmetrics' FID all real
    images. Returns {metric: value} of dense and of each rate, the wall time in seconds, and the part that made images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    samples, _ = data.load_samples("shapes", count)
    reference = data.load_originals(data.reference_samples("shapes", samples), 64)
    pipelines.load_pipeline(model)  # imports what a pipeline needs
    own, found, image_seconds, begun = pipelines.MODELS[model], [], 0.0, time.perf_counter()
    clip, features, perceptual = (backbones.load_backbone("bundled", name) for name in ("clip", "features", "lpips"))
    for rate in (0.0, *pruning_analysis.RATES):
        pipeline = pipelines.load_pipeline(model)
        for layer in getattr(pipeline, pipelines.denoiser_name(pipeline)).modules():
            if rate and isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                prune.l1_unstructured(layer, "weight", amount=rate)
                prune.remove(layer, "weight")
        fid = FrechetInceptionDistance(feature=features)
        clip_scores, distances = [], []
        for sample in samples:
            started = time.perf_counter()
            image = pipeline(prompt=sample.caption, num_inference_steps=own.steps, guidance_scale=own.guidance_scale,
                             generator=generation.noise_generator(sample, 0), output_type="np").images
            image_seconds += time.perf_counter() - started
            pixels = (image * 255).round().astype(np.uint8)
            original = data.load_originals([sample], 64)
            text, _ = backbones.embed_captions(clip, [sample.caption])
            clip_scores.append(scores.clip_score(backbones.embed_images(clip, pixels), text)[0])
            distances.append(scores.lpips(perceptual, pixels, original)[0])
            fid.update(torch.from_numpy(pixels).permute(0, 3, 1, 2), real=False)
        for start in range(0, len(reference), 32):
            fid.update(torch.from_numpy(reference[start:start + 32]).permute(0, 3, 1, 2), real=True)
        found.append({"clip_score": np.mean(clip_scores), "lpips": np.mean(distances),
                      "fid": fid.compute().item()})
    return found, time.perf_counter() - begun, image_seconds


def sweep_rows(model: str, count: int, rounds: int, with_usual: bool) -> list:
    """Time sweeps of `count` images a rate. Returns rows (what was timed, seconds, a comparison), as all parts do."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cache = folder / "cache"  # without features of real images at first
        first = big_models.in_own_process(own_seconds, model, count, folder / "first", cache)
        batch = own_record(model, folder / "first").settings["batch_size"]  # that it found fastest
        bare, own, process = [], [], []
        for turn in range(rounds):  # alternating, as the speed of a machine drifts
            bare.append(big_models.in_own_process(bare_seconds, model, count, batch))
            own.append(big_models.in_own_process(own_seconds, model, count, folder / f"own {turn}", cache))
            process.append(median_seconds(lambda: subprocess.run(
                [sys.executable, str(ROOT / "pruning" / "pruning_analysis.py"),
                 *flags(model, count, folder / f"process {turn}")], check=True, capture_output=True)))  # noqa: B023
        record = own_record(model, folder / f"own {rounds - 1}")
        sweep = float(np.median(own))
        rows = [("plain generation", float(np.median(bare)), f"in batches of {batch}")]
        for name, taken in (("the sweep, after imports", own), ("the sweep, whole process", process)):
            ratios = np.array(taken) / np.array(bare)
            rows.append((name, float(np.median(taken)), f"{np.median(ratios):.2f} x plain generation; "
                         f"{ratios.min():.2f} to {ratios.max():.2f} over the rounds"))
        rows.append(("the first sweep on a machine, after imports", first, f"{first / sweep:.2f} x later sweeps"))
        if with_usual:
            found, usual, images = big_models.in_own_process(usual_way, model, count)
            points = [record.dense, *record.points]
            differences = [", ".join(f"{name} {max(abs(ours.metrics[name] - other[name]) for ours, other in pairs):.2g}"
                                     for name in found[0])
                           for pairs in (list(zip(points, found))[:1], list(zip(points, found))[1:])]
            rows.append(("the usual way, after imports", usual, f"{usual / sweep:.1f} x the sweep, its images alone "
                         f"{images / sweep:.1f} x; values of dense differ by {differences[0]}, of pruned models by at "
                         f"most {differences[1]}"))
        stages = {name: sum(point.seconds[name] for point in (record.dense, *record.points))
                  for name in record.dense.seconds}
        rows.append(("the points of the last sweep", sum(stages.values()),
                     ", ".join(f"{name} {value:.1f}" for name, value in stages.items())))
    return rows


def profile(model: str, count: int) -> None:
    """Print the time that a sweep spends in each function of this project."""
    with tempfile.TemporaryDirectory() as folder:
        our_sweep(model, 1, Path(folder) / "warm-up")
        profiler = cProfile.Profile()
        profiler.runcall(our_sweep, model, count, Path(folder) / "sweep")
    stats = pstats.Stats(profiler)
    stats.sort_stats("cumulative").print_stats(r"pruning/[\w/]+\.py", 45)


def fid_rows() -> list:
    """Time FID of 50 images in 2,048 features, here and in torchmetrics."""
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.RandomState(0)
    a, b = rng.normal(size=(50, 2048)), rng.normal(size=(50, 2048))
    ours = median_seconds(lambda: scores.fid(a, scores.Reference(b)), times=9)
    stats = [(torch.tensor(x.mean(0)), torch.tensor(np.cov(x.T))) for x in (a, b)]
    theirs = median_seconds(lambda: _compute_fid(*stats[0], *stats[1]), times=3)
    value, other = scores.fid(a, scores.Reference(b)).value, _compute_fid(*stats[0], *stats[1]).item()
    return [("FID, 50 x 2,048 features", ours, f"{theirs / ours:.0f} x faster than torchmetrics, which takes "
             f"{theirs:.2f} s; values {value:.4f} and {other:.4f}")]


def threshold_rows() -> list:
    """Time the exact global threshold of Stable Diffusion 1.5's UNet, beside one pass over its weights."""
    unet = big_models.build("sd15")
    before = big_models.peak_resident_bytes()
    whole = median_seconds(lambda: methods.prune("magnitude", unet, 0.5, scope="global"))
    extra = (big_models.peak_resident_bytes() - before) / 2 ** 20
    weights = zeroing.prunable_weights(big_models.build("sd15"))
    half, thresholds, passes = sum(weight.numel() for weight in weights.values()) // 2, [], []
    with torch.no_grad():
        for _ in range(5):  # alternating, as the speed of a machine drifts
            thresholds.append(median_seconds(lambda: zeroing.find_threshold(weights, half, magnitude.score)))
            passes.append(median_seconds(lambda: sum(weight.abs().sum().item() for weight in weights.values())))
    ratios = np.array(thresholds) / np.array(passes)
    return [("exact global threshold, 860 M weights", float(np.median(thresholds)),
             f"{np.median(ratios):.1f} x one abs().sum() pass ({np.median(passes):.2f} s); {ratios.min():.1f} to "
             f"{ratios.max():.1f} over the rounds"),
            ("global magnitude pruning of these weights, with checks", whole, f"peak memory {extra:+.0f} MiB")]


COMMANDS = ("pruning_analysis", "test_single_rate", "visualize_results", "generate_synthetic_graph", "merge_results",
            "prefetch")


def start_rows() -> list:
    """Time commands that need no model, each as a process."""
    def command_seconds(script, *arguments):
        command_line = [sys.executable, str(ROOT / "pruning" / f"{script}.py"), *arguments]
        return median_seconds(lambda: subprocess.run(command_line, check=True, capture_output=True), times=5)

    with tempfile.TemporaryDirectory() as folder:
        for record in (ROOT / "results" / "bundled" / "shapes-unet" / "shapes").glob("*.json"):
            copied = Path(folder) / "shapes-unet" / "shapes" / record.name
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(record), str(copied))
        rows = [("visualize_results.py --compare, four records",
                 command_seconds("visualize_results", "--compare", "--results_dir", folder), "")]
    return rows + [(f"{script}.py --help", command_seconds(script, "--help"), "") for script in COMMANDS]


PARTS = {
    "bare": "plain generation of the images, and the sweep",
    "usual": "also a sweep as it is usually written",
    "fid": "FID, here and in torchmetrics",
    "threshold": "the exact global threshold of a large UNet",
    "starts": "commands that need no model",
    "profile": "each function of a sweep",
}


def main(argv=None) -> None:
    """Run the parts that are asked for, and print a table in Markdown."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", type=cli.one_of("model", pipelines.MODELS), default="shapes-unet",
                        help="one of the bundled models, which is swept")
    parser.add_argument("--num_images", type=cli.positive, default=64, help="images a rate")
    parser.add_argument("--rounds", type=cli.positive, default=3,
                        help="how often plain generation and the sweep are timed, in alternation")
    parser.add_argument("--parts", nargs="+", type=cli.one_of("part", PARTS), default=list(PARTS)[:-1],
                        help="; ".join(f"{name}: {what}" for name, what in PARTS.items()))
    args = parser.parse_args(argv)
    rows = []
    # The threshold comes first: after a part with a higher peak its memory would not show.
    for name, part in (("threshold", threshold_rows), ("fid", fid_rows), ("starts", start_rows)):
        rows += part() if name in args.parts else []
    if {"bare", "usual"} & set(args.parts):
        rows += sweep_rows(args.model, args.num_images, args.rounds, "usual" in args.parts)
    if "profile" in args.parts:
        profile(args.model, args.num_images)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
          f"torch {torch.__version__}, {args.model}, {args.num_images} images a rate\n\n"
          "| what | seconds | |\n|---|---|---|")
    for name, taken, note in rows:
        print(f"| {name} | {taken:.2f} | {note} |")


if __name__ == "__main__":
    cli.run(main)

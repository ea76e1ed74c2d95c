"""Time a sweep beside bare image making and beside the way sweeps are usually written, in one run on one machine.

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
from pruning import cli, data, methods, metrics, pruning_analysis
from pruning.methods import magnitude
from pruning.models import pipelines
from pruning.records.record import read_record

MODEL, METHOD = "shapes-unet", "magnitude"


def seconds(call, times: int = 1) -> float:
    """Median wall time of calls."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def flags(count: int, folder) -> list:
    """Of the command."""
    return ["--method", METHOD, "--num_images", str(count), "--results_dir", str(folder)]


def our_sweep(count: int, folder: Path) -> None:
    """The command itself, in this process, where everything is imported already."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pruning_analysis.main(flags(count, folder))


def bare_loop(count: int) -> None:
    """The same images in the same batches by the pipeline of the model, and nothing else."""
    samples, _ = data.load_samples("shapes", count)
    pipeline = pipelines.load_pipeline(MODEL)
    own = pipelines.MODELS[MODEL]
    for _ in range(1 + len(pruning_analysis.RATES)):
        for start in range(0, count, 8):
            batch = samples[start:start + 8]
            pipeline(prompt=[sample.caption for sample in batch], num_inference_steps=own.steps,
                     guidance_scale=own.guidance_scale, output_type="np",
                     generator=[pipelines.noise_generator(sample, 0) for sample in batch])


def usual_way(count: int) -> tuple:
    """A sweep as it is usually written: at each rate everything anew, and one image at a time.

    The pipeline is loaded again, torch's pruning makes masks of each layer, and torchmetrics' FID sees the real
    images again. Gives clip_score, lpips and fid of dense and of each rate, the seconds it took, and those of images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    samples, _ = data.load_samples("shapes", count)
    reference = data.load_originals(data.reference_samples("shapes", samples), 64)
    own, found, spent, begun = pipelines.MODELS[MODEL], [], 0.0, time.perf_counter()
    clip, features, perceptual = (metrics.load_backbone("bundled", name) for name in ("clip", "features", "lpips"))
    for rate in (0.0, *pruning_analysis.RATES):
        pipeline = pipelines.load_pipeline(MODEL)
        for layer in pipeline.unet.modules():
            if rate and isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                prune.l1_unstructured(layer, "weight", amount=rate)
                prune.remove(layer, "weight")
        distance = FrechetInceptionDistance(feature=features)
        scores, apart = [], []
        for sample in samples:
            started = time.perf_counter()
            image = pipeline(prompt=sample.caption, num_inference_steps=own.steps, guidance_scale=own.guidance_scale,
                             generator=pipelines.noise_generator(sample, 0), output_type="np").images
            spent += time.perf_counter() - started
            pixels = (image * 255).round().astype(np.uint8)
            original = data.load_originals([sample], 64)
            text, _ = metrics.embed_captions(clip, [sample.caption])
            scores.append(metrics.clip_score(metrics.embed_images(clip, pixels), text)[0])
            apart.append(metrics.lpips(perceptual, pixels, original)[0])
            distance.update(torch.from_numpy(pixels).permute(0, 3, 1, 2), real=False)
        for start in range(0, len(reference), 32):
            distance.update(torch.from_numpy(reference[start:start + 32]).permute(0, 3, 1, 2), real=True)
        found.append({"clip_score": np.mean(scores), "lpips": np.mean(apart), "fid": distance.compute().item()})
    return found, time.perf_counter() - begun, spent


def sweeps(count: int, rounds: int, with_usual: bool) -> list:
    """Rows: what was timed, seconds, and how it compares."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        our_sweep(1, folder / "warm-up")  # it imports what a sweep needs
        os.environ["PRUNING_CACHE"] = str(folder / "cache")
        first = seconds(lambda: our_sweep(count, folder / "first"))  # with nothing kept of the real images
        bare, own, process = [], [], []
        for turn in range(rounds):  # in turn, as the machine drifts
            bare.append(seconds(lambda: bare_loop(count)))
            own.append(seconds(lambda: our_sweep(count, folder / f"own {turn}")))  # noqa: B023
            process.append(seconds(lambda: subprocess.run(
                [sys.executable, str(ROOT / "pruning" / "pruning_analysis.py"),
                 *flags(count, folder / f"process {turn}")], check=True, capture_output=True)))  # noqa: B023
        record = read_record(folder / f"own {rounds - 1}" / MODEL / "shapes" / f"{METHOD}.json")
        sweep = float(np.median(own))
        rows = [("bare image making", float(np.median(bare)), "")]
        for name, taken in (("the sweep, after imports", own), ("the sweep, whole process", process)):
            ratios = np.array(taken) / np.array(bare)
            rows.append((name, float(np.median(taken)), f"{np.median(ratios):.2f} x bare, of {rounds} rounds "
                         f"{ratios.min():.2f} to {ratios.max():.2f}"))
        rows.append(("the first sweep on a machine, after imports", first, f"{first / sweep:.2f} x later ones"))
        if with_usual:
            found, usual, images = usual_way(count)
            points = [record.dense, *record.points]
            apart = [", ".join(f"{name} {max(abs(ours.metrics[name] - other[name]) for ours, other in pairs):.2g}"
                               for name in found[0])
                     for pairs in (list(zip(points, found))[:1], list(zip(points, found))[1:])]
            rows.append(("the usual way, after imports", usual, f"{usual / sweep:.1f} x the sweep, images alone "
                         f"{images / sweep:.1f} x; apart for dense by {apart[0]}, pruned by at most {apart[1]}"))
        stages = {name: sum(point.seconds[name] for point in (record.dense, *record.points))
                  for name in record.dense.seconds}
        rows.append(("of the sweep, in points", sum(stages.values()),
                     ", ".join(f"{name} {value:.1f}" for name, value in stages.items())))
    return rows


def profile(count: int) -> None:
    """Print where a sweep's time goes, by function."""
    with tempfile.TemporaryDirectory() as folder:
        our_sweep(1, Path(folder) / "warm-up")
        found = cProfile.Profile()
        found.runcall(our_sweep, count, Path(folder) / "sweep")
    stats = pstats.Stats(found)
    stats.sort_stats("cumulative").print_stats(r"pruning/\w+\.py", 45)


def distances() -> list:
    """FID of 50 images in 2,048 features, by us and by torchmetrics."""
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.RandomState(0)
    a, b = rng.normal(size=(50, 2048)), rng.normal(size=(50, 2048))
    ours = seconds(lambda: metrics.fid(a, metrics.Reference(b)), times=9)
    stats = [(torch.tensor(x.mean(0)), torch.tensor(np.cov(x.T))) for x in (a, b)]
    theirs = seconds(lambda: _compute_fid(*stats[0], *stats[1]), times=3)
    value, other = metrics.fid(a, metrics.Reference(b)).value, _compute_fid(*stats[0], *stats[1]).item()
    return [("FID, 50 x 2,048 features", ours, f"{theirs / ours:.0f} x faster than torchmetrics' {theirs:.2f} s; "
             f"{value:.4f} and {other:.4f}")]


def threshold() -> list:
    """The exact global threshold over Stable Diffusion 1.5's UNet, beside one pass over its weights."""
    unet = big_models.build("sd15")
    held = big_models.peak_resident_bytes()
    whole = seconds(lambda: methods.prune("magnitude", unet, 0.5, scope="global"))
    extra = (big_models.peak_resident_bytes() - held) / 2 ** 20
    weights = list(magnitude.prunable_weights(big_models.build("sd15")).values())
    half, found, one = sum(weight.numel() for weight in weights) // 2, [], []
    with torch.no_grad():
        for _ in range(5):  # in turn, as the machine drifts
            found.append(seconds(lambda: magnitude.find_threshold(weights, half)))
            one.append(seconds(lambda: sum(weight.abs().sum().item() for weight in weights)))
    ratios = np.array(found) / np.array(one)
    return [("exact global threshold, 860 M weights", float(np.median(found)),
             f"{np.median(ratios):.1f} x one abs().sum() pass ({np.median(one):.2f} s), of {len(ratios)} turns "
             f"{ratios.min():.1f} to {ratios.max():.1f}"),
            ("global magnitude pruning of them, with checks", whole,
             f"memory {extra:+.0f} MiB at most")]


COMMANDS = ("pruning_analysis", "test_single_rate", "visualize_results", "generate_synthetic_graph", "merge_results",
            "prefetch")


def starts() -> list:
    """How long commands take as processes that need no model."""
    def command_seconds(script, *arguments):
        command_line = [sys.executable, str(ROOT / "pruning" / f"{script}.py"), *arguments]
        return seconds(lambda: subprocess.run(command_line, check=True, capture_output=True), times=5)

    with tempfile.TemporaryDirectory() as folder:
        for record in (ROOT / "results" / "bundled" / MODEL / "shapes").glob("*.json"):
            copied = Path(folder) / MODEL / "shapes" / record.name
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(record), str(copied))
        rows = [("visualize_results.py --compare, four records",
                 command_seconds("visualize_results", "--compare", "--results_dir", folder), "")]
    return rows + [(f"{script}.py --help", command_seconds(script, "--help"), "") for script in COMMANDS]


PARTS = ("bare", "usual", "fid", "threshold", "starts", "profile")


def main(argv=None) -> None:
    """Run the parts asked for and print a markdown table."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--num_images", type=cli.positive, default=64, help="images a rate")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="times that bare loop and sweep take turns")
    parser.add_argument("--parts", nargs="+", type=cli.name_in("part", PARTS), default=list(PARTS[:-1]),
                        help=f"what to time, of {', '.join(PARTS)}")
    args = parser.parse_args(argv)
    rows = []
    for name, part in (("threshold", threshold), ("fid", distances), ("starts", starts)):  # memory before all else
        rows += part() if name in args.parts else []
    if {"bare", "usual"} & set(args.parts):
        rows += sweeps(args.num_images, args.rounds, "usual" in args.parts)
    if "profile" in args.parts:
        profile(args.num_images)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
          f"torch {torch.__version__}, {args.num_images} images a rate\n\n| what | seconds | |\n|---|---|---|")
    for name, taken, note in rows:
        print(f"| {name} | {taken:.2f} | {note} |")


if __name__ == "__main__":
    cli.run(main)

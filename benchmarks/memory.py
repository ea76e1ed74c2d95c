"""Measure the most host memory that a sweep holds, against the number of images. Prints a table in Markdown.

The images are mosaics of random colours in place of what the bundled model would draw, which would take hours.

example:
  python benchmarks/memory.py --counts 100 1000 3000 --image_size 64
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

import contextlib
import io
import os
import tempfile

import numpy as np

from benchmarks.big_models import in_own_process, peak_resident_bytes
from pruning import UserError, cli, pruning_analysis
from pruning.models import generation
from pruning.shapes import scenes

BASE = 8  # images of a sweep that holds little but the models


def draw_data(folder: Path, count: int) -> None:
    """Write `count` scenes and their captions in Flickr8k's layout."""
    (folder / "Images").mkdir()
    drawn = [scenes.scene("train", index) for index in range(count)]
    for index, scene in enumerate(drawn):
        scenes.render(scene).save(folder / "Images" / f"{index}.png")
    rows = (f'{index}.png,"{scene.caption}"\n' for index, scene in enumerate(drawn))
    (folder / "captions.txt").write_text("image,caption\n" + "".join(rows))


def replace_images() -> None:
    """Put mosaics in the place of the pipeline's images. Only calls of the denoiser that are looked at are computed."""
    call = generation._call

    def stand_in(pipeline, batch, seed, steps, guidance_scale, image_size, **options):
        if "forward" in vars(pipeline.unet):  # see generation.computing_once
            call(pipeline, batch, seed, steps, guidance_scale, scenes.SIZE, **options)
        times = image_size // 8
        return np.random.rand(len(batch), 8, 8, 3).repeat(times, axis=1).repeat(times, axis=2)

    generation._call = stand_in


def peak_of_sweep(count: int, size: int, data: Path, metrics: list) -> int:
    """Run a sweep of the dense model and one rate, and return the most bytes that this process has held."""
    replace_images()
    with tempfile.TemporaryDirectory() as results, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        os.environ["PRUNING_CACHE"] = results  # features are computed, not read
        pruning_analysis.main(["--dataset", "flickr8k", "--data_dir", str(data), "--model", "shapes-unet",
                               "--metric_backbones", "bundled", "--num_images", str(count), "--rates", "0.5", "--steps",
                               "1", "--device", "cpu", "--image_size", str(size), "--results_dir", results,
                               *(["--metrics", *metrics] if metrics else [])])
    return peak_resident_bytes()


def main(argv=None) -> None:
    """Run a sweep for each number of images, each in a process of its own, and print a row for each."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--counts", nargs="+", type=cli.positive, default=[100, 1000, 3000], help="images a rate")
    parser.add_argument("--image_size", type=cli.positive, default=scenes.SIZE,
                        help="pixels a side, a multiple of 8")
    parser.add_argument("--metrics", nargs="+", default=[], help="as the sweep's (default: all)")
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("this benchmark reads the peak memory of a process from /proc, which only Linux has")
    if args.image_size % 8:
        raise UserError(f"--image_size {args.image_size} is no multiple of 8")
    with tempfile.TemporaryDirectory() as folder:
        draw_data(Path(folder), 2 * max(*args.counts, BASE))  # as many again for the floors
        print("| images a rate | pixels a side | all images of a rate, MB | peak memory, MB | above 8 images, MB |")
        print("|---|---|---|---|---|")
        peaks = []
        for count in [BASE, *args.counts]:
            peaks.append(in_own_process(peak_of_sweep, count, args.image_size, Path(folder), args.metrics) / 1e6)
            print(f"| {count:,} | {args.image_size} | {3e-6 * count * args.image_size ** 2:,.0f} | {peaks[-1]:,.0f} "
                  f"| {peaks[-1] - peaks[0]:,.0f} |", flush=True)


if __name__ == "__main__":
    cli.run(main)

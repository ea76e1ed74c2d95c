"""A record -> the README.md of a saved pipeline: a model card as the hub reads it, with images before and after."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Optional

from PIL import Image

from pruning import whole_file
from pruning.records.answers import share_of_dense, time_beside_dense
from pruning.records.findings import QUALITY, TOLERANCE, removes
from pruning.records.record import Record
from pruning.records.store import image_file
from pruning.records.summaries import setup
from pruning.records.tables import single_rate_table
from pruning.records.words import change

SHOWN, EDGE = 4, 256  # images in a row of the strip, and pixels a side
STRIP = "images.webp"
LOADING = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}"{consent}{absent})
image = pipeline({call})[0][0]  # the first of the images"""


def write(record: Record, rate: float, folder: Path, images_folder: Path, call: str, tolerance: float = TOLERANCE
          ) -> None:
    """Write README.md and, if the images of the first samples are kept, a strip of these into a saved folder.

    record: holds dense and the rate. call: the arguments by which the pipeline draws the first caption, as code.
    Raises UserError if the disk refuses.
    """
    one = replace(record, points=[point for point in record.points if point.rate == rate])
    shown = strip(one, images_folder) if one.points else None
    if shown is not None:
        with whole_file(folder / STRIP) as part:
            shown.save(part, format="WEBP", quality=85)
    with whole_file(folder / "README.md") as part:
        part.write_text(text(one, folder, shown is not None, call, tolerance), encoding="utf-8")


def text(record: Record, folder: Path, with_strip: bool, call: str, tolerance: float = TOLERANCE) -> str:
    """Return the card of a saved folder. record: dense, and the rate if it is not 0. call: see write."""
    dense, point = record.dense, [*record.points, record.dense][0]
    python = any(folder.rglob("*.py"))
    settings, manifest = record.settings, folder / "pruning.json"
    absent = json.loads(manifest.read_text(encoding="utf-8")).get("absent", []) if manifest.exists() else []
    parts = [metadata(record), f"# {record.model}, {record.variant} pruning at {point.rate:g}", made_by(record)]
    if with_strip:
        what = "Above: the dense model. Below: this model, from the same noise"
        captions = "; ".join("`{}`".format(sample["caption"].replace("`", "'")) for sample in record.samples[:SHOWN])
        parts.append(f"![{what}]({STRIP})\n\n{what}. Captions: {captions}.")
    loading = LOADING.format(
        folder=folder.name, consent=", trust_remote_code=True" if python else "", call=call,
        absent="".join(f", {name}=None" for name in absent))
    parts.append(f"## Load\n\n```python\n{loading}\n```")
    if python:
        parts.append("The Python file beside the weights rebuilds the shapes that pruning left. "
                     "`trust_remote_code=True` is your consent to run it.")
    table = single_rate_table(record, tolerance)
    parts.append(f"## Measured\n\n{setup(record)}, on {settings['device']}.\n\n```text\n{table}\n```")
    if QUALITY in dense.metrics and record.points and dense.metrics[QUALITY]:
        parts.append(f"By `{QUALITY}` this model has {share_of_dense(point, dense, tolerance)}.")
    parts.append("## Licence\n\nThe licence of the base model holds for this model too.")
    return "\n\n".join(parts) + "\n"


def metadata(record: Record) -> str:
    """Return what the hub reads of a card, between two lines of ---."""
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:", "- pruned", f"- {record.method}"]
    base = [f"base_model: {record.model}"] if record.model.count("/") == 1 else []
    return "\n".join(["---", *base, *lines, "---"])


def made_by(record: Record) -> str:
    """Return what was pruned, and what that saves."""
    dense, point = record.dense, [*record.points, record.dense][0]
    what = (f"{point.units_taken:,} of {point.units_total:,} {point.unit} of the denoiser were "
            f"{'removed' if removes(record) else 'set to zero'}")
    if not removes(record):
        return f"{what}. Zeros save neither time nor space with dense kernels."
    time = time_beside_dense(point, dense)
    return (f"{what}: {point.parameters:,} of {dense.parameters:,} parameters are left "
            f"({change(point.parameters, dense.parameters)}), multiply-accumulates change by "
            f"{change(point.macs, dense.macs)}" + (f", and {time}" if time else "") + ".")


def strip(record: Record, images_folder: Path) -> Optional[Image.Image]:
    """Return the images of the first samples, dense above pruned; None if one of them is not kept."""
    shown = range(min(SHOWN, len(record.samples)))
    made = Image.new("RGB", (EDGE * len(shown), 2 * EDGE), "white")
    try:
        for row, rate in enumerate((0.0, record.points[0].rate)):
            for place in shown:
                with Image.open(image_file(images_folder, record.variant, rate, place)) as image:
                    small = image.convert("RGB").resize((EDGE, EDGE), Image.LANCZOS)
                made.paste(small, (place * EDGE, row * EDGE))
    except OSError:
        return None
    return made

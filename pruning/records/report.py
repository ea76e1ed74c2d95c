"""Which files are made of records, and where. No torch."""
from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Sequence

from pruning import whole_file
from pruning.records import comparisons, grids, layers, plots
from pruning.records.comparability import beside
from pruning.records.findings import TOLERANCE, metrics_of
from pruning.records.page import page
from pruning.records.record import Record, write_json
from pruning.records.summaries import comparison_summary, sensitivity_summary, summary
from pruning.records.tables import results_csv


def write_text(text: str, path: Path) -> Path:
    """Write text, whole or not at all, and return its path."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


# File name -> function(record, path, images_folder, tolerance), which returns the path, or None if there is nothing
# to make the file of. The figure of images comes first, because it alone can meet a file that cannot be read.
RECORD_FILES = {
    "{variant}_images.png": lambda record, path, images, tolerance: grids.draw_images(record, images, path, tolerance),
    "{variant}.png": lambda record, path, images, tolerance: plots.draw_accuracy(record, path, tolerance),
    "{variant}_metrics.png": lambda record, path, images, tolerance: plots.draw_metrics(record, path, tolerance),
    "{variant}_cost.png": lambda record, path, images, tolerance: plots.draw_cost(record, path, tolerance),
    "{variant}_layers.png": lambda record, path, images, tolerance: layers.draw_layers(record, path),
    "{variant}.txt": lambda record, path, images, tolerance: write_text(summary(record, tolerance), path),
}


def record_files(record: Record, folder) -> List[Path]:
    """Return the paths of the files that are made of a record, in the order in which they are made."""
    return [Path(folder) / pattern.format(variant=record.variant) for pattern in RECORD_FILES]


def write_record_files(record: Record, folder, images_folder, tolerance: float = TOLERANCE) -> List[Path]:
    """Write the figures and the summary of a record, each whole or not at all, and return the paths written.

    images_folder: laid out as store.image_file says. Raises UserError if an image or a metric cannot be used.
    """
    metrics_of(record)  # raises for an unknown metric before anything is written
    written = [write(record, path, images_folder, tolerance)
               for path, write in zip(record_files(record, folder), RECORD_FILES.values())]
    return [path for path in written if path]


def write_report(found: Dict[Path, Record], folder, tolerance: float = TOLERANCE, warning: str = "",
                 left_out: Sequence[str] = ()) -> List[Path]:
    """Write report.html and results.csv of the variants of one model and dataset, and return their paths.

    found: records by path. warning: how they were measured differently, if they were. left_out: why others are missing.
    """
    return [write_text(page(found, tolerance, warning, left_out), Path(folder) / "report.html"),
            write_text(results_csv(list(found.values())), Path(folder) / "results.csv")]


def remake_report(path: Path, record: Record, tolerance: float = TOLERANCE) -> List[Path]:
    """Write the report of a record and of all in its folder that were measured alike, and return its paths."""
    found, left_out = beside(path, record)
    return write_report(found, path.parent, tolerance, left_out=left_out)


def write_sensitivity(found: dict, folder) -> Path:
    """Write what sweep.measure_sensitivity found as JSON, figure and text. Returns the path of the JSON file."""
    path = Path(folder) / f"{found['variant']}_sensitivity.json"
    write_json(found, path)
    layers.draw_sensitivity(found, path.with_suffix(".png"))
    write_text(sensitivity_summary(found), path.with_suffix(".txt"))
    return path


def write_comparison(found: Dict[Path, Record], folder, tolerance: float = TOLERANCE, warning: str = "") -> List[Path]:
    """Write the figure and the text that compare the variants of one model and dataset, and return their paths.

    found: records by path. warning: how they were measured differently, if they were.
    """
    text = comparison_summary(list(found.values()), tolerance, warning)
    return [comparisons.draw_comparison(found, Path(folder) / "comparison.png", tolerance, warning),
            write_text(text, Path(folder) / "comparison.txt")]


def write_models(records: Sequence[Record], folder) -> List[Path]:
    """Write the figure of several models on one dataset, and return its path in a list."""
    path = comparisons.draw_models(records, Path(folder) / f"models_{records[0].dataset}.png")
    return [path] if path else []

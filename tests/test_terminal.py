"""A command says on the terminal what it does, the answer in a few lines, where things are, and what to try next."""
from __future__ import annotations

import argparse
import io
import os
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from pruning import cli, progress
from pruning.methods import METHODS
from pruning.records.answers import brief, failed, next_step
from pruning.records.findings import failures, holds, last_good
from pruning.records.record import read_record

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path for path in (ROOT / "results").rglob("*.json") if "sensitivity" not in path.name
                 and path.parts[-4] in ("bundled", "calibrated", "units"))
STRUCTURED = ROOT / "results/bundled/shapes-unet/shapes/structured+criterion=norm+refit=off.json"


def records():
    return [read_record(path) for path in SHIPPED]


# ---------------------------------------------------------------- the answer

def test_the_answers_of_all_shipped_records_are_whole_sentences_of_at_most_four_lines():
    assert len(SHIPPED) > 20
    for record in records():
        lines = textwrap.wrap(brief(record), 80)
        assert len(lines) <= 4, lines
        assert lines[-1].endswith(".")


def test_the_failures_are_those_at_the_rate_of_the_answer():
    for record in records():
        point = last_good(record) or record.points[0]
        count, most = failures(point, record.dense, 0.05)
        said = failed(record)
        assert said.startswith(f"Failures at rate {point.rate:g}: ")
        assert f": {count} of " in said or count == 0
        assert (f"the worst {100 * most:.0f} %" if count else "no image") in said
        assert "lose" not in brief(record)  # said once


# ---------------------------------------------------------------- what to try next

def upto(record, rate):
    return replace(record, points=[point for point in record.points if point.rate <= rate])


def test_what_to_try_next_follows_from_what_is_known():
    record = read_record(STRUCTURED)
    good = last_good(record)
    decided = [point for point in record.points if holds(point, record.dense, 0.05) is not None]
    assert next_step(upto(record, good.rate)) == ("to find the rate that fails", {
        "--rates": [f"{good.rate + step / 10:g}" for step in (1, 2, 3)]})
    sure = replace(record, points=[good, next(point for point in decided if point.rate > good.rate)])
    assert next_step(sure) == ("to keep the pruned model", {"--rates": [f"{good.rate:g}"], "--save_pruned": ["pruned"]})
    assert next_step(sure, saved=True) == ("to compare another method", {"--method": ["joint"]})
    lost = replace(record, points=[point for point in decided if point.rate > good.rate])
    first = lost.points[0].rate
    assert next_step(lost) == ("to find a rate that holds", {
        "--rates": [f"{first / 4:.2g}", f"{first / 2:.2g}"]})
    few = replace(record, samples=record.samples[:4])
    assert next_step(few) == ("for an answer", {"--num_images": ["32"], "--overwrite": []})
    unknown = replace(record, dense=replace(record.dense, metrics={"clip_score": None}))
    assert next_step(unknown) == ("", {})
    zeroing = read_record(STRUCTURED.with_name("magnitude.json"))
    holding = last_good(zeroing)
    failing = next(point for point in zeroing.points if holds(point, zeroing.dense, 0.05) is False)
    assert next_step(replace(zeroing, points=[holding, failing]))[1] == {"--method": ["structured"]}


def test_more_images_are_tried_next_only_if_they_decide_and_are_not_too_many():
    tried = [(record, next_step(record)[1]) for record in records()]
    more = [(record, int(changes["--num_images"][0])) for record, changes in tried if "--num_images" in changes]
    assert more
    for record, count in more:
        assert len(record.samples) < count <= 504
        assert any(holds(point, record.dense, 0.05) is None for point in record.points)


def test_a_changed_command_keeps_the_other_flags_and_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["pruning/pruning_analysis.py", "--method", "structured", "--criterion=norm", "--rates", "0.1", "0.2",
               "--data_dir", "a folder", "--refit", "off", "--overwrite"]
    python = cli.near(sys.executable)
    assert shlex.split(cli.changed_command(command, {"--rates": ["0.05"], "--save_pruned": ["pruned"]}))[1:] == [
        "pruning/pruning_analysis.py", "--method", "structured", "--criterion=norm", "--data_dir", "a folder",
        "--refit", "off", "--overwrite", "--rates", "0.05", "--save_pruned", "pruned"]
    other = shlex.split(cli.changed_command(command, {"--method": ["joint"]}, drop=["--overwrite"]))
    assert other[1:] == ["pruning/pruning_analysis.py", "--rates", "0.1", "0.2", "--data_dir", "a folder", "--method",
                         "joint"]
    assert other[0] in (python, "python")


def test_the_end_of_a_command_names_only_files_that_are_there_as_seen_from_here(tmp_path, monkeypatch):
    record, path = read_record(STRUCTURED), tmp_path / "r" / "structured.json"
    path.parent.mkdir()
    for name in ("report.html", f"{record.variant}.png", "structured.json"):
        (path.parent / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    alone = argparse.Namespace(tolerance=0.05, shard=None, save_pruned=None)
    lines = cli.closing(alone, record, path, ["x.py"]).splitlines()
    assert [line for line in lines if ": r/" in line] == [
        "Report: r/report.html", f"Figure: r/{record.variant}.png", "Record: r/structured.json"]
    assert lines[-1].startswith("Next, ")
    sharded = argparse.Namespace(tolerance=0.05, shard=(1, 3), results_dir=Path("r"))
    assert cli.closing(sharded, record, path, ["x.py"]).endswith(" merge_results.py --results_dir r")
    assert all(len(line) <= 100 for line in lines[:4])


# ---------------------------------------------------------------- bars

class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("disable", [None, False, True])
def test_bars_are_shown_on_terminals_only(disable):
    shown = {}
    for output in (Terminal(), io.StringIO()):
        assert list(progress.tqdm(range(3), file=output, disable=disable)) == [0, 1, 2]
        shown[type(output)] = output.getvalue()
    assert shown[io.StringIO] == ""
    assert bool(shown[Terminal]) == (not disable)


def test_no_other_file_makes_bars():
    found = [path.name for path in (ROOT / "pruning").rglob("*.py") if "import tqdm" in path.read_text(encoding="utf-8")
             and "pruning.progress import" not in path.read_text(encoding="utf-8")]
    assert sorted(found) == ["progress.py", "train.py"]


# ---------------------------------------------------------------- help

@pytest.mark.parametrize(("script", "words"), [
    ("run_pruning_analysis.sh", "--save_pruned DIR"), ("run_tests.sh", "--slow includes")])
def test_the_help_of_a_script_needs_no_package(script, words):
    for arguments in (["--help"], ["magnitude", "-h"]):
        done = subprocess.run(["bash", str(ROOT / script), *arguments], capture_output=True, text=True, check=True,
                              env={"PATH": os.environ["PATH"], "PYTHON": "no-python-here"})
        assert f"./{script} [" in done.stdout
        assert words in done.stdout


def test_the_help_that_is_shown_without_packages_is_that_of_the_command():
    done = subprocess.run([sys.executable, str(ROOT / "pruning/pruning_analysis.py"), "--help"], capture_output=True,
                          text=True, check=True, env={**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"})
    kept = (ROOT / "pruning/flags.txt").read_text(encoding="utf-8")
    now = done.stdout.replace("optional arguments:", "options:")
    assert kept.split() == now.split(), "COLUMNS=100 python pruning/pruning_analysis.py --help > pruning/flags.txt"
    assert all(f"{name}:" in kept for name in METHODS)

"""README and docs/ say what is so: their commands run, their links lead somewhere, their answers come from records."""
from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import COMMANDS

from benchmarks import tables
from pruning import check_model, generate_synthetic_graph, merge_results, methods, prefetch, sweep, visualize_results
from pruning.methods import METHODS
from pruning.records.findings import removes
from pruning.records.record import protocol_differences, read_record

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a command holds that cannot run in a test -> why.
CANNOT_RUN = {
    "run_tests.sh": "it would run this test",
    "…": "the model is for the reader to name",
    "accelerate launch": "it needs several machines or GPUs; tests/test_processes.py runs several processes",
    "/shared/results": "it needs the folder that several machines share",
    "path/to/": "the folder is for the reader to name",
    "--model stabilityai/": "it needs a model of the hub, and a GPU",
    "--model stable-diffusion-v1-5/": "it needs a model of the hub, and a GPU",
    "--model black-forest-labs/": "it needs a model of the hub, and a GPU",
    "--model Qwen/": "it needs a model of the hub, and a GPU",
    "coco": "it needs the default model of COCO, from the hub, and COCO",
}


def commands(page):
    """The commands of a page's sh blocks, without comments; continued lines are joined."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = shlex.join(shlex.split(line, comments=True)) if "$" not in line else line
            if command:
                yield command


ALL = sorted({command for page in PAGES for command in commands(page)})
RUNNABLE = [command for command in ALL if not any(part in command for part in CANNOT_RUN)]


class Parsed(Exception):  # noqa: N818 - no error
    """Raised where a command would begin its work."""


@pytest.mark.parametrize("command", ALL)
def test_every_command_of_the_pages_is_understood(command, monkeypatch):
    """Each flag and name is known; nothing is measured."""
    def stop(*_, **__):
        raise Parsed

    words = shlex.split(command.replace("$SLURM_ARRAY_TASK_ID", "1"))
    script = next((word for word in words if word.endswith((".py", ".sh"))), "")
    assert (ROOT / script).is_file(), command
    if script.endswith(".sh"):
        given = list(itertools.takewhile(lambda word: not word.startswith("-"), words[1:4]))
        assert not given or given[0] in METHODS
        words = [script, *(each for pair in zip(("--method", "--num_images", "--dataset"), given) for each in pair),
                 *words[1 + len(given):]]
        script = "pruning_analysis.py" if "analysis" in script else ""
    module = COMMANDS.get(Path(script).stem) if script.endswith(".py") else None
    if module is None:
        return
    for target, name in ((sweep, "sweep"), (sweep, "measure_sensitivity"), (merge_results, "find_records"),
                         (prefetch, "fetch"), (visualize_results, "find_records"),
                         (visualize_results, "read_records"), (check_model.pipelines, "pick_device")):
        monkeypatch.setattr(target, name, stop)
    monkeypatch.setattr(methods, "why_not", lambda *_: "")  # diffusers 0.36 has no MagCache
    if module is generate_synthetic_graph:
        return  # it runs below
    arguments = words[next(i for i, word in enumerate(words) if word.endswith((".py", ".sh"))) + 1:]
    with pytest.raises(Parsed):
        module.main(arguments)


def test_each_command_runs_or_has_a_reason_why_it_cannot():
    assert RUNNABLE
    assert all(any(part in command for command in ALL) for part in CANNOT_RUN)


@pytest.mark.slow
def test_the_commands_run_as_they_stand_one_after_the_other(tmp_path):
    root = tmp_path / "repository"
    for name in ("pruning", "results/bundled"):  # not what was measured in this clone
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_pruning_analysis.sh", "requirements.txt"):
        shutil.copy(ROOT / name, root)
    environment = {**os.environ, "PYTHON": sys.executable,
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ordered = [command for page in PAGES for command in commands(page) if command in RUNNABLE]
    for command in dict.fromkeys(ordered):
        done = subprocess.run(["bash", "-c", command], cwd=str(root), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


# ---------------------------------------------------------------- README

def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_tables_of_the_pages_are_those_of_the_records(name):
    page, make = tables.TABLES[name]
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"<!-- end of {name} -->" in text
    assert tables.with_table(text, name, make()) == text, "python benchmarks/tables.py --write"


def test_shipped_records_of_a_model_were_measured_alike_and_those_of_each_sort_by_one_commit():
    for model in tables.MODELS:
        records = [read_record(path) for path in sorted((ROOT / "results/bundled" / model).rglob("*.json"))]
        assert {len(record.samples) for record in records} == {128}
        assert not any(protocol_differences(records[0], record) for record in records)
        sorts = {}
        for record in records:
            sort = (removes(record), bool(record.options.get("recovery_steps")))
            sorts.setdefault(sort, set()).add(tuple(record.notes.code))
        assert len(sorts) == 4
        assert all(len(commits) == 1 for commits in sorts.values()), sorts


# ---------------------------------------------------------------- links

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_or_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), (page.name, target)
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], target


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"](docs/{page.name}" in text for page in PAGES[1:])

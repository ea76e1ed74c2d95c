"""Whatever a person gives to a command, it ends with exit 0, 2 or 130, and says in one line what is wrong."""
from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import COMMANDS
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_records import JSON, make_record, places

from pruning import UserError, cli, merge_results, prefetch, sweep, visualize_results
from pruning.models import pipelines, saving, skeleton
from pruning.records import plots
from pruning.records.record import record_path, write_record

ROOT = Path(__file__).resolve().parents[1]
LONG = 20  # times as many examples, in tests marked as slow


def fuzz(examples):
    """Settings of a bounded, repeatable fuzz."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck))


def ends(main, *arguments):
    """Run a command as its file does, and return its exit code, which must be one of the three."""
    code = 0
    try:
        cli.run(lambda: main([str(each) for each in arguments]))
    except SystemExit as stop:
        code = stop.code or 0
    assert code in (0, 2, 130)
    return code


# ---- arguments

TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=12)
NUMBERS = st.sampled_from(["0", "1", "2", "-1", "0.5", "1.0", "nan", "inf", "-inf", "1e400", "9" * 30, "1e-9", "٣",
                           "0x1", ""])
WORDS = st.sampled_from([
    "magnitude", "structured", "shapes", "shapes-unet", "coco", "fid", "clip_score", "2:4", "cpu", "cuda:99", "meta",
    "on", "off", "1/2", "0/0", "float16", "model", ".", "/", "/dev/null", "/proc/self/mem", "n" * 300, "a/b", "../..",
    "é\udcff"])
VALUES = st.one_of(NUMBERS, TEXTS, WORDS)


def flags_of(module):
    """The flags of a command, as its own parser knows them."""
    found = []

    class Listing(cli.Parser):
        def parse_args(self, argv=None):
            found.extend(option for action in self._actions for option in action.option_strings)
            raise SystemExit(0)
    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit):
        patch.setattr(cli, "Parser", Listing)
        module.main([])
    return [flag for flag in found if flag.startswith("--") and flag != "--help"]


@pytest.fixture
def nothing_long(monkeypatch, tmp_path):
    """Commands that stop where they would load torch, draw or fetch, in a folder of their own."""
    def stop(*_, **__):
        raise UserError("stopped before the work")
    for module, name in ((sweep, "prepare"), (pipelines, "fetch"), (skeleton, "load"), (plots, "draw_synthetic"),
                         (prefetch.backbones, "backbone_files"), (visualize_results.report, "write_record_files")):
        monkeypatch.setattr(module, name, stop)
    monkeypatch.chdir(tmp_path)


def check_arguments(name, data, capsys):
    flags = flags_of(COMMANDS[name])
    arguments = [word for flag in data.draw(st.lists(st.sampled_from(flags), max_size=4))
                 for word in (flag, *data.draw(st.lists(VALUES, max_size=2)))]
    if name in ("generate_synthetic_graph", "visualize_results") and "--output_dir" not in arguments:
        arguments += ["--output_dir", "out"]
    if name != "generate_synthetic_graph" and "--results_dir" not in arguments:
        arguments += ["--results_dir", "results"] if name not in ("prefetch", "check_model") else []
    code = ends(COMMANDS[name].main, *arguments)
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    if code == 2:
        assert len([line for line in said.err.splitlines() if "error:" in line]) == 1, said.err


@pytest.mark.parametrize("name", COMMANDS)
@fuzz(25)
@given(data=st.data())
def test_arguments_of_any_kind_end_in_a_known_exit_code(nothing_long, capsys, name, data):
    check_arguments(name, data, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@fuzz(25 * LONG)
@given(data=st.data())
def test_many_arguments_of_any_kind_end_in_a_known_exit_code(nothing_long, capsys, name, data):
    check_arguments(name, data, capsys)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("problem", [
    OSError(28, "No space left on device"), PermissionError(13, "Permission denied", "a/file"),
    OSError(36, "File name too long", "n" * 300), BrokenPipeError(32, "Broken pipe"), KeyboardInterrupt(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 48.00 MiB. GPU 0 has")], ids=repr)
def test_what_the_system_refuses_is_one_line(name, problem, monkeypatch, capsys):
    def refuse(_):
        raise problem
    monkeypatch.setattr(COMMANDS[name], "main", refuse)
    assert ends(COMMANDS[name].main) == (130 if isinstance(problem, KeyboardInterrupt) else 2)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ---- files that are read

@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    paths = []
    for variant in ("magnitude", "iterative"):
        record = make_record()
        record.method, record.options = variant, {}
        paths.append(record_path(folder, record.model, record.dataset, variant))
        write_record(record, paths[-1])
    return folder, paths[0], json.loads(paths[0].read_text())


def check_record(results, data, capsys):
    folder, path, content = results
    changed = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        put(changed, data)
    path.write_text(json.dumps(changed))
    out = folder.with_name("drawn")
    ends(visualize_results.main, "--results_file", path, "--output_dir", out)
    ends(visualize_results.main, "--results_dir", folder, "--output_dir", out, "--compare", "--force")
    ends(merge_results.main, "--results_dir", folder)
    assert "Traceback" not in capsys.readouterr().err


@fuzz(4)
@given(data=st.data())
def test_a_record_with_anything_put_anywhere_is_drawn_or_refused(results, capsys, data):
    check_record(results, data, capsys)


@pytest.mark.slow
@fuzz(4 * LONG)
@given(data=st.data())
def test_many_records_with_anything_put_anywhere_are_drawn_or_refused(results, capsys, data):
    check_record(results, data, capsys)


def put(content, data):
    """Put a value anywhere into nested JSON: any, or one like it that is out of range."""
    place = data.draw(st.sampled_from(sorted((place for place in places(content) if place), key=str)))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    near = [0, -1, 1e299, -1e299, 1e-300, 10 ** 18, "x" * 200, "$a_b^{", "\n\t", [], {}, None]
    inner[place[-1]] = data.draw(st.one_of(st.sampled_from(near), JSON))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a pruned pipeline, of which only what a loader reads before the other components is real."""
    from pruning import methods
    folder = tmp_path_factory.mktemp("saved") / "pruned"
    pipeline = pipelines.load_pipeline("shapes-unet")
    methods.prune("structured", pipeline.unet, 0.5, criterion="norm", refit=False)
    saving.save(pipeline, "unet", folder, {"steps": 2, "guidance_scale": 4.0, "image_size": 64}, {}, {})
    return folder


def check_manifest(saved, tmp_path, data, both):
    """both: the config beside it is changed in the same way, so that only the weights disagree."""
    shutil.rmtree(str(tmp_path / "unet"), ignore_errors=True)
    (tmp_path / "unet").mkdir()
    weights = "unet/diffusion_pytorch_model.safetensors"
    os.link(str(saved / weights), str(tmp_path / weights))
    manifest = json.loads((saved / saving.MANIFEST).read_text())
    put(manifest["config"] if both else manifest, data)
    config = manifest["config"] if both and isinstance(manifest["config"], dict) else json.loads(
        (saved / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    (tmp_path / saving.MANIFEST).write_text(json.dumps(manifest))
    with suppress(UserError):
        saving.load_denoiser(tmp_path, saving.read_manifest(tmp_path), "float32")


@fuzz(20)
@given(data=st.data(), both=st.booleans())
def test_a_manifest_with_anything_put_anywhere_is_read_or_refused(saved, tmp_path, data, both):
    check_manifest(saved, tmp_path, data, both)


@pytest.mark.slow
@fuzz(20 * LONG)
@given(data=st.data(), both=st.booleans())
def test_many_manifests_with_anything_put_anywhere_are_read_or_refused(saved, tmp_path, data, both):
    check_manifest(saved, tmp_path, data, both)


@pytest.mark.parametrize(("name", "value"), [
    ("layers_per_block", 10 ** 6), ("block_out_channels", [10 ** 7] * 3), ("transformer_layers_per_block", 10 ** 9)])
def test_a_config_that_asks_for_far_more_than_the_weights_hold_is_refused_at_once(saved, name, value):
    manifest = saving.read_manifest(saved)
    config = {**manifest["config"], name: value}
    with pytest.raises(UserError, match="far more than the weights beside it hold|beyond 100,000,000"):
        saving.check_size(UNet2DConditionModel, config, sorted((saved / "unet").glob("*.safetensors")))


# ---- outputs

@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_an_output_of_any_encoding_takes_every_line(encoding):
    code = "from pruning import cli\ncli.run(lambda: print('−31 ± 2, 1000·MMD², Δ, 漢, \\udcff'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding).startswith({"utf-8": "−31 ± 2", "latin-1": "-31 ± 2"}.get(encoding, "-31 +- 2"))


@pytest.mark.parametrize(("shell", "code", "words"), [
    ("{command} | true", 2, "nobody reads the output"), ("{command} >/dev/full", 2, "the output: No space left"),
    ("{command} >/dev/full 2>/dev/full", 2, ""), ("{command} >&-", 0, ""), ("{command} >&- 2>&-", 0, ""),
    ("HOME= {command}", 0, "")])
def test_an_output_that_takes_nothing_is_no_traceback(tmp_path, shell, code, words):
    if "/dev/full" in shell and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    command = f"{sys.executable} -c 'from pruning import cli; import sys, time; time.sleep(0.1); cli.run(" \
              f"lambda: cli.Parser(\"x\").parse_args(sys.argv[1:]) and print(\"x\" * 99999))'"
    done = subprocess.run(["bash", "-c", f"{shell.format(command=command)}; exit ${{PIPESTATUS[0]}}"], cwd=str(ROOT),
                          capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 1

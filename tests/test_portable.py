"""A pruned pipeline loads in diffusers alone, in a process that cannot import this project."""
from __future__ import annotations

import json
import subprocess
import sys

import torch
from families import FAMILIES, NEEDS_TORCH_25, OLD_TORCH, SIZE

from pruning import data, methods
from pruning.methods import bypass, ranks
from pruning.methods.calibration import answer
from pruning.models import generation, pipelines, saving

NORM = {"criterion": "norm", "refit": False}  # needs no calibration
SAMPLING = {"steps": 1, "guidance_scale": 1.0, "image_size": SIZE}
PROGRAM = """if True:
    import sys
    class Absent:
        def find_spec(self, name, *rest):
            if name.split(".")[0] == "pruning":
                raise ImportError(name)
    sys.meta_path.insert(0, Absent())
    import torch
    from diffusers import DiffusionPipeline
    for folder in sys.argv[1:]:
        case = torch.load(folder + ".pt")
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **case["absent"])
        denoiser = getattr(pipeline, case["component"])
        denoiser.to(case["dtype"])
        with torch.no_grad():
            found = denoiser(**case["call"], return_dict=False)[0]
        print(type(denoiser).__name__, torch.equal(found, case["answer"]))
"""


def units(rate, *methods_):
    def take(denoiser, call):
        for method in methods_:
            methods.prune(method, denoiser, rate, **NORM)
    return take


def blocks(denoiser, call):
    found = bypass.find(denoiser, call)
    bypass.take_out(denoiser, dict(list(found.items())[::2]))


def low_rank(denoiser, call):
    made = ranks.replace(denoiser, list(ranks.modulation_layers(denoiser))[:2], 2)
    for layer in made:
        layer.up.to(denoiser.dtype)


CASES = {
    "sd15 units": ("sd15", units(0.5, "structured", "attention_heads"), torch.float32),
    "sd15 blocks": ("sd15", blocks, torch.float32),
    "sdxl heads in half precision": ("sdxl", units(0.9, "attention_heads"), torch.bfloat16),
    "pixart units": ("pixart", units(0.5, "structured", "attention_heads"), torch.float32),
    "sd3 ranks and neurons": ("sd3", lambda denoiser, call: [low_rank(denoiser, call),
                                                             units(0.5, "structured")(denoiser, call)], torch.float32),
    "sd35 heads": ("sd35", units(0.9, "attention_heads"), torch.float32),
    "sd35 blocks": ("sd35", blocks, torch.float32),
    "flux units": ("flux_dev", units(0.9, "structured", "attention_heads"), torch.float32),
    "sana units": ("sana", units(0.5, "structured", "attention_heads"), torch.float32),
}


def save_case(folder, family, take, dtype):
    """Prune and save a tiny pipeline, and beside it a call of its denoiser and the answer."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family]().to(dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    name = pipelines.denoiser_name(pipeline)
    denoiser = getattr(pipeline, name).eval()
    call = generation.first_call(pipeline, data.load_samples("shapes", 2)[0], seed=0, batch_size=2, **SAMPLING)
    take(denoiser, call)
    saving.save(pipeline, name, folder, SAMPLING, {}, {})
    with torch.no_grad():
        found = answer(denoiser, call)
    torch.save({"component": name, "call": call, "answer": found, "dtype": dtype,
                "absent": dict.fromkeys(json.loads((folder / saving.MANIFEST).read_text())["absent"])}, f"{folder}.pt")


def test_every_family_loads_in_diffusers_alone_and_answers_alike(tmp_path):
    cases = {name: case for name, case in CASES.items() if not (OLD_TORCH and case[0].startswith(NEEDS_TORCH_25))}
    for number, case in enumerate(cases.values()):
        save_case(tmp_path / str(number), *case)
    folders = [str(tmp_path / str(number)) for number in range(len(cases))]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {name: line for name, line in zip(cases, lines) if not (line.startswith("Pruned") and line.endswith("True"))
            } == {}
    assert len(lines) == len(cases)


def test_the_own_loader_runs_no_code_of_a_folder(tmp_path):
    save_case(tmp_path / "saved", *CASES["sd15 units"])
    code, = (tmp_path / "saved" / "unet").glob("*.py")
    code.write_text("raise SystemExit('this code ran')")
    assert type(pipelines.load_pipeline(str(tmp_path / "saved")).unet).__name__ == "UNet2DConditionModel"
    assert code.stem not in sys.modules


def test_a_denoiser_whose_shapes_stay_needs_no_file_of_its_own(tmp_path):
    save_case(tmp_path / "saved", "sd15", lambda denoiser, call: methods.prune("magnitude", denoiser, 0.5),
              torch.float32)
    assert not list((tmp_path / "saved").rglob("*.py"))

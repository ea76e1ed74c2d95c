"""What pruning gives on a GPU: checks of every CUDA path, call times at published sizes, and what the rest takes.

The rest is calibration, recovery, and a sweep of Stable Diffusion 1.5's sizes beside plain generation. Calls are timed
as Python starts their kernels, in CUDA graphs, and compiled.

The large models have random weights, as time depends on shapes alone. Rows are measured in the order of what matters
most until the time is up; the rest is named. The JSON file is written after each row. A row takes the place of an
earlier run's row of the same thing, so a second run can measure what the first had no time for.

example:
  python benchmarks/gpu.py --parts graphs compiled --seconds 400
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of benchmarks/

import copy
import functools
import gc
import json
import re
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import denoisers
from benchmarks.denoisers import MODELS
from benchmarks.sweep import plain_generation
from pruning import cli, methods, pruning_analysis
from pruning.methods import bypass, moments, recovery
from pruning.methods.calibration import GIB, Calibration, answer
from pruning.metrics import costs
from pruning.models import pipelines, provenance
from pruning.records.record import read_record, write_json

ROUNDS = 7  # of dense and pruned calls in alternation
BY_NORM = {"criterion": "norm", "refit": False}  # what is removed decides the time, and norms need no calibration


def free_memory() -> None:
    """Let go of what the last row held on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


# ---- checks: the commands on CUDA

class Check(NamedTuple):
    """Runs of pruning_analysis.py whose records are compared: one command a run, after what is in front of it."""

    runs: List[List[str]]
    alike: float = 0.02  # most that clip_score may differ between the last records, relative
    says: str = ""  # what stderr must hold


QUICK = ["--num_images", "8", "--steps", "10"]
PRUNED = ["--rates", "0.3"]
FLOAT32, BFLOAT16 = ["--dtype", "float32"], ["--dtype", "bfloat16"]
BRIEF = ["--calibration_images", "8"]
# The GPU has as much memory as these processes leave: a share that is too small for the batch.
LITTLE_MEMORY = ("import sys, torch; torch.cuda.set_per_process_memory_fraction({share}); sys.argv[0] = '{script}'; "
                 "from pruning import cli, pruning_analysis; cli.run(pruning_analysis.main)")
CHECKS: Dict[str, Check] = {
    "CPU and GPU": Check([[*FLOAT32, *PRUNED, "--device", "cpu"], [*FLOAT32, *PRUNED]]),
    **{f"{method} in {dtype}": Check([["--method", method, *FLOAT32, *PRUNED],
                                      ["--method", method, "--dtype", dtype, *PRUNED]], 0.05)
       for method in ("magnitude", "structured", "attention_heads", "reconstruct")
       for dtype in ("bfloat16", "float16")},
    **{f"{method} of shapes-mmdit in {dtype}": Check(
        [["--model", "shapes-mmdit", "--method", method, *FLOAT32, *PRUNED, *more],
         ["--model", "shapes-mmdit", "--method", method, "--dtype", dtype, *PRUNED, *more]], 0.05)
       for method, dtype, more in (("structured", "bfloat16", []), ("attention_heads", "float16", []),
                                   ("magnitude", "float16", []), ("modulation", "bfloat16", []),
                                   ("joint", "bfloat16", BRIEF))},
    "joint in float16": Check([["--method", "joint", *FLOAT32, *PRUNED, *BRIEF],
                               ["--method", "joint", "--dtype", "float16", *PRUNED, *BRIEF]], 0.05),
    "blocks in bfloat16": Check([["--method", "blocks", *FLOAT32, *PRUNED, *BRIEF],
                                 ["--method", "blocks", *BFLOAT16, *PRUNED, *BRIEF]], 0.05),
    "iterative": Check([["--method", "iterative", "--recovery_steps", "5", "--rates", "0.2"]]),
    "shapes-mmdit": Check([["--model", "shapes-mmdit", "--method", "structured", *PRUNED],
                           ["--model", "shapes-mmdit", "--method", "structured", *PRUNED, "--device", "cpu"]], 0.05),
    "offload model": Check([[*FLOAT32, *PRUNED], [*FLOAT32, *PRUNED, "--offload", "model"]], 1e-3),
    "offload sequential": Check([[*FLOAT32, *PRUNED], [*FLOAT32, *PRUNED, "--offload", "sequential"]], 1e-3),
    "calibration offloaded": Check([["--method", "structured", *FLOAT32, *PRUNED],
                                    ["--method", "structured", *FLOAT32, *PRUNED, "--offload", "model"]], 0.02),
    "recovery offloaded": Check([["--method", "structured", *FLOAT32, *PRUNED, *BRIEF, "--recovery_steps", "4"],
                                 ["--method", "structured", *FLOAT32, *PRUNED, *BRIEF, "--recovery_steps", "4",
                                  "--offload", "model"]], 0.02),
    "recovery in bfloat16": Check([["--method", "structured", *FLOAT32, *PRUNED, *BRIEF, "--recovery_steps", "4"],
                                   ["--method", "structured", *BFLOAT16, *PRUNED, *BRIEF, "--recovery_steps", "4"]],
                                  0.05),
    "recovery in two processes": Check(
        2 * [["--method", "structured", *FLOAT32, *PRUNED, *BRIEF, "--recovery_steps", "4"]], 0.02),
    "compile": Check([PRUNED, [*PRUNED, "--compile"]], 0.05),
    "resume": Check([["--rates", "0.3", "0.6"], ["--rates", "0.3"], ["--rates", "0.3", "0.6"]], 1e-3),
    "out of memory": Check([["--batch_size", "8", *PRUNED], ["--batch_size", "512", "--num_images", "512",
                                                            *PRUNED]], 1.0, "continuing with halves"),
    "two processes": Check(2 * [["--method", "structured", *FLOAT32, *PRUNED, "--batch_size", "4"]], 0.02),
}


def command(name: str, number: int, flags: List[str], folder: Path) -> List[str]:
    """Return the command line of a run of a check."""
    script, launcher = ROOT / "pruning" / "pruning_analysis.py", [sys.executable]
    if "two processes" in name and number:
        with socket.socket() as found:  # a free port
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    if name == "out of memory" and number:
        launcher += ["-c", LITTLE_MEMORY.format(share=0.004, script=script)]
    else:
        launcher += [str(script)]
    return [*launcher, *QUICK, "--results_dir", str(folder), *flags]


def check(name: str) -> dict:
    """Run a check and return what came out; "failed" says why it failed."""
    wanted, started, records, said = CHECKS[name], time.perf_counter(), [], ""
    with tempfile.TemporaryDirectory() as temporary:
        for number, flags in enumerate(wanted.runs):
            # The second run of "resume" starts a record, and the third goes on with it.
            folder = Path(temporary) / str(min(number, 1) if name == "resume" else number)
            done = subprocess.run(command(name, number, flags, folder), capture_output=True, text=True, cwd=ROOT)
            said = done.stderr
            if done.returncode:
                lines = [line for line in said.splitlines() if line.strip()]
                print(said[-3000:], file=sys.stderr)
                return {"check": name, "failed": f"{' '.join(flags)}: {lines[-1] if lines else done.returncode}"}
            path, = folder.glob("*/shapes/*.json")
            records.append(read_record(path))
    first, last = records[0].points[-1], records[-1].points[-1]
    off = abs(last.metrics["clip_score"] / first.metrics["clip_score"] - 1)
    found = {"check": name, "seconds": round(time.perf_counter() - started, 1), "difference": off,
             "clip_score": [record.points[-1].metrics["clip_score"] for record in records],
             "dense": records[-1].dense.metrics["clip_score"], "compiled": last.compiled,
             "layers_gone": [[name for name, rate in record.points[-1].layer_rates.items() if rate == 1]
                             for record in records],
             "seconds_by_stage": last.seconds}
    if off > wanted.alike:
        found["failed"] = f"clip_score differs by {off:.2g}, more than {wanted.alike:g}"
    if wanted.says not in said:
        found["failed"] = f"stderr does not say {wanted.says!r}"
    if name == "compile" and not last.compiled:
        found["failed"] = "not all calls ran compiled"
    return found


# ---- sizes: the time of a call and its memory

class Size(NamedTuple):
    """A call to time."""

    model: str  # one of MODELS
    pixels: int
    latent: int  # side
    latents: int  # in the call: 2 with guidance


SIZES = [Size("sd15", 512, 64, 8), Size("sd3", 1024, 128, 2), Size("flux", 1024, 64, 1), Size("sdxl", 1024, 128, 2),
         Size("sd35", 1024, 128, 2), Size("sd15", 512, 64, 2), Size("sd3", 512, 64, 2), Size("flux", 512, 32, 1)]


def structured(rate: float, round_to: int = 0) -> Callable:
    """Return a function that removes neurons and channels."""
    return lambda denoiser, _: methods.prune("structured", denoiser, rate, round_to=round_to, **BY_NORM)


def heads(rate: float) -> Callable:
    """Return a function that removes heads, the same share of every attention."""
    return lambda denoiser, _: methods.prune("attention_heads", denoiser, rate, allocation="uniform", **BY_NORM)


def units(denoiser, call: dict) -> None:
    """Remove half of the neurons or channels, and half of the heads, as a budget of `joint` may."""
    structured(0.5)(denoiser, call)
    heads(0.5)(denoiser, call)


def blocks(denoiser, call: dict) -> None:
    """Bypass the second of every four blocks."""
    found = bypass.find(denoiser, call)
    bypass.take_out(denoiser, {name: found[name] for name in list(found)[1::4]})


def semi_structured(denoiser, _: dict) -> str:
    """Zero two of every four weights and store the Linear layers of blocks in torch's 2:4 format. Returns how many."""
    methods.prune("magnitude", denoiser, 0.5, pattern="2:4")
    done = whole = 0
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear):
            whole += 1
            # Layers whose input is a token a latent, such as those of modulation, are too small for these kernels.
            if "block" in name and "norm" not in name and not any(size % 64 for size in layer.weight.shape):
                layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()),
                                            requires_grad=False)
                done += 1
    return f"{done} of {whole} Linear layers in 2:4 format"


VARIANTS: Dict[str, Callable] = {
    "structured 0.5": structured(0.5), "attention_heads 0.5": heads(0.5), "structured and attention_heads 0.5": units,
    "structured 0.3": structured(0.3), "structured 0.7": structured(0.7), "blocks 0.25": blocks,
    "attention_heads 0.3": heads(0.3),
    **{f"structured 0.3, round_to {n}": structured(0.3, n) for n in (1, 16, 64)},
    "structured 0.7, round_to 1": structured(0.7, 1), "2:4": semi_structured,
}
CHANNELS_LAST = "graph, channels last"
MODES = ("eager", "graph", CHANNELS_LAST, "compiled")  # how calls run
# Part -> the modes in which it measures, and its variants
MEASURED = {"eager": (MODES[:1], list(VARIANTS)[:6]), "graphs": (MODES[1:3], list(VARIANTS)[:6]),
            "compiled": (MODES[3:], list(VARIANTS)[:3]), "more": (MODES[:1], list(VARIANTS)[6:])}


def repeated(value, latents: int):
    """Return a call's arguments for several latents: tensors of one row get a row for each."""
    if isinstance(value, dict):
        return {key: repeated(each, latents) for key, each in value.items()}
    return value.repeat(latents, *[1] * (value.dim() - 1)) if value.dim() and len(value) == 1 else value


def built(size: Size, device: str, dtype: str):
    """Return the dense denoiser of a size and the arguments of its call."""
    settings = {"latent": size.latent, "dtype": dtype, "layers": MODELS[size.model].layers.get("cuda")}
    dense, call = denoisers.random_denoiser(MODELS[size.model], settings, device)
    return dense, repeated(call, size.latents)


def compile_denoiser(denoiser) -> None:
    """Compile a UNet as a whole, and of a transformer the repeated blocks, which takes less time, in place."""
    torch._dynamo.config.cache_size_limit = 512  # blocks of many widths share their code
    denoiser.compile() if hasattr(denoiser, "down_blocks") else denoiser.compile_repeated_blocks()


@torch.no_grad()
def ready(denoiser, call: dict, mode: str) -> Callable:
    """Return a function that runs a call as one of MODES says, after what the first call takes.

    A CUDA graph holds all kernels of a call. They then start without Python, so its time is that of the kernels alone.
    """
    if mode == CHANNELS_LAST:
        denoiser.to(memory_format=torch.channels_last)
    if mode == "compiled":
        compile_denoiser(denoiser)
    for _ in range(3):
        denoiser(**call)
    if not mode.startswith("graph"):
        return denoiser
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        denoiser(**call)
    return lambda **_: graph.replay()


def timed(dense, runs_dense: Callable, call: dict, name: str, mode: str) -> dict:
    """Return the costs of a variant beside dense. runs_dense: what `ready` returned for it."""
    pruned, started = copy.deepcopy(dense), time.perf_counter()
    note = VARIANTS[name](pruned, call)
    costs.synchronize(pruned.device)
    seconds = time.perf_counter() - started
    sparse = name == "2:4"
    row = {"variant": name, "mode": mode, "note": note if sparse else "", "prune_seconds": seconds}
    if not sparse:
        row.update(macs=costs.count_macs(pruned, call), **costs.count_parameters(pruned))
    row["peak_bytes"] = costs.peak_bytes(pruned, call)
    started = time.perf_counter()
    runs_pruned = ready(pruned, call, mode)
    costs.synchronize(pruned.device)
    row["ready_seconds"] = time.perf_counter() - started
    row["dense_seconds"], row["seconds"] = costs.denoiser_seconds([runs_dense, runs_pruned], call, ROUNDS)
    return row


def sizes(size: Size, device: str, part: str, until: float, keep: Callable[[dict], None]) -> List[str]:
    """Measure a part's variants of a size, pass each row to `keep`, and return those for which there was no time."""
    modes, names = MEASURED[part]
    left = [(mode, name) for mode in modes for name in names
            if mode != CHANNELS_LAST or MODELS[size.model].denoiser.startswith("UNet")]
    if time.monotonic() > until:
        return [f"{size.model} {size.pixels}, {part}"]
    dense, call = built(size, device, "bfloat16")
    own = {**size._asdict(), "dtype": "bfloat16", "variant": "dense", "macs": costs.count_macs(dense, call),
           **costs.count_parameters(dense), "peak_bytes": costs.peak_bytes(dense, call)}
    prepared = ""
    while left and time.monotonic() < until:
        mode, name = left.pop(0)
        try:
            if mode != prepared:
                started = time.perf_counter()
                runs_dense, prepared = ready(dense, call, mode), mode  # copies of a compiled module are uncompiled
                costs.synchronize(dense.device)
                own = {**own, "mode": mode, "ready_seconds": time.perf_counter() - started}
                own["seconds"], = costs.denoiser_seconds([runs_dense], call, ROUNDS)
                keep(own)
            keep({**size._asdict(), "dtype": "bfloat16", **timed(dense, runs_dense, call, name, mode)})
        except Exception as error:  # of torch's 2:4 format, say; the other rows matter as much
            keep({**size._asdict(), "variant": name, "mode": mode,
                  "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        free_memory()
    torch._dynamo.reset()
    return [f"{size.model} {size.pixels}, {mode}: {name}" for mode, name in left]


# ---- calibration: what pruning itself takes

UNITS = [("sd3", "structured"), ("sd3", "attention_heads"), ("sd15", "attention_heads"), ("sd15", "structured")]
WEIGHTS = [("sd15", "reconstruct"), ("sd15", "sparsegpt"), ("sd3", "reconstruct")]
CALLS = 8  # of two latents; the time of gathering is in proportion to their number


def calibrated(model: str, method: str, device: str, folder: Path, memory: float) -> dict:
    """Prune a model at rate 0.5 with calibration; return the seconds of each stage and the peak memory on the GPU."""
    size = next(size for size in SIZES if size.model == model and size.latents == 2)
    dense, call = built(size, device, "bfloat16")
    weights = costs.count_parameters(dense)["weight_bytes"]
    recorded = []
    for index in range(CALLS):
        shapes = MODELS[model].inputs(size.latent)
        arguments = repeated(denoisers.random_inputs(shapes, dense), size.latents)
        arguments["timestep"] = torch.full((size.latents,), 1000.0 * (index + 1) / CALLS, device=device)
        with torch.no_grad():
            recorded.append((arguments, answer(dense, arguments).cpu()))
    calibration = Calibration(lambda: recorded, 0, first_batch=1, guidance_scale=5.0, memory=int(memory * GIB),
                              folder=folder / f"{model}-{method}")
    layers = methods.gathered_layers(method, dense, {})
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    moments.gather(dense, calibration, layers=layers)
    gathered = time.perf_counter() - started
    gather_peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    done = methods.prune(method, dense, 0.5, calibration=calibration)
    first, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    return {"model": model, "method": method, "weights_bytes": weights, "calls": CALLS,
            "latents": size.latents, "moments_bytes": sum(moments.moment_bytes(layer) for layer in layers.values()),
            "groups": len(moments.memory_groups({name: moments.moment_bytes(layer) for name, layer in layers.items()},
                                                calibration.memory)),
            "gather_seconds": gathered, "gather_peak_bytes": gather_peak, "prune_seconds": first,
            "prune_peak_bytes": peak, "units": done.total, "taken": done.taken}


# ---- recovery: what training takes

def recovered(device: str, steps: int = 3) -> dict:
    """Train a denoiser of Stable Diffusion 1.5's sizes for some steps; return the seconds of a step and the memory.

    From a call at a time of two latents, in mixed precision, with the dense denoiser beside it, from whose blocks it
    learns. Memory: what is said before, and the most that was used; the dense denoiser's weights are in neither.
    """
    size = next(size for size in SIZES if size.model == "sd15" and size.latents == 2)
    dense, call = built(size, device, "bfloat16")
    calls = [(call, torch.randn(call["sample"].shape, dtype=torch.bfloat16)) for _ in range(recovery.CALLS_PER_STEP)]
    row = {"model": size.model, "pixels": size.pixels, "latents": size.latents, "calls_per_step": len(calls)}
    teacher = copy.deepcopy(dense)
    calibration = Calibration(lambda: calls, 0, lend=lambda _: nullcontext(teacher))
    structured(0.5)(dense, call)
    with recovery.training(dense, {}, calibration) as memory:
        recovery.recover(dense, {}, calibration, 1, "0")
        costs.synchronize(dense.device)
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        recovery.recover(dense, {}, calibration, steps, "0")
        costs.synchronize(dense.device)
        row["seconds_a_step"] = (time.perf_counter() - started) / steps
    held = costs.count_parameters(teacher)["weight_bytes"]
    return {**row, "reckoned": memory, "peak_bytes": torch.cuda.max_memory_allocated() - held}


# ---- sweep: beside plain generation

SWEEP_RATES = (0.5,)


def random_pipeline(folder: Path, device: str) -> None:
    """Save a pipeline of Stable Diffusion 1.5's sizes and random weights, with the bundled model's tokenizer."""
    bundled = pipelines.load_pipeline("shapes-unet")
    denoiser, _ = denoisers.random_denoiser(MODELS["sd15"], {"latent": 64, "dtype": "bfloat16"}, device)
    with torch.device(device):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                            down_block_types=4 * ("DownEncoderBlock2D",), up_block_types=4 * ("UpDecoderBlock2D",))
        text = CLIPTextModel(CLIPTextConfig(**{**bundled.text_encoder.config.to_dict(), "hidden_size": 768,
                                               "intermediate_size": 3072, "num_hidden_layers": 12,
                                               "num_attention_heads": 12}))
    StableDiffusionPipeline(vae.bfloat16(), text.bfloat16(), bundled.tokenizer, denoiser.cpu(), bundled.scheduler, None,
                            None, requires_safety_checker=False).save_pretrained(folder)


def swept(device: str, images: int = 32, steps: int = 20, batch: int = 8) -> dict:
    """Time a sweep of magnitude at 512 pixels and plain generation of its images, each after imports."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, results = Path(temporary) / "model", Path(temporary) / "results"
        random_pipeline(folder, device)
        free_memory()

        def sweep(count: int) -> float:
            started = time.perf_counter()
            pruning_analysis.main([
                "--model", str(folder), "--num_images", str(count), "--steps", str(steps), "--guidance_scale", "7.5",
                "--image_size", "512", "--batch_size", str(batch), "--metric_backbones", "bundled", "--device", device,
                "--dtype", "bfloat16", "--results_dir", str(results / str(count)),
                "--rates", *map(str, SWEEP_RATES)])
            return time.perf_counter() - started

        def plain() -> float:
            started = time.perf_counter()
            pipeline = pipelines.load_pipeline(str(folder), device, "bfloat16")
            plain_generation(pipeline, images, 1 + len(SWEEP_RATES), batch, steps, 7.5)
            return time.perf_counter() - started

        sweep(batch)  # imports and chooses kernels
        bare, own = plain(), sweep(images)
        path, = (results / str(images)).glob("*/shapes/*.json")
        record = read_record(path)
    stages = {name: round(sum(point.seconds[name] for point in (record.dense, *record.points)), 2)
              for name in record.dense.seconds}
    return {"model": "sd15", "pixels": 512, "images": images, "steps": steps, "batch": batch,
            "points": 1 + len(SWEEP_RATES), "plain_seconds": bare, "sweep_seconds": own, "ratio": own / bare,
            "seconds_by_stage": stages}


ONE_ROW = {"recovery": recovered, "sweep": swept}
# Part -> the share of the time after which it starts no further row, in the order in which parts are measured.
PARTS = {"checks": 0.3, "eager": 0.6, "sweep": 0.65, "recovery": 0.7, "graphs": 0.8, "units": 0.85, "more": 0.9,
         "compiled": 0.97, "weights": 1.0}
# Part -> the list in the JSON file that its rows go to, if it has another name.
LISTS = {**dict.fromkeys(MEASURED, "sizes"), "units": "calibration", "weights": "calibration"}
WHAT = ("check", "model", "pixels", "latents", "variant", "mode", "method")  # what a row is of


def what(row: dict) -> list:
    """Return what a row is of, with None for what says nothing of it."""
    return [row.get(name) for name in WHAT]


def main(argv: Optional[list] = None) -> None:
    """Measure the parts until the time is up, and print each row."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--parts", nargs="+", type=cli.one_of("part", PARTS), default=list(PARTS), help="what to run")
    parser.add_argument("--seconds", type=cli.positive, default=460, help="start no row later than this")
    parser.add_argument("--checks", nargs="+", type=cli.one_of("check", CHECKS), default=list(CHECKS),
                        help="which checks")
    parser.add_argument("--jobs", type=cli.positive, default=4, help="checks at once")
    parser.add_argument("--memory", type=float, default=24.0, help="GiB of moments on the GPU in one pass")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks", help="where the JSON file goes")
    args = parser.parse_args(argv)
    started, device = time.monotonic(), pipelines.pick_device("cuda")
    machine, origin = provenance.machine(device), {"code": provenance.code_version()}
    label = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = args.output_dir / f"gpu_{label}.json"
    found: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found.update(machine=machine, versions=provenance.package_versions())
    unmeasured: Dict[str, List[str]] = {}

    def keep(part: str, row: dict) -> None:
        rows = found.setdefault(LISTS.get(part, part), [])
        rows[:] = [*(other for other in rows if what(other) != what(row)), {**row, **origin}]
        write_json(found, path)
        print(json.dumps({name: round(value, 4) if isinstance(value, float) else value
                          for name, value in row.items()}), flush=True)

    for part, share in PARTS.items():
        if part not in args.parts:
            continue
        until = started + share * args.seconds
        left = unmeasured[part] = []
        if part == "checks":
            with ThreadPoolExecutor(args.jobs) as pool:
                running = [pool.submit(lambda name, until=until, left=left: check(name) if time.monotonic() < until
                                       else left.append(name), name) for name in args.checks]
                for done in as_completed(running):
                    if done.result():
                        keep(part, done.result())
        elif part in MEASURED:
            for size in SIZES:
                left += sizes(size, device, part, until, functools.partial(keep, part))
                free_memory()
        elif time.monotonic() > until:
            left.append(part)
        elif part in ONE_ROW:
            keep(part, ONE_ROW[part](device))
            free_memory()
        else:
            for model, method in {"units": UNITS, "weights": WEIGHTS}[part]:
                if time.monotonic() > until:
                    left.append(f"{method} of {model}")
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    keep(part, calibrated(model, method, device, Path(folder), args.memory))
                free_memory()
    print("not measured:", unmeasured)
    print(path)


if __name__ == "__main__":
    cli.run(main)

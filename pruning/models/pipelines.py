"""A pipeline by name, its denoiser, and images from (caption, seed).

Only `diffusers` decides how a model is loaded and sampled: the bundled model,
a folder and a hub id take the same path.
"""
from __future__ import annotations

import functools
import hashlib
import inspect
import platform
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from tqdm import tqdm

from pruning import UserError, check_name
from pruning.metrics.costs import synchronize
from pruning.models import saving


class Bundled(NamedTuple):
    """A model of this repository, with the settings it was made for."""

    folder: Path
    steps: int
    guidance_scale: float


SHAPES = Path(__file__).resolve().parents[1] / "shapes"
MODELS = {
    "shapes-unet": Bundled(SHAPES / "shapes-unet", 20, 4.0),
    "shapes-mmdit": Bundled(SHAPES / "shapes-mmdit", 20, 4.0),
}


def release(package: str) -> Tuple[int, ...]:
    """Major and minor version of an installed package."""
    return tuple(map(int, metadata.version(package).split(".")[:2]))


# How parts that a GPU has no room for wait on the CPU: each as a whole, or layer by layer, which is slow.
OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}
# diffusers' keyword for the dtype to load in: the one name is unknown before 0.40, the other deprecated since.
DTYPE = "dtype" if release("diffusers") >= (0, 40) else "torch_dtype"


def load_pipeline(model: str, device: str = "cpu", dtype: str = "float32"):
    """Load a text-to-image pipeline from safetensors: a bundled name, a folder (also of a pruned one) or a hub id.

    Raises UserError where it cannot be had.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils.logging import disable_progress_bar

    source = model_source(model)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()  # of transformers, for the text encoder
    manifest = saving.read_manifest(Path(source)) if Path(source).is_dir() else None
    pruned = {manifest["component"]: saving.load_denoiser(Path(source), manifest, dtype)} if manifest else {}
    try:
        with warnings.catch_warnings():  # of the hub about its own arguments
            warnings.simplefilter("ignore")
            config = DiffusionPipeline.load_config(source)
        check_release(config)
        # A safety checker blackens pictures, which a metric would take for damage.
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        # What the folder has none of must be named, or diffusers misses it: Stable Diffusion 3 without its T5.
        absent = {name: None for name, value in config.items() if value == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(
            source, use_safetensors=True, **{DTYPE: getattr(torch, dtype)}, **{**absent, **unchecked, **pruned})
    except UserError:
        raise
    except Exception as error:  # the boundary to hub, disk and file formats, each with exceptions of its own
        hint = "" if Path(source).is_dir() else (
            ". Without a network, fetch it where there is one with "
            f"`hf download {model} --local-dir FOLDER` and give that: --model FOLDER")
        raise UserError(f"cannot load model {model!r}: {_first_line(error)}{hint}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def fetch(model: str) -> List[Path]:
    """Bring a model's files to this machine without loading them; their paths. Raises UserError as load_pipeline."""
    from diffusers import DiffusionPipeline

    source = model_source(model)
    if not Path(source).is_dir():
        try:
            source = DiffusionPipeline.download(source, use_safetensors=True)
        except Exception as error:  # the boundary to the hub
            raise UserError(f"cannot fetch model {model!r}: {_first_line(error)}") from error
    return sorted(path for path in Path(source).rglob("*") if path.is_file())


def check_release(config: dict) -> None:
    """Raise UserError where diffusers needs a newer torch for the denoiser that a pipeline's config names."""
    import torch

    # Flux's attention passes an argument, and Sana's pipeline without CUDA names an error, that older ones lack.
    newer = ("Flux",) if torch.cuda.is_available() else ("Flux", "Sana")
    name = str((config.get("transformer") or ["", ""])[1])
    if name.startswith(newer) and release("torch") < (2, 5):
        raise UserError(f"diffusers runs {name} with torch 2.5 or later, which needs Python 3.9 or later; "
                        f"this is torch {torch.__version__}")


def model_source(model: str) -> str:
    """Where to load `model` from: a folder's path or a hub id. Raises UserError for what is neither."""
    if model in MODELS:
        return str(MODELS[model].folder)
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise UserError(f"{model} is not a pipeline folder: it has no model_index.json")
        return model
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        if "/" in model:
            raise UserError(f"no model folder {model}")
        check_name("model", model, MODELS)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def denoiser_name(pipeline) -> str:
    """The pipeline's attribute that is pruned. Raises UserError where there is none."""
    for name in saving.DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    raise UserError(f"{type(pipeline).__name__} has neither a unet nor a transformer to prune")


def take_denoiser(pipeline):
    """The dense denoiser, moved to the CPU: points are made from copies of it."""
    return getattr(pipeline, denoiser_name(pipeline)).to("cpu")


def set_denoiser(pipeline, denoiser, device: str = "cpu", offload: Optional[str] = None) -> None:
    """Make the pipeline use `denoiser`, on the device or offloaded to the CPU as diffusers does (OFFLOADS)."""
    if offload:
        pipeline.remove_all_hooks()
    setattr(pipeline, denoiser_name(pipeline), denoiser if offload else denoiser.to(device))
    if offload:
        getattr(pipeline, OFFLOADS[offload])(device=device)


def sampling_settings(pipeline, model: str, given: Optional[dict] = None) -> dict:
    """Steps, guidance scale and image size: as given, or as the model is meant to be used.

    Raises UserError for a guidance scale that the pipeline has no use for, and where it does not say its image size.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    manifest = saving.read_manifest(Path(model)) if model not in MODELS and Path(model).is_dir() else None
    takes = inspect.signature(type(pipeline).__call__).parameters
    if "guidance_scale" in given and "guidance_scale" not in takes:
        raise UserError(f"{type(pipeline).__name__} takes no guidance scale; leave --guidance_scale out")
    if manifest:
        return {**manifest["sampling"], **given}
    guidance = getattr(takes.get("guidance_scale"), "default", None)  # absent or None where there is no use for it
    size = getattr(pipeline, "default_sample_size", None)
    size = size or getattr(getattr(pipeline, denoiser_name(pipeline)).config, "sample_size", None)
    own = MODELS.get(model)
    settings = {
        "steps": own.steps if own else takes["num_inference_steps"].default,
        "guidance_scale": own.guidance_scale if own else float(guidance or 1),
        "image_size": size and size * pipeline.vae_scale_factor,
        **given,
    }
    if settings["image_size"] is None:
        raise UserError(f"{type(pipeline).__name__} does not say what size its images have; give --image_size")
    return settings


def noise_generator(sample, seed: int):
    """The random stream of a sample: it depends on its id, repeat and the seed, never on batch, order or rate."""
    import torch
    digest = hashlib.sha256(f"{seed + sample.repeat}/{sample.id}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Images(NamedTuple):
    """Generated images, and how long they took."""

    pixels: np.ndarray  # uint8 (n, h, w, 3)
    finite: np.ndarray  # bool (n,): False where the pipeline gave NaN or infinity
    seconds_each: float  # synchronised wall time over n


def generate(pipeline, samples, *, seed: int, steps: int, guidance_scale: float, image_size: int, batch_size: int,
             on_batch=None) -> Images:
    """Make one image a sample. `on_batch(count)` is told of every finished batch."""
    pixels, finite, seconds = [], [], 0.0
    for start in range(0, len(samples), batch_size):
        batch = samples[start:start + batch_size]
        synchronize(pipeline.device)
        started = time.perf_counter()
        made = _by_halves(pipeline, batch, seed, steps, guidance_scale, image_size)
        synchronize(pipeline.device)
        seconds += time.perf_counter() - started
        if made.shape[1:3] != (image_size, image_size):
            raise UserError(f"{type(pipeline).__name__} makes images of {made.shape[2]} x {made.shape[1]} pixels where "
                            f"{image_size} a side are asked for; give another --image_size")
        good = np.isfinite(made).all(axis=(1, 2, 3))
        pixels.append((np.nan_to_num(made, posinf=1.0, neginf=0.0).clip(0, 1) * 255).round().astype(np.uint8))
        finite.append(good)
        if on_batch:
            on_batch(len(batch))
    return Images(np.concatenate(pixels), np.concatenate(finite), seconds / len(samples))


def _call(pipeline, batch, seed: int, steps: int, guidance_scale: float, image_size: int) -> np.ndarray:
    """The images of a batch in [0, 1], (n, h, w, 3)."""
    # Without binning the size asked for is the size that is sampled; not every pipeline has it, or guidance.
    options = {"guidance_scale": guidance_scale, "use_resolution_binning": False}
    takes = inspect.signature(type(pipeline).__call__).parameters
    options = {name: value for name, value in options.items() if name in takes}
    try:
        return pipeline(
            prompt=[sample.caption for sample in batch], num_inference_steps=steps, height=image_size,
            width=image_size, output_type="np", generator=[noise_generator(sample, seed) for sample in batch],
            **options).images
    except ValueError as error:  # how pipelines refuse what they are given, an image size above all
        raise UserError(f"{type(pipeline).__name__} cannot make these images: {_first_line(error)}") from error


def _by_halves(pipeline, batch, *settings) -> np.ndarray:
    """_call, in halves where the GPU has no memory for the whole, with a message."""
    import torch
    try:
        return _call(pipeline, batch, *settings)
    except torch.cuda.OutOfMemoryError as error:
        if len(batch) == 1:
            raise UserError("the GPU has no memory for one image; try --offload model, --dtype bfloat16 or a smaller "
                            f"--image_size ({_first_line(error)})") from error
    torch.cuda.empty_cache()  # not in the handler, which holds on to the tensors of the failed call
    half = len(batch) // 2
    tqdm.write(f"no GPU memory for {len(batch)} images at once: going on by halves, as --batch_size {half} would")
    return np.concatenate([_by_halves(pipeline, part, *settings) for part in (batch[:half], batch[half:])])


def fitting_batch_size(pipeline, sample, device: str, guidance_scale: float, image_size: int) -> int:
    """The largest of 32, 16 … 1 images that the GPU has memory for at once; 8 on a CPU, which gains no more."""
    import torch
    if torch.device(device).type == "cpu":
        return 8
    size = 32
    while size > 1:
        try:
            _call(pipeline, [sample] * size, 0, 1, guidance_scale, image_size)
            break
        except torch.cuda.OutOfMemoryError:
            size //= 2
        torch.cuda.empty_cache()
    return size


def remember_prompts(pipeline, most_bytes: int = 2 ** 31) -> None:
    """Let the pipeline encode each batch of prompts once: every rate draws the same ones.

    Kept on the CPU, up to so many bytes; what comes after is encoded anew.
    """
    import torch
    encode, known, held = pipeline.encode_prompt, {}, [0]

    @functools.wraps(encode)
    def remembering(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            return encode(*args, **kwargs)
        if key not in known:
            encoded = encode(*args, **kwargs)
            size = sum(part.numel() * part.element_size() for part in encoded if isinstance(part, torch.Tensor))
            if held[0] + size > most_bytes:
                return encoded
            held[0] += size
            known[key] = [(part.to("cpu"), part.device) if isinstance(part, torch.Tensor) else (part, None)
                          for part in encoded]
        return tuple(part.to(device) if device else part for part, device in known[key])

    pipeline.encode_prompt = remembering


def first_call(pipeline, samples, **settings) -> dict:
    """The keyword arguments of the denoiser's call when images of `samples` are made in one step.

    Also a warm-up: first calls choose kernels and allocate, and are no measure of speed.
    """
    return record_calls(pipeline, samples, **{**settings, "steps": 1})[0][0]


def record_calls(pipeline, samples, *, seed: int, steps: int, guidance_scale: float, image_size: int, batch_size: int,
                 on_batch=None) -> list:
    """Make images of `samples` and keep every call of the denoiser: a list of (keyword arguments, output).

    This is what self-distillation trains on. It needs no images and knows no
    model family: whatever the pipeline passes to its denoiser is kept.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    signature = inspect.signature(denoiser.forward)
    calls = []

    def keep(_module, args, kwargs, output):
        given = signature.bind(*args, **kwargs).arguments
        calls.append(({k: v for k, v in given.items() if v is not None and k != "return_dict"}, output[0].detach()))

    hook = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        generate(pipeline, samples, seed=seed, steps=steps, guidance_scale=guidance_scale, image_size=image_size,
                 batch_size=batch_size, on_batch=on_batch)
    finally:
        hook.remove()
    return calls


def pick_device(device: Optional[str]) -> str:
    """`device`, or CUDA where there is one. Raises UserError for CUDA where there is none."""
    import torch
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"unknown device {device!r} (cpu, cuda or cuda:N)") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device} was asked for, but torch {torch.__version__} finds no CUDA; use --device cpu")
    return device


def label(model: str) -> str:
    """What a record calls the model: its name or hub id, or a folder's own name."""
    return Path(model).resolve().name if model not in MODELS and Path(model).is_dir() else model


def fingerprint(module) -> str:
    """Class and a hash of the weights (every tensor's name, shape and some thousand values), to tell models apart."""
    import torch
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 4096)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{type(module).__name__} {digest.hexdigest()[:12]}"


def fingerprint_rest(pipeline) -> str:
    """A hash of the weights of all that the pipeline has beside its denoiser."""
    import torch
    parts = sorted((name, fingerprint(part)) for name, part in pipeline.components.items()
                   if isinstance(part, torch.nn.Module) and name != denoiser_name(pipeline))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def machine(device: str) -> Dict[str, Any]:
    """What computes, for the record."""
    import torch
    if torch.device(device).type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": torch.get_num_threads()}
    return {"device": f"cpu ({platform.machine()})", "threads": torch.get_num_threads()}


def versions() -> Dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("torch", "diffusers", "transformers", "lpips", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}

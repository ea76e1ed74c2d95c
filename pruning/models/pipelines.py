"""A pipeline by name, its denoiser, and the settings that it is meant for.

Only diffusers decides how a model is loaded: a bundled model, a folder and a hub id take the same path.
"""
from __future__ import annotations

import inspect
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import List, NamedTuple, Optional

from pruning import UserError, check_name
from pruning.models import portable, saving
from pruning.models.provenance import release


class Bundled(NamedTuple):
    """A model of this repository, with the settings that it was trained for."""

    folder: Path
    steps: int
    guidance_scale: float


SHAPES = Path(__file__).resolve().parents[1] / "shapes"
MODELS = {
    "shapes-unet": Bundled(SHAPES / "shapes-unet", 20, 4.0),
    "shapes-mmdit": Bundled(SHAPES / "shapes-mmdit", 20, 4.0),
}

# How modules wait on the CPU when the GPU has too little memory: each as a whole, or layer by layer, which is slow.
OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}
# diffusers' keyword for the dtype: "dtype" is unknown before 0.40, "torch_dtype" is deprecated since then.
DTYPE = "dtype" if release("diffusers") >= (0, 40) else "torch_dtype"


def load_pipeline(model: str, device: str = "cpu", dtype: str = "float32"):
    """Load a text-to-image pipeline from safetensors: a bundled name, a folder (also of a pruned model) or a hub id.

    Raises UserError if there is no such model, its files cannot be read, or diffusers cannot run it here.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils.logging import disable_progress_bar

    source = model_source(model)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()  # transformers shows one for the text encoder
    manifest = saving.read_manifest(Path(source)) if Path(source).is_dir() else None
    pruned = {manifest["component"]: saving.load_denoiser(Path(source), manifest, dtype)} if manifest else {}
    try:
        with warnings.catch_warnings():  # the hub warns about its own arguments
            warnings.simplefilter("ignore")
            config = DiffusionPipeline.load_config(source)
        check_release(config)
        # A safety checker blackens pictures, and a metric would take the black for damage.
        unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        # diffusers demands every component unless it is named as None: Stable Diffusion 3 without its T5, say.
        absent = {name: None for name, value in config.items() if value == [None, None]}
        with portable.imported(*pruned.values()) if pruned else nullcontext():
            pipeline = DiffusionPipeline.from_pretrained(
                source, use_safetensors=True, **{DTYPE: getattr(torch, dtype)}, **{**absent, **unchecked, **pruned})
    except UserError:
        raise
    except Exception as error:  # the hub, the disk and file formats each raise exceptions of their own
        hint = "" if Path(source).is_dir() else (
            ". Without a network, fetch the model on a machine that has one, with "
            f"`hf download {model} --local-dir FOLDER`, and give the folder: --model FOLDER")
        raise UserError(f"cannot load model {model!r}: {first_line(error)}{hint}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def fetch(model: str) -> List[Path]:
    """Bring a model's files to this machine without loading them, and return their paths.

    Raises UserError as load_pipeline does.
    """
    from diffusers import DiffusionPipeline

    source = model_source(model)
    if not Path(source).is_dir():
        try:
            source = DiffusionPipeline.download(source, use_safetensors=True)
        except Exception as error:  # the hub raises exceptions of many kinds
            raise UserError(f"cannot fetch model {model!r}: {first_line(error)}") from error
    return sorted(path for path in Path(source).rglob("*") if path.is_file())


def check_release(config: dict) -> None:
    """Raise UserError if diffusers needs a newer torch for the denoiser that a pipeline's config names."""
    import torch

    # Flux's attention passes an argument that older releases lack. Sana's pipeline names an error that they lack.
    newer = ("Flux",) if torch.cuda.is_available() else ("Flux", "Sana")
    name = str((config.get("transformer") or ["", ""])[1])
    if name.startswith(newer) and release("torch") < (2, 5):
        raise UserError(f"diffusers runs {name} with torch 2.5 or later, which needs Python 3.9 or later; "
                        f"this is torch {torch.__version__}")


def model_source(model: str) -> str:
    """Return where to load `model` from: a folder's path or a hub id. Raises UserError if it is neither."""
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


def label(model: str) -> str:
    """Return the model's name in records: its bundled name or hub id, or a folder's own name."""
    return Path(model).resolve().name if model not in MODELS and Path(model).is_dir() else model


def first_line(error: Exception) -> str:
    """Return the first line of an error's text without its full stop, or the error's class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def denoiser_name(pipeline) -> str:
    """Return the name of the pipeline's attribute that is pruned. Raises UserError if the pipeline has none."""
    for name in saving.DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    raise UserError(f"{type(pipeline).__name__} has neither a unet nor a transformer to prune")


def take_denoiser(pipeline):
    """Move the dense denoiser to the CPU and return it. Every point prunes a copy of it."""
    return getattr(pipeline, denoiser_name(pipeline)).to("cpu")


def set_denoiser(pipeline, denoiser, device: str = "cpu", offload: Optional[str] = None) -> None:
    """Make the pipeline use `denoiser`, on the device or offloaded to the CPU by diffusers (see OFFLOADS)."""
    if offload:
        pipeline.remove_all_hooks()
    setattr(pipeline, denoiser_name(pipeline), denoiser if offload else denoiser.to(device))
    if offload:
        getattr(pipeline, OFFLOADS[offload])(device=device)


def sampling_settings(pipeline, model: str, given: Optional[dict] = None) -> dict:
    """Return steps, guidance_scale and image_size (pixels a side): as given, else as the model is meant to be used.

    Raises UserError if a guidance scale is given and the pipeline takes none, or if the image size is not known.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    manifest = saving.read_manifest(Path(model)) if model not in MODELS and Path(model).is_dir() else None
    takes = inspect.signature(type(pipeline).__call__).parameters
    if "guidance_scale" in given and "guidance_scale" not in takes:
        raise UserError(f"{type(pipeline).__name__} takes no guidance scale; leave --guidance_scale out")
    if manifest:
        return {**manifest["sampling"], **given}
    guidance = getattr(takes.get("guidance_scale"), "default", None)  # absent or None if the pipeline does not guide
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


def pick_device(device: Optional[str]) -> str:
    """Return `device`, or if it is None the GPU if there is one. Raises UserError if CUDA is asked for and absent."""
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

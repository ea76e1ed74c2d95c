"""A pipeline by name, its denoiser, and the settings that it is meant for.

Only diffusers decides how a model is loaded: a bundled model, a folder and a hub id take the same path.
"""
from __future__ import annotations

import copy
import re
from contextlib import ExitStack, contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from pruning import UserError, check_name
from pruning.data.faults import Faults, note, tell
from pruning.models import compiling, hub, portable, saving, signature, weights_files
from pruning.models.hub import first_line
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
OFFLOADS = ("model", "sequential")
DENOISER = "the denoiser beside the rest of the pipeline"  # what the device has no memory for
# diffusers' keyword for the dtype: "dtype" is unknown before 0.40, "torch_dtype" is deprecated since then.
DTYPE = "dtype" if release("diffusers") >= (0, 40) else "torch_dtype"


def load_pipeline(model: str, device: str = "cpu", dtype: str = "float32", faults: Optional[Faults] = None):
    """Load a text-to-image pipeline from safetensors: a bundled name, a folder (also of a pruned model) or a hub id.

    faults: gets the tensors in weights files that no component uses; None: they are printed. Raises UserError if there
    is no such model, its files cannot be read or lack tensors, diffusers cannot run it here, or it makes no images of
    captions alone.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.set_verbosity(CRITICAL)  # what matters of the libraries' messages is an error here
    logging.disable_progress_bar()
    transformers_logging.set_verbosity(CRITICAL)
    transformers_logging.disable_progress_bar()
    folder, config = model_files(model)
    check_release(config)
    signature.pipeline_class(config)
    manifest = saving.read_manifest(folder)
    pruned = {manifest["component"]: saving.load_denoiser(folder, manifest, dtype)} if manifest else {}
    weights_files.check_files(folder, config, {*hub.left_out(config), *pruned})
    with reading(f"model {model!r}"), portable.imported(pruned, config):
        pipeline = DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, **{DTYPE: getattr(torch, dtype)}, **{**hub.left_out(config), **pruned})
        unused = weights_files.unused_tensors(pipeline, folder, set(pruned))
    found: Faults = {} if faults is None else faults
    for name, tensors in unused.items():
        for tensor in tensors:
            note(found, "Tensors in weights files that the classes of their components do not use", f"{name}: {tensor}")
    if faults is None:
        tell(found)
    pipeline.set_progress_bar_config(disable=True)
    return on_device(pipeline, device, model)


def on_device(moved, device: str, what: str):
    """Return a pipeline or a module on the device. Raises UserError that names `what` if its memory is too small."""
    with enough_memory(device, what):
        return moved.to(device)


@contextmanager
def enough_memory(device: str, what: str):
    """Raise UserError that names `what` if the device's memory is too small for the block."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"{device} has no memory for {what}; try --offload model or --dtype bfloat16 "
                        f"({first_line(error)})") from error


def model_files(model: str) -> Tuple[Path, Dict[str, Any]]:
    """Return the folder of a model, fetched if it is on the hub, and its model_index.json.

    Raises UserError if there is no such model, or it cannot be fetched or read.
    """
    from diffusers import DiffusionPipeline

    source = model_source(model)
    if not Path(source).is_dir():
        return hub.fetch_folder(source)
    with reading(f"model {model!r}"):
        return Path(source), dict(DiffusionPipeline.load_config(source))


def fetch(model: str) -> List[Path]:
    """Bring a model's files to this machine without loading them, and return their paths.

    Raises UserError as load_pipeline does.
    """
    return sorted(path for path in model_files(model)[0].rglob("*") if path.is_file())


@contextmanager
def reading(what: str):
    """Turn whatever the block raises into a UserError, because file formats and classes each raise their own errors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = first_line(error)
        if "ignore_mismatched_sizes" in why:  # transformers points to a table that it has printed
            why = "tensors in the weights file of a component have other shapes than its config.json says"
        raise UserError(f"cannot load {what}: {why}") from error


def check_release(config: dict) -> None:
    """Raise UserError if diffusers needs a newer torch for the denoiser that a pipeline's config names."""
    import torch

    # The attention of Flux and Chroma passes an argument that older releases lack. Sana's pipeline names an error that
    # they lack.
    newer = ("Flux", "Chroma") if torch.cuda.is_available() else ("Flux", "Chroma", "Sana")
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
    """Return the model's name in records: its bundled name or hub id, or a folder's own name.

    Raises UserError if the name is no text, which a record could not hold.
    """
    name = Path(model).resolve().name if model not in MODELS and Path(model).is_dir() else model
    if name != name.encode(errors="replace").decode():
        raise UserError(f"the name of the model {model!r} holds bytes that are no text; rename the folder")
    return name


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
    """Make the pipeline use `denoiser`, on the device or offloaded to the CPU (see OFFLOADS).

    Raises UserError if the device has no memory for the denoiser.
    """
    if offload:
        pipeline.remove_all_hooks()
    setattr(pipeline, denoiser_name(pipeline), denoiser if offload else on_device(denoiser, device, DENOISER))
    if offload == "model":
        offload_models(pipeline, device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)


def offload_models(pipeline, device: str) -> None:
    """Let each model of a pipeline wait on the CPU until it is called, and the encoders again while the denoiser runs.

    diffusers' enable_model_cpu_offload brings the denoiser back to the CPU for every batch. Here it stays on the device
    until an encoder is called, as do the models behind it, which are small.
    """
    import torch
    from accelerate import cpu_offload_with_hook

    pipeline.to("cpu")
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    own = denoiser_name(pipeline)
    _, first = cpu_offload_with_hook(models.pop(own), torch.device(device))
    last = first  # each encoder sends the one before it to the CPU, the first one the denoiser
    for name in (pipeline.model_cpu_offload_seq or "").partition(own)[0].split("->"):
        if name in models:
            _, last = cpu_offload_with_hook(models.pop(name), torch.device(device), prev_module_hook=last)
    first.hook.prev_module_hook = last if last is not first else None
    for model in models.values():
        cpu_offload_with_hook(model, torch.device(device))


def copy_to(module, device: str):
    """Return a copy of a denoiser on a device. Its tensors go straight there, so the CPU does not hold them twice.

    Raises UserError if the device has no memory for the copy.
    """
    from torch.nn import Parameter

    with enough_memory(device, DENOISER):
        copies = {id(p): Parameter(p.detach().to(device, copy=True), p.requires_grad) for p in module.parameters()}
        copies.update((id(buffer), buffer.to(device, copy=True)) for buffer in module.buffers())
    return copy.deepcopy(module, copies).to(device)  # the last for what some classes move beside their tensors


@contextmanager
def lent_to(module, device: str):
    """Have a module's tensors on a device during the block. They also wait where they were: nothing is copied back."""
    tensors = [*module.parameters(), *module.buffers()]
    waiting = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, waiting):
            tensor.data = data


@contextmanager
def lent_to_teach(dense, device: str):
    """Yield a denoiser that is on a device during the block, and that runs uncompiled, so that its blocks can be seen.

    Raises UserError if the device has no memory for it.
    """
    with ExitStack() as lent:
        with enough_memory(device, "the dense denoiser beside the one that recovers"):
            lent.enter_context(lent_to(dense, device))
        lent.enter_context(compiling.uncompiled(dense))
        yield dense


def said_settings(pipeline, model: str, given: Optional[dict] = None) -> dict:
    """Return image_size (pixels a side), steps and guidance_scale: as given, else as the model is meant to be used.

    What nothing says is None. Raises UserError if a guidance scale is given and the pipeline takes none.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    if "guidance_scale" in given and signature.guidance_argument(type(pipeline)) is None:
        raise UserError(f"{type(pipeline).__name__} takes no guidance scale; leave --guidance_scale out")
    own = {}
    if model in MODELS:
        own = {"steps": MODELS[model].steps, "guidance_scale": MODELS[model].guidance_scale}
    elif Path(model).is_dir():
        own = (saving.read_manifest(Path(model)) or {}).get("sampling", {})
    return {**signature.settings(pipeline, getattr(pipeline, denoiser_name(pipeline))), **own, **given}


def sampling_settings(pipeline, model: str, given: Optional[dict] = None) -> dict:
    """Return what said_settings does. Raises UserError as it does, and if the image size or the steps are not known."""
    settings = said_settings(pipeline, model, given)
    for name, words in (("image_size", "what size its images have"), ("steps", "in how many steps it draws")):
        if settings[name] is None:
            raise UserError(f"{type(pipeline).__name__} does not say {words}; give --{name}")
    return settings


def pick_device(device: Optional[str]) -> str:
    """Return "cpu", "cuda" or "cuda:N": the device asked for, or if it is None the GPU if there is one.

    Raises UserError if the device is another, or torch cannot use it.
    """
    import torch
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device, re.ASCII):
        raise UserError(f"unknown device {device!r} (cpu, cuda or cuda:N)")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {device} was asked for, but torch {torch.__version__} finds no CUDA; use --device cpu")
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        raise UserError(f"torch cannot use the device {device}: {first_line(error)}") from error
    return device

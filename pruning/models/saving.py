"""A pruned pipeline as a folder: the files that diffusers writes, and a manifest.

diffusers refuses weights whose shapes differ from the config. So the manifest holds the config of the dense denoiser
and the units that were kept. Loading builds the dense denoiser on the meta device, removes the same units again, and
loads the weights strictly. Nothing in the folder is pickled, and nothing in it is trusted.

If the class's own config can say what is left, fewer layers say, that config is written and nothing is left to remove.
Otherwise the folder also holds a Python file by which diffusers loads it without this project (portable).
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Dict, Optional

from pruning import UserError
from pruning.models import portable
from pruning.records.record import write_json

MANIFEST, FORMAT_VERSION = "pruning.json", 1
DENOISERS = ("unet", "transformer")  # the pipeline's component that is pruned
FIELDS = {"component": str, "base_class": str, "config": dict, "removals": list, "sampling": dict, "pruning": dict,
          "point": dict}


def save(pipeline, component: str, folder: Path, sampling: Dict[str, Any], pruning: Dict[str, Any],
         point: Dict[str, Any], call: Optional[Dict[str, Any]] = None) -> None:
    """Write the pipeline with its pruned denoiser as a folder, whole or not at all.

    sampling: the settings that the model is meant for. pruning: all that decides its weights. point: what was measured.
    call: keyword arguments of a denoiser call, on which a denoiser that says its missing blocks in its config must
    answer alike; None: no such denoiser is tried.
    Weights are stored in half precision if no weight changes by that. Raises UserError if `folder` exists or cannot be
    written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder to save to")
    denoiser = pruned = getattr(pipeline, component)
    if call is not None:
        denoiser = _plain(pruned, call)
        setattr(pipeline, component, denoiser)
    config = {name: value for name, value in denoiser.config.items() if name != "_name_or_path"}
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        pipeline.save_pretrained(part, safe_serialization=True)
        if getattr(denoiser, "removals", []):
            portable.write(denoiser, component, part)
        for file in sorted(part.rglob("*.safetensors")):
            narrow(file)
            file.chmod((part / "model_index.json").stat().st_mode)  # safetensors lets only the owner read
        write_json({"format_version": FORMAT_VERSION, "component": component, "base_class": type(denoiser).__name__,
                    "config": config, "removals": getattr(denoiser, "removals", []), "sampling": sampling,
                    "pruning": pruning, "point": point}, part / MANIFEST)
        part.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        setattr(pipeline, component, pruned)
        shutil.rmtree(part, ignore_errors=True)


def _plain(denoiser, call: Dict[str, Any]):
    """Return a denoiser that answers alike and says the blocks that are gone in its config; itself if none does."""
    import torch

    from pruning.methods import bypass, calibration

    plain = bypass.plain(denoiser)
    if plain is None:
        return denoiser
    with torch.no_grad():
        alike = torch.equal(calibration.answer(plain, call), calibration.answer(denoiser, call))
    return plain if alike else denoiser


def narrow(file: Path) -> None:
    """Rewrite a safetensors file in float16 or bfloat16 if every number in it stays the same."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    dtype = _narrow_dtype(tensors)
    if dtype:
        save_file({name: tensor.to(dtype) if _is_wide(tensor) else tensor for name, tensor in tensors.items()}, file,
                  metadata)


def file_bytes(denoiser) -> int:
    """Return the bytes of the denoiser's weights in the file that save() writes, without the names of the tensors."""
    tensors = denoiser.state_dict()
    narrowed = _narrow_dtype(tensors) is not None
    return sum(tensor.numel() * (2 if narrowed and _is_wide(tensor) else tensor.element_size())
               for tensor in tensors.values())


def _narrow_dtype(tensors: Dict[str, Any]):
    """Return the half precision in which all float32 numbers stay the same, None if there is none."""
    import torch

    wide = [tensor for tensor in tensors.values() if _is_wide(tensor)]
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in wide):
            return dtype
    return None


def _is_wide(tensor) -> bool:
    import torch

    return tensor.dtype == torch.float32


def is_saved(folder: Path, pruning: Dict[str, Any]) -> bool:
    """Return whether `folder` holds the model that `pruning` describes. Raises UserError if it holds another."""
    if not folder.exists():
        return False
    manifest = read_manifest(folder)
    if manifest is None or manifest["pruning"] != json.loads(json.dumps(pruning)):
        raise UserError(f"{folder} exists already and holds something else; name another folder to save to")
    return True


def read_manifest(folder: Path) -> Optional[Dict[str, Any]]:
    """Return the manifest of a folder, or None if it has none. Raises UserError if the manifest is malformed."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is not a manifest of a pruned model in format {FORMAT_VERSION}")
    for name, kind in FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(f"{path}: {name} must be {kind.__name__}")
    if manifest["component"] not in DENOISERS:
        raise UserError(f"{path}: component must be one of {', '.join(DENOISERS)}")
    numbers = [manifest["sampling"].get(name) for name in ("steps", "image_size", "guidance_scale")]
    if len(manifest["sampling"]) != 3 or [type(n) for n in numbers[:2]] != [int, int] or min(numbers[:2]) < 1 \
            or type(numbers[2]) not in (int, float):
        raise UserError(f"{path}: sampling must hold steps and image_size, whole numbers above 0, and guidance_scale")
    for plan in manifest["removals"]:
        if not isinstance(plan, dict) or not all(isinstance(keep, list) for keep in plan.values()):
            raise UserError(f"{path}: removals must be a list of objects of lists")
    return manifest


def load_denoiser(folder: Path, manifest: Dict[str, Any], dtype: str):
    """Load the pruned denoiser of a folder on the CPU, in eval mode.

    dtype: of the weights, a name that torch knows. Raises UserError if manifest, config and weights disagree.
    """
    import diffusers
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    from pruning.methods import surgery

    path, weights = Path(folder) / MANIFEST, Path(folder) / manifest["component"]
    try:
        base = json.loads((weights / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the class of the denoiser in {weights / 'config.json'}: {error}") from None
    kind = getattr(diffusers, base, None) if isinstance(base, str) and base == manifest["base_class"] else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise UserError(f"{path} describes a {manifest['base_class']}, {weights} holds a {base}; they must agree")
    try:
        with init_empty_weights():  # only of parameters: buffers are computed, no file holds them
            denoiser = kind.from_config(manifest["config"])
    except Exception as error:  # each class fails in its own way on unknown values
        raise UserError(f"{path}: {base} cannot be built from its config: {error}") from None
    try:
        for plan in manifest["removals"]:
            surgery.apply(denoiser, plan)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None

    tensors: Dict[str, torch.Tensor] = {}
    wide = tuple(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    for file in sorted(weights.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            keep = not tensor.is_floating_point() or any(part in wide for part in name.split("."))
            tensors[name] = tensor.float() if keep and tensor.is_floating_point() else tensor.to(
                tensor.dtype if keep else getattr(torch, dtype))
    try:
        denoiser.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {weights} do not match {path}: {first}") from None
    return denoiser.eval()

"""A pruned pipeline as a folder: the files that diffusers writes, and a manifest.

diffusers refuses weights whose shapes differ from the config. So the manifest holds the config of the dense denoiser
and the units that were kept. Loading builds the dense denoiser on the meta device, removes the same units again, and
loads the weights strictly. Nothing in the folder is pickled, and nothing in it is trusted.

If the class's own config can say what is left, fewer layers say, that config is written and nothing is left to remove.
Otherwise the folder also holds a Python file by which diffusers loads it without this project (portable).
"""
from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from pruning import UserError
from pruning.models import portable, weights_files
from pruning.models.hub import first_line
from pruning.records.record import no_constant, plain, write_json

MANIFEST, FORMAT_VERSION = "pruning.json", 1
DENOISERS = ("unet", "transformer")  # the pipeline's component that is pruned
LARGEST_IMAGE, LARGEST_GUIDANCE = 8192, 1e6  # pixels a side, more than any pipeline draws at once; a scale
FAR_MORE_TENSORS, FAR_MORE_NUMBERS = 10, 1000  # times as many as pruning leaves
FIELDS = {"component": str, "base_class": str, "config": dict, "removals": list, "sampling": dict, "pruning": dict,
          "point": dict}


def save(pipeline, component: str, folder: Path, sampling: Dict[str, Any], pruning: Dict[str, Any],
         point: Dict[str, Any], call: Optional[Dict[str, Any]] = None) -> None:
    """Write the pipeline with its pruned denoiser as a folder, whole or not at all.

    sampling: the settings that the model is meant for. pruning: all that decides its weights. point: what was measured.
    call: keyword arguments of a denoiser call, on which a denoiser that says its missing blocks in its config must
    answer alike; None: no such denoiser is tried.
    Weights are stored in half precision if no weight changes by that. The manifest also names the components that the
    pipeline lacks and that diffusers must be told to load it without. Raises UserError if `folder` exists or cannot be
    written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder to save to")
    from safetensors import SafetensorError

    denoiser = pruned = getattr(pipeline, component)
    if call is not None:
        denoiser = _plain(pruned, call)
        setattr(pipeline, component, denoiser)
    config = {name: value for name, value in denoiser.config.items() if name != "_name_or_path"}
    absent = [name for name, part in pipeline.components.items()
              if part is None and name not in type(pipeline)._optional_components]
    part = part_of(folder)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        pipeline.save_pretrained(part, safe_serialization=True)
        if getattr(denoiser, "removals", []):
            portable.write(denoiser, component, part)
        files = sorted(part.rglob("*.safetensors"))
        for component_folder in {file.parent for file in files}:
            narrow(component_folder)
        for file in files:
            file.chmod((part / "model_index.json").stat().st_mode)  # safetensors lets only the owner read
        write_json({"format_version": FORMAT_VERSION, "component": component, "base_class": type(denoiser).__name__,
                    "config": config, "removals": getattr(denoiser, "removals", []), "sampling": sampling,
                    "pruning": pruning, "point": plain(point), "absent": absent}, part / MANIFEST)
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    finally:
        setattr(pipeline, component, pruned)
        shutil.rmtree(part, ignore_errors=True)


def part_of(folder: Path) -> Path:
    """Return the folder beside `folder` that is written first."""
    return folder.with_name(f".{folder.name}.part")


def check_room(folder: Path, size: int) -> None:
    """Raise UserError unless `folder` can be made, on a disk with `size` bytes of room."""
    try:
        part_of(folder).mkdir(parents=True, exist_ok=True)
        part_of(folder).rmdir()
        free = shutil.disk_usage(folder.parent).free
    except (OSError, ValueError) as error:  # pathlib raises ValueError for a path without a name
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    if free < size:
        raise UserError(f"cannot write {folder}: the pruned pipeline takes at least {size / 1e9:,.1f} GB, and "
                        f"{free / 1e9:,.1f} GB of the disk are free")


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


def narrow(folder: Path) -> None:
    """Rewrite the safetensors files of a component in float16 or bfloat16 if every number in them stays the same."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from pruning.methods import precision

    files = sorted(folder.glob("*.safetensors"))  # shards are read one by one, as the memory may not hold all
    dtype = precision.narrowest(tensor for file in files for tensor in load_file(file).values())
    if dtype is None:
        return
    size = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {name: tensor.to(dtype) if precision.is_wide(tensor) else tensor
                   for name, tensor in load_file(file).items()}
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, file, metadata)
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        write_json({**index, "metadata": {**index["metadata"], "total_size": size}}, path)


def file_bytes(denoiser) -> int:
    """Return the bytes of the denoiser's weights in the files that save() writes, without the names of the tensors."""
    from pruning.methods import precision

    tensors = denoiser.state_dict().values()
    narrowed = precision.narrowest(tensors) is not None
    return sum(tensor.numel() * (2 if narrowed and precision.is_wide(tensor) else tensor.element_size())
               for tensor in tensors)


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
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is not a manifest of a pruned model in format {FORMAT_VERSION}")
    for name, kind in FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(f"{path}: {name} must be {kind.__name__}")
    if manifest["component"] not in DENOISERS:
        raise UserError(f"{path}: component must be one of {', '.join(DENOISERS)}")
    check_sampling(manifest["sampling"], path)
    for plan in manifest["removals"]:
        if not isinstance(plan, dict) or not all(isinstance(keep, list) for keep in plan.values()):
            raise UserError(f"{path}: removals must be a list of objects of lists")
    return manifest


def check_sampling(sampling: Dict[str, Any], path: Path) -> None:
    """Raise UserError that names `path` unless the settings are those that the commands' flags could give."""
    fits = {"steps": lambda value: type(value) is int and 1 <= value < 2 ** 32,
            "image_size": lambda value: type(value) is int and 1 <= value <= LARGEST_IMAGE,
            "guidance_scale": lambda value: type(value) in (int, float) and abs(value) < LARGEST_GUIDANCE}
    if sampling.keys() != fits.keys() or not all(fits[name](value) for name, value in sampling.items()):
        raise UserError(f"{path}: sampling must hold steps and image_size, whole numbers above 0 of which image_size "
                        f"is at most {LARGEST_IMAGE}, and guidance_scale, a number")


def check_size(kind, config: Dict[str, Any], files: List[Path]) -> None:
    """Raise UserError if a denoiser of this config has far more tensors or numbers than its pruned weights hold.

    The denoiser is built on the meta device, where sizes cost neither time nor memory, up to where that is clear.
    """
    import torch
    from torch.nn.modules import module

    shapes = [shape for file in files for shape in weights_files.tensor_shapes(file).values()]
    if any(abs(value) > 10 ** 8 for value in _whole_numbers(config)):
        raise UserError("it holds a number beyond 100,000,000")
    left = [FAR_MORE_TENSORS * len(shapes) + 1000, FAR_MORE_NUMBERS * sum(map(math.prod, shapes)) + 10 ** 8]

    def count(_module, _name, tensor):
        if tensor is not None:
            left[:] = left[0] - 1, left[1] - tensor.numel()
        if min(left) < 0:
            raise UserError("it asks for far more than the weights beside it hold")

    hooks = [module.register_module_parameter_registration_hook(count),
             module.register_module_buffer_registration_hook(count)]
    try:
        with torch.device("meta"):
            kind.from_config(config)
    except UserError:
        raise
    except Exception:  # a class may need real tensors, and what is wrong is said when it is built with these
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _whole_numbers(value) -> Iterator[int]:
    """Yield the whole numbers in nested JSON."""
    if isinstance(value, int):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _whole_numbers(item)


def load_denoiser(folder: Path, manifest: Dict[str, Any], dtype: str):
    """Load the pruned denoiser of a folder on the CPU, in eval mode.

    dtype: of the weights, a name that torch knows. Raises UserError if manifest, config and weights disagree.
    """
    import torch
    from safetensors.torch import load_file

    path, weights = Path(folder) / MANIFEST, Path(folder) / manifest["component"]
    denoiser = empty_denoiser(folder, manifest)
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


def empty_denoiser(folder: Path, manifest: Dict[str, Any]):
    """Return the pruned denoiser of a folder with its parameters on the meta device. Raises as load_denoiser does."""
    import diffusers
    from accelerate import init_empty_weights

    from pruning.methods import surgery

    path, weights = Path(folder) / MANIFEST, Path(folder) / manifest["component"]
    try:
        written = json.loads((weights / "config.json").read_text(encoding="utf-8"))
        base = written["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read the class of the denoiser in {weights / 'config.json'}: {error}") from None
    kind = getattr(diffusers, base, None) if isinstance(base, str) and base == manifest["base_class"] else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise UserError(f"{path} describes a {manifest['base_class']}, {weights} holds a {base}; they must agree")
    differing = sorted(name for name in {*written, *manifest["config"]} if not name.startswith("_")
                       and name != portable.DIFFERENCES and written.get(name) != manifest["config"].get(name))
    if differing:
        raise UserError(f"{path} and {weights / 'config.json'} disagree about {weights_files.some(differing)}; one of "
                        "them was changed after it was saved")
    try:
        check_size(kind, manifest["config"], sorted(weights.glob("*.safetensors")))
        with init_empty_weights():  # only of parameters: buffers are computed, no file holds them
            denoiser = kind.from_config(manifest["config"])
    except Exception as error:  # each class fails in its own way on unknown values
        raise UserError(f"{path}: {base} cannot be built from its config: {error}") from None
    try:
        for plan in manifest["removals"]:
            surgery.apply(denoiser, plan)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return denoiser

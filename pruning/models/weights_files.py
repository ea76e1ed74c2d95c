"""What the weights files of a pipeline hold, beside what its components need.

The libraries fill a tensor that a file lacks with random numbers, and say so in a log only.
"""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

from pruning import UserError
from pruning.models.hub import first_line
from pruning.records.words import counted

# In the order in which diffusers and transformers look for them.
FILES = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
         "model.safetensors", "model.safetensors.index.json")
# Parts of names in files of other releases, which diffusers and transformers rename; "" stands for none.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0", "language_model": ""}


def names_in_files(folder: Path) -> Set[str]:
    """Return the names of the tensors in the weights files of a component's folder; none if it has no safetensors.

    Raises UserError that names the file if one is missing, cut short or not in the format, or that names the tensors if
    files lack some that their index lists.
    """
    path = next((folder / name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()), None)
    if path is None or path.suffix != ".json":
        return set(tensor_names(path)) if path else set()
    try:
        where = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        shards = [folder / shard for shard in sorted(set(where.values()))]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not an index of weights files: {first_line(error)}") from None
    held = {name for shard in shards for name in tensor_names(shard)}
    lacking = sorted(set(where) - held)
    if lacking:
        raise UserError(f"the files that {path} lists lack {counted(len(lacking), 'tensor')}: {some(lacking)}; fetch "
                        "the model again")
    return held


def tensor_names(file: Path) -> List[str]:
    """Return the names of the tensors in a safetensors file. Raises UserError if it is missing or cut short."""
    return list(tensor_shapes(file))


def tensor_shapes(file: Path) -> Dict[str, List[int]]:
    """Return the shape of each tensor in a safetensors file. Raises UserError if it is missing or cut short."""
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # safetensors raises errors of its own, in some releases for a missing file too
        why = "is missing" if not file.exists() else f"is no whole safetensors file ({first_line(error)})"
        raise UserError(f"{file} {why}; fetch it again") from None


def check_files(folder: Path, config: Dict[str, Any], but: Set[str]) -> None:
    """Raise UserError if a component that model_index.json names has no files, or a weights file cannot be read.

    config: what model_index.json holds. Components named in `but` are left out.
    """
    flat = (folder / "config.json").exists()  # some pipelines keep the files of a component beside model_index.json
    for name, kind in config.items():
        if name.startswith("_") or name in but or not (isinstance(kind, (list, tuple)) and len(kind) == 2):
            continue
        if not (flat or (folder / name).is_dir() and any((folder / name).iterdir())):
            raise UserError(f"{folder} has no files in {name}/, which its model_index.json names; fetch the model "
                            "again")
        names_in_files(folder / name)


def unused_tensors(pipeline, folder: Path, but: Set[str]) -> Dict[str, List[str]]:
    """Return {component: names of tensors in its files that it does not use}, without components that use all.

    Components named in `but`, and those that are no torch modules, are left out. Raises UserError that names the
    tensors if a component's files lack some.
    """
    import torch

    unused = {}
    for name, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module) or name in but:
            continue
        held = names_in_files(folder / name)
        missing, extra = differing_names(part, held) if held else ([], [])
        if missing:  # perhaps the library knows other names for them
            _, info = type(part).from_pretrained(folder / name, use_safetensors=True, output_loading_info=True)
            needed = {each for each, _ in _loaded(part)}
            empty = {each for each, tensor in _loaded(part) if tensor.is_meta}
            missing = sorted(needed & set(info["missing_keys"]) | empty)
            extra = sorted(info["unexpected_keys"])
        if missing:
            raise UserError(f"the weights in {folder / name} lack {counted(len(missing), 'tensor')} of "
                            f"{type(part).__name__}: {some(missing)}; fetch the model again")
        if extra:
            unused[name] = extra
    return unused


def differing_names(module, held: Set[str]) -> Tuple[List[str], List[str]]:
    """Return the tensors of a module that `held` lacks, and those of `held` that the module has no place for.

    Names count as equal with and without a prefix that all names share or that transformers gives the model within a
    model, with names of early releases, and if tensors share their memory.
    """
    prefixes = {f"{getattr(module, 'base_model_prefix', '')}.", _shared(held), _shared(module.state_dict())} - {"", "."}
    ignored = [*(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())]

    def forms(name: str) -> Set[str]:
        """Return the names under which a tensor may be known."""
        *parents, last = name.split(".")
        own = {name, ".".join([*filter(None, (RENAMED.get(each, each) for each in parents)), last])}
        return own | {each[len(prefix):] for each in own for prefix in prefixes if each.startswith(prefix)}

    known = {form for name in held for form in forms(name)}
    found: Dict[Any, bool] = {}
    for name, tensor in _loaded(module):
        found[_place(tensor)] = found.get(_place(tensor), False) or bool(forms(name) & known)
    missing = sorted(name for name, tensor in _loaded(module) if not found[_place(tensor)])
    places = {form for name, _ in (*module.state_dict().items(), *module.named_buffers()) for form in forms(name)}
    extra = sorted(name for name in held if not forms(name) & places
                   and not any(re.search(pattern, name) for pattern in ignored))
    return missing, extra


def _shared(names) -> str:
    """Return the first part of dotted names, with its dot, if all of them begin with it, else ""."""
    first = {name.partition(".")[0] for name in names}
    return f"{first.pop()}." if len(first) == 1 else ""


def _loaded(module) -> List[Tuple[str, Any]]:
    """Return the tensors of a module that only a file can give: parameters and running statistics, by name."""
    buffers = [pair for pair in module.named_buffers() if pair[0].endswith(("running_mean", "running_var"))]
    return [*module.named_parameters(remove_duplicate=False), *buffers]


def _place(tensor) -> Tuple:
    """Return where a tensor lies, so that tensors that share their memory are one."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def some(names: List[str]) -> str:
    """Return the first three of some names, as text."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")

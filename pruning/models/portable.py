"""A pruned denoiser that diffusers loads without this project: a Python file beside its weights rebuilds its shapes.

The config of such a denoiser says how it differs from a dense one: modules of other classes, other numbers in modules,
other shapes of parameters. The file holds the class that applies these differences, and the source of the classes of
this project that stand in the denoiser. DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) runs it.
"""
from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, List

from pruning.records.record import write_json

DIFFERENCES = "pruned"  # the name in the config of what `rebuild` takes
# The name of the file: diffusers keeps files of all folders in one place, so those that differ need names of their own.
MODULE = "pruned_denoiser_{}"
TEMPLATE = '''"""{name}: a {base} of which pruning has removed parts.

Load the folder above with diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""
from __future__ import annotations

import inspect

import torch
from {package} import {base}
from torch import Tensor, nn
from torch.nn import functional as F


class {name}({base}):
    """A {base} with the modules, numbers and shapes that pruning left. Its config says under "pruned" which."""

    def __init__(self, pruned=None, **config):
        super().__init__(**config)
        self.register_to_config(pruned=pruned)
        if pruned:
            rebuild(self, pruned)

    # Diffusers reads of a config what this signature names.
    __init__.__signature__ = inspect.Signature([*inspect.signature({base}.__init__).parameters.values(),
                                                inspect.Parameter("pruned", inspect.Parameter.KEYWORD_ONLY)])


{rebuild}'''


def rebuild(model, pruned):
    """Give a dense model the modules, numbers and shapes that pruning left, in place; weights are loaded later.

    pruned: "modules", name -> class of those that took the place of others, outer ones first; "numbers", name of a
    module -> attributes; "shared", name of a module -> attributes that are other modules; "shapes", name -> shape;
    "processors", name of an attention -> class of diffusers.
    """
    import torch
    from diffusers.models import attention_processor
    from torch import nn

    device = next(model.parameters()).device
    for name, kind in pruned["modules"].items():
        made = object.__new__(globals().get(kind) or getattr(nn, kind))
        nn.Module.__init__(made)
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._modules[own] = made
    for name, numbers in pruned["numbers"].items():
        vars(model.get_submodule(name)).update(
            (key, tuple(value) if isinstance(value, list) else value) for key, value in numbers.items())
    for name, others in pruned["shared"].items():
        vars(model.get_submodule(name)).update((key, model.get_submodule(other)) for key, other in others.items())
    for name, shape in pruned["shapes"].items():
        module, _, own = name.rpartition(".")
        parameter = None if shape is None else nn.Parameter(torch.empty(shape, device=device))
        model.get_submodule(module).register_parameter(own, parameter)
    for name, kind in pruned["processors"].items():
        model.get_submodule(name).set_processor(getattr(attention_processor, kind)())


def write(denoiser, component: str, folder: Path) -> None:
    """Add to a saved pipeline's folder what diffusers needs to load its pruned denoiser. Raises OSError."""
    base = type(denoiser).__name__
    weights = folder / component
    source = source_of(denoiser)
    module = MODULE.format(hashlib.sha256(source.encode()).hexdigest()[:12])
    (weights / f"{module}.py").write_text(source, encoding="utf-8")
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    write_json({**config, DIFFERENCES: differences(denoiser)}, weights / "config.json")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_json({**index, component: [module, f"Pruned{base}"]}, folder / "model_index.json")


@contextmanager
def imported(loaded: Dict[str, Any], index: Dict[str, Any]) -> Iterator[None]:
    """Inside the block, a class that `write` names is that of the loaded denoiser, and no code of a folder runs for it.

    loaded: component -> denoiser. index: what the folder's model_index.json holds; modules that `write` does not name
    are left as they are.
    """
    from diffusers import ModelMixin
    made = {}
    for component, denoiser in loaded.items():
        listed = index.get(component)
        name = str(listed[0]) if isinstance(listed, (list, tuple)) and listed else ""
        if re.fullmatch(MODULE.format("[0-9a-f]{12}"), name):
            made[name] = ModuleType(name)
            made[name].ModelMixin = ModelMixin  # what diffusers expects the class to build on
            setattr(made[name], f"Pruned{type(denoiser).__name__}", type(denoiser))
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def source_of(denoiser) -> str:
    """Return the text of the file that defines the denoiser's class for diffusers."""
    base = type(denoiser).__name__
    text = TEMPLATE.format(name=f"Pruned{base}", base=base, package="diffusers", rebuild=inspect.getsource(rebuild))
    return "\n\n".join([text, *map(_without_init, _own_classes(denoiser))])


def _own_classes(denoiser) -> List[type]:
    """Return the classes of this project of which the denoiser has modules, each after those that it builds on."""
    found: Dict[type, None] = {}
    for module in denoiser.modules():
        found.update(dict.fromkeys(kind for kind in reversed(type(module).__mro__)
                                   if kind.__module__.startswith("pruning.")))
    return list(found)


def _without_init(kind: type) -> str:
    """Return the source of a class without its __init__, which makes it of dense modules."""
    text = textwrap.dedent(inspect.getsource(kind))
    lines = text.splitlines()
    for each in ast.parse(text).body[0].body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            del lines[each.lineno - 1:each.end_lineno + 1]  # and the empty line after it
    return "\n" + "\n".join(lines) + "\n"


def differences(denoiser) -> Dict[str, Dict[str, Any]]:
    """Return how a pruned denoiser differs from a dense one of its config, as `rebuild` takes it."""
    from accelerate import init_empty_weights
    from torch import nn

    with init_empty_weights():
        dense = type(denoiser).from_config({name: value for name, value in denoiser.config.items()
                                            if not name.startswith("_")})
    before, names = dict(dense.named_modules()), {module: name for name, module in denoiser.named_modules()}
    found: Dict[str, Dict[str, Any]] = {"modules": {}, "numbers": {}, "shared": {}, "shapes": {}, "processors": {}}
    for name, module in denoiser.named_modules():
        old = before.get(name)
        if any(name.startswith(f"{new}.") for new in found["modules"]) or type(old) is not type(module):
            old = None
            found["modules"][name] = type(module).__name__
        processor = type(getattr(module, "processor", None))
        if old is not None and processor is not type(getattr(old, "processor", None)):
            found["processors"][name] = processor.__name__
        known = {} if old is None else _numbers(old)
        numbers = {key: value for key, value in _numbers(module).items() if key not in known or known[key] != value}
        shared = {key: names[value] for key, value in vars(module).items() if isinstance(value, nn.Module)}
        shapes = {f"{name}.{own}": _shape(parameter) for own, parameter in module._parameters.items()
                  if old is None or _shape(parameter) != _shape(old._parameters.get(own))}
        for part, own in (("numbers", numbers), ("shared", shared)):
            if own:
                found[part][name] = own
        found["shapes"].update(shapes)
    return found


def _numbers(module) -> Dict[str, Any]:
    """Return the attributes of a module that are numbers, texts or lists of these, as JSON has them."""
    def plain(value):
        return value is None or isinstance(value, (bool, int, float, str)) or (
            isinstance(value, (list, tuple)) and all(map(plain, value)))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(module).items()
            if plain(value) and not name.startswith("_") and name not in ("training", "removals")}


def _shape(parameter) -> Any:
    return None if parameter is None else list(parameter.shape)

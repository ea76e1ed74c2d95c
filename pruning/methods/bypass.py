"""Blocks of which only the residual path stays: find, bypass, replay, and say it in the class's own config.

A transformer block, a ResNet or a spatial transformer of a UNet returns what it is given plus a change. Bypassed, it
returns what it is given.
"""
from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional

import torch
from accelerate import init_empty_weights
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from pruning import UserError
from pruning.methods.calibration import answer
from pruning.methods.moments import hooked

Streams = List[Optional[str]]  # for each output of a block the argument whose stream it carries on; None: no output
UNIT = "blocks"  # in names of plans: "transformer_blocks.3.blocks"


class Bypass(nn.Module):
    """The residual path of a block: returns arguments of the block as they are, one as it is and several as a tuple."""

    def __init__(self, block: nn.Module, streams: Streams):
        super().__init__()
        self.names, self.streams = _arguments(block), list(streams)
        # Denoisers read such marks of their blocks, "context_pre_only" say.
        self.__dict__.update({name: value for name, value in vars(block).items()
                              if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
                              and name != "training"})

    def forward(self, *args, **kwargs):
        """Take the arguments of the block."""
        given = {**dict(zip(self.names, args)), **kwargs}
        outputs = tuple(None if name is None else given[name] for name in self.streams)
        return outputs if len(outputs) > 1 else outputs[0]


class TransformerBypass(Bypass):
    """The residual path of a spatial transformer: (batch, channels, height, width) as it came."""

    def forward(self, *args, **kwargs):
        """Take the arguments of Transformer2DModel."""
        return (super().forward(*args, **kwargs),)


class ResnetBypass(Bypass):
    """The residual path of a ResNet: its input, through the shortcut if widths differ."""

    def __init__(self, block: nn.Module, streams: Streams):
        super().__init__(block, streams)
        self.conv_shortcut = block.conv_shortcut

    def forward(self, input_tensor: Tensor, *args, **kwargs) -> Tensor:
        """Take the arguments of ResnetBlock2D."""
        x = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return x / self.output_scale_factor


BYPASSES = {ResnetBlock2D: ResnetBypass, Transformer2DModel: TransformerBypass}


@torch.no_grad()
def find(denoiser: nn.Module, call: Dict[str, Any]) -> Dict[str, Streams]:
    """Return the blocks that can be bypassed, by name in the order in which they run, and their streams.

    These are modules in lists of modules whose outputs each have the shape of one of their arguments, seen in a call
    of the denoiser with these keyword arguments. A spatial transformer of several transformer blocks counts as these,
    one of a single block as itself.
    """
    listed = {f"{name}.{place}": block for name, blocks in denoiser.named_modules()
              if isinstance(blocks, nn.ModuleList) for place, block in enumerate(blocks)}
    found: Dict[str, Streams] = {}

    def watch(name):
        def note(block, args, kwargs, output):
            streams = _streams(block, _given(_arguments(block), args, kwargs), output)
            if streams:
                found[name] = streams
        return note

    with hooked(block.register_forward_hook(watch(name), with_kwargs=True) for name, block in listed.items()
                if any(True for _ in block.children())):
        answer(denoiser, call)
    inner = {name: [other for other in found if other.startswith(f"{name}.")] for name in found}
    hidden = {other for name, others in inner.items() for other in ([name] if len(others) > 1 else others)}
    return {name: streams for name, streams in found.items() if name not in hidden}


def _streams(block: nn.Module, given: Dict[str, Any], output: Any) -> Optional[Streams]:
    """Return which arguments the outputs carry on; None if there is an output that carries on none."""
    if type(block) is ResnetBlock2D:
        return ["input_tensor"] if given["input_tensor"].shape[2:] == output.shape[2:] else None
    streams: Streams = []
    for each in output if isinstance(output, tuple) else (output,):
        alike = {name: value for name, value in given.items() if isinstance(each, Tensor) and isinstance(value, Tensor)
                 and value.shape == each.shape and name not in streams}
        if each is not None and not alike:
            return None
        # Where text and image have the same shape, what a block adds is small beside the difference of the two.
        streams.append(None if each is None else min(alike, key=lambda name: float((each - alike[name]).norm())))
    return streams if any(streams) else None


def reached(denoiser: nn.Module, blocks: Iterable[str]) -> Dict[str, int]:
    """Return how many numbers of each parameter go with these blocks, by name: all but those of shortcuts."""
    return {name: parameter.numel() for name, parameter in denoiser.named_parameters()
            if inside(name, blocks) and ".conv_shortcut." not in name}


def inside(name: str, blocks: Iterable[str]) -> bool:
    """Return whether what has this name lies in one of the blocks."""
    return any(name.startswith(f"{block}.") for block in blocks)


def _given(names: List[str], args: tuple, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    return {**dict(zip(names, args)), **kwargs}


def _arguments(block: nn.Module) -> List[str]:
    return list(inspect.signature(type(block).forward).parameters)[1:]


def bypass_of(block: nn.Module, streams: Streams) -> Bypass:
    """Return what stands in for a block."""
    return BYPASSES.get(type(block), Bypass)(block, streams)


def replace(denoiser: nn.Module, blocks: Dict[str, Streams]) -> None:
    """Bypass blocks, in place. Works on the meta device too."""
    for name, streams in blocks.items():
        block = denoiser.get_submodule(name)
        _put(denoiser, name, bypass_of(block, streams).train(block.training))


def _put(denoiser: nn.Module, name: str, block: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    denoiser.get_submodule(parent)[int(own)] = block


def take_out(denoiser: nn.Module, blocks: Dict[str, Streams]) -> None:
    """Bypass blocks, in place, and note the removal."""
    if blocks:
        replace(denoiser, blocks)
        plan = {f"{name}.{UNIT}": list(streams) for name, streams in blocks.items()}
        denoiser.removals = [*getattr(denoiser, "removals", []), plan]


def replay(denoiser: nn.Module, plan: Dict[str, list]) -> None:
    """Bypass blocks as a plan of `removals` says. Raises UserError if the plan does not fit the denoiser."""
    modules, blocks = dict(denoiser.named_modules()), {}
    for key, streams in plan.items():
        name = key.rpartition(".")[0]
        block = modules.get(name)
        if not isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList) or block is None:
            raise UserError(f"{type(denoiser).__name__} has no block {name} to bypass")
        if not streams or any(stream is not None and stream not in _arguments(block) for stream in streams):
            raise UserError(f"{name}: the streams of a block must be names of its arguments; got {streams}")
        blocks[name] = streams
    take_out(denoiser, blocks)


@contextmanager
def bypassed(denoiser: nn.Module, blocks: Dict[str, Streams]) -> Iterator[None]:
    """Bypass blocks inside the code block, and put them back afterwards."""
    before = {name: denoiser.get_submodule(name) for name in blocks}
    replace(denoiser, blocks)
    try:
        yield
    finally:
        for name, block in before.items():
            _put(denoiser, name, block)


# ---- the same denoiser without stand-ins

def plain(denoiser: nn.Module) -> Optional[nn.Module]:
    """Return a denoiser of the same class that holds the same weights and no bypassed blocks, in eval mode.

    Its config says fewer layers. None if more than blocks was removed, if none was, or if no config of the class says
    what is left.
    """
    plans = getattr(denoiser, "removals", [])
    if not plans or not all(key.endswith(f".{UNIT}") for plan in plans for key in plan):
        return None
    config = {name: value for name, value in denoiser.config.items() if not name.startswith("_")}
    places: Dict[str, str] = {}  # of blocks that stay: the name before -> the name now
    for name, blocks in denoiser.named_modules():
        if isinstance(blocks, nn.ModuleList) and any(isinstance(block, Bypass) for block in blocks):
            kept = [place for place, block in enumerate(blocks) if not isinstance(block, Bypass)]
            config = _with_fewer(type(denoiser), config, name, len(blocks), kept)
            if config is None:
                return None
            places.update({f"{name}.{old}": f"{name}.{new}" for new, old in enumerate(kept)})
    weights = {}
    for name, tensor in denoiser.state_dict().items():
        block = next((old for old in places if name.startswith(f"{old}.")), "")
        weights[places.get(block, "") + name[len(block):]] = tensor
    made = _built(type(denoiser), config)
    try:
        made.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError:  # names or shapes differ
        return None
    return made.eval()


def _with_fewer(kind: type, config: Dict[str, Any], name: str, count: int, kept: List[int]) -> Optional[Dict[str, Any]]:
    """Return a config with which the list of modules `name` has only the blocks `kept` of its `count`; None if none."""
    for key, value in config.items():
        if type(value) is not int or value != count:
            continue
        changed = {**config, key: len(kept)}
        for other, numbers in config.items():  # numbers of blocks, such as dual_attention_layers
            if other.endswith("_layers") and isinstance(numbers, (list, tuple)) and set(numbers) <= set(range(count)):
                changed[other] = [kept.index(number) for number in numbers if number in kept]
        made = _built(kind, changed)
        if made is not None and len(dict(made.named_modules()).get(name, ())) == len(kept):
            return changed
    return None


def _built(kind: type, config: Dict[str, Any]) -> Optional[nn.Module]:
    """Return a denoiser of this class and config without weights, or None if the class refuses the config."""
    try:
        with init_empty_weights():  # only of parameters: buffers are computed
            return kind.from_config(config)
    except Exception:  # each class fails in its own way
        return None

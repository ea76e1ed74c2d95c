"""Taking units out of a denoiser, or zeroing them in place: find, score, mask, remove, replay.

KINDS (kinds.py) says which rows and columns of which layers a unit owns. A plan is {group name: indices kept}, with
group names such as "mid_block.attentions.0.transformer_blocks.0.attn1.heads"; groups that lose nothing are not in it.
Applying a plan needs no weights, so it can be replayed on the meta device.
"""
from __future__ import annotations

import re
from collections import Counter
from typing import Dict, Iterable, Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError, distributed
from pruning.methods import bypass, feedforwards, kinds, ranks

Plan = Dict[str, List[int]]  # {group name: indices of the units kept, ascending}
UNITS = ("heads", "neurons", "channels")  # the layers behind these write into the residual stream


class Part(NamedTuple):
    """What the units of a group own of a layer: `count` places from `first` along a dimension of its weight."""

    path: str  # of the layer in the module
    layer: nn.Module
    dim: int
    first: int
    count: int


class Group(NamedTuple):
    """The units of one kind in one module."""

    name: str  # the module's name and the unit, joined by a dot
    module: nn.Module
    kind: kinds.Kind
    units: int
    norm_groups: int  # norm groups, which must lose equally many units

    def parts(self, scored: bool = False) -> List[Part]:
        """Return what the units own of each layer; with `scored`, only of layers that count."""
        layers, kind = dict(self.module.named_modules()), self.kind
        found = [self._part(path, layers[path], dim) for dim, paths in enumerate((kind.rows, kind.columns))
                 for path in paths if path in layers]
        if scored:
            return found
        widths = {part.count for part in found if part.dim == 0}
        for path in kind.follows:
            weight = getattr(layers.get(path), "weight", None)  # a norm within each head is narrower
            if weight is not None and (weight.shape[0] in widths or weight.shape[0] % self.inner == 0):
                found.append(self._part(path, layers[path], 0))
        return found

    def _part(self, path: str, layer: nn.Module, dim: int) -> Part:
        span = self.kind.spans.get(path)
        return Part(path, layer, dim, *(span(self.module) if span else (0, layer.weight.shape[dim])))

    @property
    def inner(self) -> int:
        """The inner width: how many inputs of the first layer behind the units belong to them."""
        return self._part(self.kind.columns[0], self.module.get_submodule(self.kind.columns[0]), 1).count

    def columns(self) -> Dict[str, Part]:
        """Return what the units own of the layers behind them, by the name of the weight in the denoiser."""
        return {self.path(f"{part.path}.weight"): part for part in self.parts(scored=True) if part.dim == 1}

    def column_layers(self) -> Dict[str, nn.Module]:
        """Return the layers some of whose inputs the units own, by the name of the weight in the denoiser."""
        return {name: part.layer for name, part in self.columns().items()}

    def path(self, inner: str) -> str:
        """Return the denoiser's name for what the module calls `inner`."""
        return f"{self.name.rpartition('.')[0]}.{inner}".lstrip(".")

    def by_unit(self, tensor: Tensor, part: Part) -> Tensor:
        """View what the units own of a layer's weight or bias: its dimension as (blocks, units, places a unit).

        There is one block for each time that the inner width fits.
        """
        own, blocks = tensor.narrow(part.dim, part.first, part.count), max(part.count // self.inner, 1)
        return own.unflatten(part.dim, (blocks, self.units, part.count // blocks // self.units))

    def owned(self) -> Iterator[Tuple[nn.Parameter, Part, Tensor]]:
        """Yield each parameter, the part of its layer, and a view of what the units own of it, see by_unit."""
        for part in self.parts():
            yield part.layer.weight, part, self.by_unit(part.layer.weight, part)
            if part.dim == 0 and getattr(part.layer, "bias", None) is not None:
                yield part.layer.bias, part, self.by_unit(part.layer.bias, part)
        for module, name in self.vectors():
            parameter = getattr(module, name)
            yield parameter, Part(name, module, 0, 0, parameter.numel()), parameter.view(1, self.units, -1)

    def vectors(self) -> List[Tuple[nn.Module, str]]:
        """Return the modules and names of the parameters that hold numbers of the units and no others."""
        owners = [path.rpartition(".")[::2] for path in self.kind.vectors]
        return [(self.module.get_submodule(owner), name) for owner, name in owners]

    def norms_across(self) -> List[str]:
        """Return the norms whose statistics run over the units that are left, so that removal is not masking."""
        return [part.path for part in self.parts() if isinstance(part.layer, kinds.NORMS)]


def survey(denoiser: nn.Module, *units: str) -> Tuple[List[Group], Dict[str, str]]:
    """Return the groups of these units, in module order, and the modules skipped: {name: why}.

    Three sorts of modules are skipped: those of a known class whose removal would not be exact, those with layers that
    cannot be sliced (of other classes, or with weights that another layer shares), and those of classes that KINDS
    does not know and whose names suggest such units.
    """
    groups, skipped = find_groups(denoiser, units)
    return groups, {**skipped, **unknown_modules(denoiser, units, groups)}


def find_groups(denoiser: nn.Module, units: Iterable[str]) -> Tuple[List[Group], Dict[str, str]]:
    """Return the groups of these units, and the known modules skipped: {name: why}."""
    groups, skipped, seen = [], {}, set()
    owners = Counter(id(p) for module in denoiser.modules() for p in module._parameters.values() if p is not None)
    for name, module in denoiser.named_modules():
        for unit in units:
            rows = [kind for kind in kinds.KINDS if kind.unit == unit and kind.fits(module) and kind.units(module)]
            kind = next((kind for kind in rows if not kind.obstacle(module)), rows[0] if rows else None)
            if kind is None:
                continue
            group = Group(f"{name}.{unit}", module, kind, kind.units(module), kind.norm_groups(module))
            layers = dict(module.named_modules())
            own = {(unit, id(layers[path])) for path in kind.rows if path in layers}
            if own & seen:  # an attention whose heads belong to the block around it
                continue
            seen |= own
            why = kind.obstacle(module) or layer_obstacle(group, owners)
            if why:
                skipped[name] = why
            else:
                groups.append(group)
    if "neurons" in units:
        groups += probed_groups(denoiser, owners)
    places = {name: place for place, (name, _) in enumerate(denoiser.named_modules())}
    return sorted(groups, key=lambda group: places[group.name.rpartition(".")[0]]), skipped


def probed_groups(denoiser: nn.Module, owners: Dict[int, int]) -> List[Group]:
    """Return the neurons of feed-forwards that no row of KINDS names."""
    modules = dict(denoiser.named_modules())
    groups = [Group(f"{name}.neurons", modules[name], kind, kind.units(modules[name]), 1)
              for name, kind in feedforwards.find(denoiser, known_modules(denoiser)).items()]
    return [group for group in groups if not layer_obstacle(group, owners)]


def known_modules(denoiser: nn.Module) -> List[nn.Module]:
    """Return the modules that a row of KINDS names, for any unit, and those that stand in for pruned ones."""
    emptied = tuple(kind.empty for kind in kinds.KINDS if isinstance(kind.empty, type))
    return [module for module in denoiser.modules()
            if isinstance(module, (*emptied, ranks.LowRank)) or any(kind.fits(module) for kind in kinds.KINDS)]


def unknown_modules(denoiser: nn.Module, units: Iterable[str], groups: List[Group]) -> Dict[str, str]:
    """Return {name: why} of the innermost modules whose class name suggests such units, and that are not known.

    All modules that contain known ones are known, and so are those in groups.
    """
    covered = {id(part) for module in [*known_modules(denoiser), *(group.module for group in groups)]
               for part in module.modules()}
    patterns = [kind.lookalikes for kind in kinds.KINDS if kind.unit in units and kind.lookalikes]
    names = {}
    for name, module in denoiser.named_modules():
        own = type(module).__name__
        if (any(re.search(pattern, own, re.IGNORECASE) for pattern in patterns)
                and any(parameter.dim() > 1 for parameter in module.parameters())
                and not any(id(part) in covered for part in module.modules())):
            known = any(own in kind.modules for kind in kinds.KINDS)
            names[name] = (f"it has other layers than a {own} is known with" if known else
                           f"its class {type(module).__module__.rpartition('.')[2]}.{own} is not known")
    return {name: why for name, why in names.items() if not any(other.startswith(f"{name}.") for other in names)}


def layer_obstacle(group: Group, owners: Dict[int, int]) -> str:
    """Return why a layer of this group cannot be sliced; "" if all can.

    owners: {id of a parameter: how many layers hold it}.
    """
    kind, layers = group.kind, dict(group.module.named_modules())
    for path in kind.rows + kind.columns:
        if path in layers and type(layers[path]) not in kinds.SIZES:
            return f"its {path} is a {type(layers[path]).__name__}"
    for part in group.parts():
        path, layer, sizes = part.path, part.layer, kinds.SIZES.get(type(part.layer))
        if sizes is None:
            return f"its {path} is a {type(layer).__name__}"
        size = getattr(layer, sizes[0])
        if "weight" not in layer._parameters or layer.weight.shape[0] != (size[0] if isinstance(size, tuple) else size):
            return f"its {path} has no plain weight"
        if any(owners[id(p)] > 1 for p in layer.parameters()):
            return f"its {path} shares its weights with another layer"
        if part.count % (max(part.count // group.inner, 1) * group.units):
            return f"its {path} cannot be shared out among {group.units} {group.kind.unit}"
    return ""


def reached(denoiser: nn.Module, groups: List[Group]) -> Dict[str, int]:
    """Return how many numbers of each parameter the units of these groups own, by name."""
    names, found = {id(parameter): name for name, parameter in denoiser.named_parameters()}, Counter()
    for group in groups:
        for parameter, _, own in group.owned():
            found[names[id(parameter)]] += own.numel()
    return dict(found)


def inexact(groups: List[Group]) -> Dict[str, str]:
    """Return the modules in which removal is not masking: {name: why}."""
    return {group.name.rpartition(".")[0]: f"its {' and '.join(norms)} {'run' if len(norms) > 1 else 'runs'} across "
            f"all {group.kind.unit}, so removing some scales the others anew"
            for group in groups for norms in [group.norms_across()] if norms}


def root_mean_square(group: Group) -> Tensor:
    """Return the root mean square of each unit's weights, without biases and norms: (units,), float32, on the CPU.

    This is the L2 norm over the square root of the number of weights. Within a group all units own equally many, so
    the order is that of the L2 norm.
    """
    squares, count = torch.zeros(group.units), 0
    for part in group.parts(scored=True):
        weight = group.by_unit(part.layer.weight.detach(), part)
        others = [d for d in range(weight.dim()) if d != part.dim + 1]
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares += torch.linalg.vector_norm(weight, dim=others, dtype=wide).float().cpu() ** 2
        count += weight.numel() // group.units
    return (squares / count).sqrt()


@torch.no_grad()
def mask(group: Group, keep: List[int]) -> None:
    """Zero, in place, all that units not in `keep` (indices, possibly none) own; shapes stay."""
    drop = sorted(set(range(group.units)) - set(keep))
    for parameter, part, own in group.owned():
        own.index_fill_(part.dim + 1, torch.tensor(drop, dtype=torch.long, device=parameter.device), 0)


@torch.no_grad()
def remove(group: Group, keep: List[int]) -> None:
    """Slice the module's layers, in place, down to the units in `keep` (at least one); works on the meta device too."""
    def sliced(parameter: nn.Parameter, part: Part) -> nn.Parameter:
        dim, end = part.dim, part.first + part.count
        index = torch.tensor(keep, dtype=torch.long, device=parameter.device)
        kept = group.by_unit(parameter, part).index_select(dim + 1, index).flatten(dim, dim + 2)
        if part.count < parameter.shape[dim]:  # places that do not belong to the units stay
            kept = torch.cat([parameter.narrow(dim, 0, part.first), kept,
                              parameter.narrow(dim, end, parameter.shape[dim] - end)], dim)
        return nn.Parameter(kept, requires_grad=parameter.requires_grad)

    changes = []  # all are sliced before any is replaced, because by_unit reads the module's inner width
    for part in group.parts():
        bias = getattr(part.layer, "bias", None)
        changes.append((part.layer, part.dim, sliced(part.layer.weight, part),
                        bias if part.dim == 1 or bias is None else sliced(bias, part)))
    for module, name in group.vectors():
        old = getattr(module, name)
        kept = old.view(group.units, -1)[keep].view(*old.shape[:-1], -1)
        setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    for layer, dim, weight, bias in changes:
        layer.weight = weight
        if bias is not None:
            layer.bias = bias
        name, size = kinds.SIZES[type(layer)][dim], weight.shape[dim]
        setattr(layer, name, (size,) if isinstance(getattr(layer, name), tuple) else size)
    group.kind.shrink(group.module, group.units, len(keep))


def replace(denoiser: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place of `old` in the denoiser, in the training mode of `old`."""
    for parent in denoiser.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new.train(old.training)


def apply(denoiser: nn.Module, plan: Plan, mask_only: bool = False) -> None:
    """Remove, in place, the units that `plan` does not keep of its groups; with mask_only zero these units.

    A removal is appended to `denoiser.removals`, a list of plans: applied one after another to a dense denoiser, on
    the meta device too, they give a denoiser of the same shapes. An empty plan changes nothing.

    Raises UserError, before anything changes, if the denoiser has no group of a name in the plan, or if indices are not
    ascending, out of range, none where a unit must stay, or not equally many in each norm group.
    """
    if any(name.endswith(".ranks") for name in plan):
        ranks.replay(denoiser, plan)
    elif any(name.endswith(f".{bypass.UNIT}") for name in plan):
        bypass.replay(denoiser, plan)
    elif plan:
        units = {name.rpartition(".")[2] for name in plan}
        carry_out(denoiser, find_groups(denoiser, units)[0], plan, mask_only)


def carry_out(denoiser: nn.Module, groups: List[Group], plan: Plan, mask_only: bool) -> None:
    """Do what `apply` does, with the groups of the denoiser at hand."""
    found = {group.name: group for group in groups}
    for name, keep in plan.items():
        if name not in found:
            raise UserError(f"{type(denoiser).__name__} has no {name} to take units out of")
        check_kept(found[name], keep)
    for name, keep in plan.items():
        group = found[name]
        if mask_only:
            mask(group, keep)
        elif keep:
            remove(group, keep)
        else:
            replace(denoiser, group.module, group.kind.empty(group.module))
    if plan and not mask_only:
        denoiser.removals = [*getattr(denoiser, "removals", []), plan]


def share(denoiser: nn.Module) -> None:
    """Give the main process's denoiser, its removals and its values, to all other processes. All call this together."""
    own, removals = getattr(denoiser, "removals", []), distributed.broadcast(getattr(denoiser, "removals", []))
    for plan in removals[len(own):]:
        apply(denoiser, plan)
    distributed.broadcast_module(denoiser)


def check_kept(group: Group, keep: List[int]) -> None:
    """Raise UserError unless `keep` holds ascending indices of units, equally many from each norm group."""
    ascending = all(isinstance(unit, int) for unit in keep)
    ascending = ascending and all(a < b for a, b in zip([-1] + keep, keep + [group.units]))
    share = group.units // group.norm_groups
    counts = Counter(unit // share for unit in keep) if ascending else {}
    if not ascending or not (keep or group.kind.empty):
        least = "" if group.kind.empty else ", at least one"
        raise UserError(f"{group.name}: units kept must be ascending indices below {group.units}{least}")
    if keep and (len(counts) != group.norm_groups or len(set(counts.values())) != 1):
        raise UserError(f"{group.name}: equally many units must be kept in each of the {group.norm_groups} norm groups")

"""The ways to prune: one table, and a file for each method in it.

The file of method "x" is methods/x.py. Its prune(denoiser, rate, *, calibration=None, **options) -> Pruned prunes
the denoiser in place and is given every option of the table but calibration_images, which is in the calibration, and
recovery_steps: prune() below trains after each method alike. This table loads without torch.

A baseline changes how images are drawn instead of the weights. It stands in the table to be measured as a method is.
In place of prune(), its file has plan(rate, steps, magnitudes) -> Pruned, drawing(denoiser, pruned, sampling), and
timed(denoiser, pruned, share) -> the denoisers that a drawing calls, and how often beside dense's calls. If it needs
"captions", its file has twin(denoiser) and magnitudes(pipeline, denoiser, draws), which measure what it plans by.
"""
from __future__ import annotations

import argparse
import importlib
import re
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

from pruning import UserError, check_name, distributed
from pruning.methods.options import (
    ALLOCATION,
    BUDGET,
    CALIBRATION_IMAGES,
    MASK_ONLY,
    PATTERN,
    RECOVERY_STEPS,
    REFIT,
    REMOVING,
    ROUND_TO,
    SCOPE,
    STEP_WEIGHTS,
    ZEROING,
    Option,
    check_together,
    one_of,
)


class Method(NamedTuple):
    """What the commands know of a method without loading it."""

    help: str
    unit: str  # what the rate is a share of
    options: Dict[str, Option] = {}  # two methods may share the name of an option if its type is the same
    removes: bool = False  # whether units are removed, so that shapes shrink, unless they are masked
    # Options -> what of the calibration they need: "calls" of the dense denoiser, "moments" of its layers' inputs, of a
    # baseline "captions". Nothing: prune() gets no calibration. Such a method has the option "calibration_images".
    needs: Callable[[Dict[str, Any]], Tuple[str, ...]] = lambda options: ()
    trains: bool = False  # whether its prune() takes recovery_steps and trains itself, in all processes together
    # Whether its file has largest_rate(denoiser, call, **options), as not every rate is in reach; of a baseline,
    # why_not(skeleton, guidance_scale), as not every model is.
    limited: bool = False
    baseline: bool = False  # whether it prunes nothing and is what a user could do instead: draw in less time
    refuses: Dict[str, str] = {}  # flags that it cannot be combined with -> why


class LayerPruned(NamedTuple):
    """What happened to a layer or a group of units."""

    rate: float  # share that is gone
    error: Optional[float] = None  # relative squared error of the layer's output on calibration inputs, if measured


class Unreached(NamedTuple):
    """What a method cannot remove or zero of a parameter."""

    parameters: int
    why: str


class Pruned(NamedTuple):
    """What a method did: `taken` of `total` units are pruned, and round(rate * total) were asked for."""

    unit: str
    total: int
    asked: int
    taken: int
    skipped_modules: Dict[str, str] = {}  # modules that seem prunable and were not pruned: name -> why
    layers: Dict[str, LayerPruned] = {}
    reached: Dict[str, int] = {}  # how many numbers of each parameter the method can remove or zero, at any rate
    unreached: Dict[str, Unreached] = {}  # of each parameter what is left; {} if nothing was counted, as at rate 0
    inexact: Dict[str, str] = {}  # modules in which removal is not masking: name -> why
    drawing: Dict[str, Any] = {}  # of a baseline: what a user would pass to diffusers to draw so; {} to draw as dense


def unreached_by_reason(unreached: Dict[str, Unreached]) -> Dict[str, int]:
    """Return how many parameters cannot be reached for each reason, the most first. unreached: see Pruned."""
    found: Dict[str, int] = {}
    for each in unreached.values():
        found[each.why] = found.get(each.why, 0) + each.parameters
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _zeroing_needs(options: Dict[str, Any], always: Tuple[str, ...] = ()) -> Tuple[str, ...]:
    """Return what the options in ZEROING need of the calibration."""
    guided = options.get("allocation") == "guided"
    moments = ("moments",) if "moments" in always or options.get("refit") or guided else ()
    return moments + (("calls",) if "calls" in always or options["recovery_steps"] or guided else ())


def _removing_needs(options: Dict[str, Any]) -> Tuple[str, ...]:
    """Return what the options in REMOVING need of the calibration."""
    by_loss = options["criterion"] == "loss"
    return (("moments",) if by_loss or options["refit"] else ()) + (
        ("calls",) if options["refit"] or options["recovery_steps"] or by_loss and options["allocation"] == "guided"
        else ())


NOTHING_TO_SAVE = "it leaves all weights as they are, so there is no pruned model to save"

METHODS: Dict[str, Method] = {
    "magnitude": Method("zero the weights of lowest |w|", "weights", {"scope": SCOPE, **ZEROING}, needs=_zeroing_needs),
    "structured": Method(
        "remove feed-forward neurons and ResNet inner channels, and re-fit the layers behind them",
        "neurons and channels",
        {**REMOVING, "round_to": ROUND_TO}, removes=True, needs=_removing_needs),
    "iterative": Method(
        "magnitude in steps, with self-distillation after each", "weights",
        {"scope": SCOPE, "recovery_steps": RECOVERY_STEPS._replace(default=60),
         "calibration_images": CALIBRATION_IMAGES._replace(default=128)}, needs=_zeroing_needs, trains=True),
    "attention_heads": Method("remove whole attention heads, and re-fit the layers behind them", "heads",
                              {**REMOVING, "allocation": ALLOCATION._replace(default="guided")}, removes=True,
                              needs=_removing_needs),
    "blocks": Method(
        "bypass whole blocks, in an order by the error of the final latents, and re-fit the others", "blocks",
        {"refit": REFIT._replace(default=True), "mask_only": MASK_ONLY, "recovery_steps": RECOVERY_STEPS,
         "calibration_images": CALIBRATION_IMAGES}, removes=True, needs=lambda options: ("calls",)),
    "joint": Method(
        "remove blocks and units under one budget, where the final latents feel it least, and re-fit the others",
        "the budget", {"budget": BUDGET, "mask_only": MASK_ONLY, "round_to": ROUND_TO, "recovery_steps": RECOVERY_STEPS,
                       "calibration_images": CALIBRATION_IMAGES}, removes=True,
        needs=lambda options: ("moments", "calls"), limited=True),
    "modulation": Method(
        "give the AdaLN layers of a transformer a low rank, in the directions that carry their outputs", "ranks",
        {"mask_only": MASK_ONLY, "recovery_steps": RECOVERY_STEPS, "calibration_images": CALIBRATION_IMAGES},
        removes=True, needs=lambda options: ("calls",), limited=True),
    "reconstruct": Method(
        "zero weights that the guided output feels least, and re-fit the others by least squares", "weights",
        {"pattern": PATTERN, "recovery_steps": RECOVERY_STEPS, "calibration_images": CALIBRATION_IMAGES},
        needs=lambda options: _zeroing_needs(options, ("moments", "calls"))),
    "wanda": Method("zero the weights of lowest |w| times input root mean square", "weights",
                    {"scope": SCOPE._replace(default="row"), **ZEROING},
                    needs=lambda options: _zeroing_needs(options, ("moments",))),
    "sparsegpt": Method(
        "zero weights column by column, each time correcting the columns that follow", "weights",
        {"pattern": PATTERN, "allocation": ALLOCATION,
         "step_weights": Option("uniform", one_of("step_weights", STEP_WEIGHTS),
                                "let noisier steps (early) or later ones (late) count more in the input moments"),
         "recovery_steps": RECOVERY_STEPS, "calibration_images": CALIBRATION_IMAGES},
        needs=lambda options: _zeroing_needs(options, ("moments",))),
    "steps": Method("draw in fewer steps, with the dense weights", "steps", baseline=True,
                    refuses={"save_pruned": NOTHING_TO_SAVE}),
    "cache": Method("skip the blocks of a transformer in some calls, by diffusers' MagCache", "calls",
                    {"calibration_images": CALIBRATION_IMAGES._replace(default=8)},
                    needs=lambda options: ("captions",), limited=True, baseline=True,
                    refuses={"save_pruned": NOTHING_TO_SAVE, "compile": "it decides at each call whether blocks run, "
                             "so calls would not run compiled"}),
}
BASELINES = tuple(name for name, entry in METHODS.items() if entry.baseline)
PRUNING = tuple(name for name, entry in METHODS.items() if not entry.baseline)


def file_of(method: str):
    """Return the module of a method or baseline, which may load torch."""
    return importlib.import_module(f"{__name__}.{method}")


def needs(method: str, options: Dict[str, Any]) -> Tuple[str, ...]:
    """Return what of the calibration a method needs with these options, which may leave out defaults."""
    return METHODS[method].needs({**default_options(method), **options})


def why_not(method: str, skeleton, guidance_scale: float) -> str:
    """Return why a baseline cannot draw with a model, "" if it can. skeleton: a models.skeleton.Skeleton."""
    return file_of(method).why_not(skeleton, guidance_scale) if METHODS[method].limited else ""


def check_weights(denoiser) -> None:
    """Raise UserError that names the remedy if weights are not plain numbers: quantised, say, or an adapter's."""
    from pruning.methods import reach  # here, because this table loads without torch
    reach.check(denoiser)


def check_memory(method: str, denoiser, memory: int, device, **options) -> None:
    """Raise UserError if what the method does with these options cannot fit, whatever the calls are.

    memory: bytes for moments, of which those of one layer must fit. device: has to hold a copy of the denoiser that
    recovery trains, if the method removes nothing of it. All processes call this together.
    """
    if "moments" in needs(method, options):
        from pruning.methods import moments  # here, because this table loads without torch
        layers = gathered_layers(method, denoiser, options)
        moments.memory_groups({name: moments.moment_bytes(layer) for name, layer in layers.items()}, memory)
    if options.get("recovery_steps") and not METHODS[method].removes:
        from pruning.methods import reckoning
        reckoning.check_weights_fit(denoiser, device)


def largest_rate(method: str, denoiser, call: Dict[str, Any], **options) -> float:
    """Return the largest rate that a limited method can reach. call: the keyword arguments of a denoiser call."""
    return file_of(method).largest_rate(denoiser, call, **{**default_options(method), **options})


def default_options(method: str) -> Dict[str, Any]:
    """Return the options of a method with their defaults. Raises UserError if METHODS does not have the method."""
    return {name: option.default for name, option in METHODS[check_name("method", method, METHODS)].options.items()}


def variant_name(method: str, options: Dict[str, Any]) -> str:
    """Return the method's name and the options that differ from their defaults, such as "magnitude+scope=global".

    Options stand in the order of METHODS, then options that METHODS does not know, by name. An option that is True is
    just its name, one that is False is off. The text is fit for a file name: in options, all but letters, digits and
    "_.-" becomes "-".
    """
    known = METHODS[method].options if method in METHODS else {}
    parts = [method]
    for name in [*known, *sorted(set(options) - set(known))]:
        if name in options and not (name in known and options[name] == known[name].default):
            value = options[name]
            texts = [name] if value is True else [name, "off" if value is False else str(value)]
            parts.append("=".join(re.sub(r"[^\w.-]", "-", text) for text in texts))
    return "+".join(parts)


def prune(method: str, denoiser, rate: float, *, calibration=None, **options) -> Pruned:
    """Prune `denoiser` (a torch module) in place by a method of the table, recover, and return what was done.

    If the method calibrates, all processes call this together: the main one prunes for all, and all train.
    float32 weights that half precision holds without loss are held so afterwards too: re-fitted ones are rounded, so
    that what is measured is what a file of the dense one's precision gives.
    options: those of the method that differ from their defaults. calibration: a calibration.Calibration, for methods
    that need it with these options. Raises UserError if the rate is not in [0, 1), if the method, an option or its
    value is not known, if it is a baseline, if options exclude each other, if weights of the denoiser are not plain
    numbers (reach.check), if it has nothing that the method prunes, and for whatever else the method's file names.
    """
    if not 0 <= rate < 1:
        raise UserError(f"a pruning rate is in [0, 1); got {rate}")
    if method in BASELINES:
        raise UserError(f"{method} changes how images are drawn, not the weights, so it prunes nothing; give one of "
                        f"{', '.join(PRUNING)}")
    given = {**default_options(method), **options}
    for name, value in options.items():
        check_option(method, name, value)
    check_together(given, [rate])
    if rate == 0 or not METHODS[method].needs(given):
        calibration = None
    elif calibration is None:
        raise UserError(f"{method} needs recorded calls of the dense denoiser with these options; give a calibration")
    check_weights(denoiser)
    from pruning.methods import precision, reach, recovery, surgery  # here, because this table loads without torch
    module = file_of(method)
    stored = precision.narrowest(denoiser.state_dict().values()) if calibration else None  # else no value is new
    whole = reach.parameters(denoiser, METHODS[method].removes, getattr(module, "UNITS", ()))
    given.pop("calibration_images", None)  # is in the calibration
    steps = 0 if METHODS[method].trains else given.pop("recovery_steps", 0)
    if calibration and steps:
        recovery.rehearse(denoiser, METHODS[method].removes, calibration)  # before anything changes
    prunes = distributed.is_main or METHODS[method].trains or not calibration
    pruned = module.prune(denoiser, rate, calibration=calibration, **given) if prunes else None
    if calibration:
        pruned = distributed.broadcast(pruned)
        surgery.share(denoiser)
    if calibration and steps:
        recovery.recover_at(rate, denoiser, METHODS[method].removes, calibration, steps)
    if stored:
        precision.round_to(denoiser, stored)
    return pruned._replace(unreached=reach.unreached(whole, pruned.reached, pruned.skipped_modules))


def calibrate(method: str, denoiser, calibration, **options) -> None:
    """Record calls and gather moments that a method needs and that are not there. One process may leave this out."""
    needed = needs(method, options)
    if "moments" in needed:
        from pruning.methods import moments  # here, because this table loads without torch
        moments.gather(denoiser, calibration, options.get("step_weights", "uniform"),
                       gathered_layers(method, denoiser, options), together=True)
    if "calls" in needed and distributed.world_size > 1:
        _ = calibration.calls  # one process records them when a method asks for them


def gathered_layers(method: str, denoiser, options: Dict[str, Any]):
    """Return the layers whose moments a method gathers with these options, by the name of the weight.

    These are the layers behind the units that the method removes, with those that help them, or all prunable ones.
    """
    from pruning.methods import moments, surgery, units  # here, because this table loads without torch
    if METHODS[method].removes:
        own = units.column_layers(surgery.find_groups(denoiser, file_of(method).UNITS)[0])
        return {**units.helping_layers(denoiser), **own} if options.get("refit", True) else own
    return moments.prunable_layers(denoiser)


def survey(method: str, denoiser, calibration, **options):
    """Return the rates of the curves, and the weights.Survey of a dense denoiser: how sensitive each layer is.

    Raises UserError if the method does not solve layer by layer.
    """
    from pruning.methods import moments, weights
    module = file_of(method)
    if not hasattr(module, "solver"):
        able = ", ".join(name for name in METHODS if hasattr(file_of(name), "solver"))
        raise UserError(f"--sensitivity is measured for methods that prune layer by layer: {able}")
    given = {**default_options(method), **options}
    gathered = moments.gather(denoiser, calibration, given.get("step_weights", "uniform"))
    solve = module.solver(denoiser, gathered, calibration, **{**given, "pattern": None})
    return weights.CURVE, weights.survey_layers(denoiser, moments.prunable_layers(denoiser), solve, calibration,
                                                weights.survey_key(method, **given))


def check_option(method: str, name: str, value: Any) -> None:
    """Raise UserError if the method has no such option, or if the option's flag would not take the value."""
    option = METHODS[method].options[check_name(f"option of {method}", name, METHODS[method].options)]
    if option.type is bool and not isinstance(value, bool):
        raise UserError(f"{name}: expected True or False; got {value!r}")
    try:
        if value != option.default:
            option.type(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None

"""What pipelines call their inputs and outputs: found by the signature of a class's call, and by what a pipeline says.

No other file knows these names. `kind` is a pipeline class; `pipeline` is a pipeline, which may lack its weights (see
skeleton.py).
"""
from __future__ import annotations

import inspect
from typing import Any, Dict, List, Optional

import numpy as np

from pruning import UserError

# What a text-to-image pipeline is called with, beside guidance, which not every pipeline takes.
ARGUMENTS = ("prompt", "num_inference_steps", "height", "width", "generator", "output_type")
GUIDANCE = ("guidance_scale", "cfg_scale")  # how the names of guidance scales end: true_cfg_scale
# What pipelines take that edit or follow an image, or make a film.
MORE_THAN_A_CAPTION = ("image", "mask_image", "control_image", "image_embeds", "video", "num_frames")


def pipeline_class(config: Dict[str, Any]) -> type:
    """Return the pipeline class that a config names.

    Raises UserError if there is none, or its call does not take what that of a text-to-image pipeline takes.
    """
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type):
        raise UserError(f"this release of diffusers, {diffusers.__version__}, has no pipeline class {name}")
    lacking = [argument for argument in ARGUMENTS if argument not in _defaults(kind)]
    if lacking:
        raise UserError(f"{name} is no text-to-image pipeline, whose call takes a prompt, a number of steps and an "
                        f"image size: it does not take {', '.join(lacking)}")
    return kind


def _defaults(kind: type) -> Dict[str, Any]:
    """Return the arguments of a class's call, each with its default."""
    return {name: each.default for name, each in inspect.signature(kind.__call__).parameters.items()}


def more_than_a_caption(kind: type) -> List[str]:
    """Return what else a class's call takes that an image could need."""
    return [name for name in MORE_THAN_A_CAPTION if name in _defaults(kind)]


def caption_tokens(kind: type) -> Optional[int]:
    """Return how many tokens of a caption a class passes at most; None if it does not say."""
    longest = _defaults(kind).get("max_sequence_length")
    return longest if isinstance(longest, int) else None


def arguments(kind: type, captions: List[str], generators: list, *, steps: int, guidance_scale: float,
              image_size: int, output_type: str) -> Dict[str, Any]:
    """Return what a class is called with to make an image of each caption. output_type: "np" or "latent"."""
    given = {"prompt": captions, "num_inference_steps": steps, "height": image_size, "width": image_size,
             "generator": generators, "output_type": output_type}
    guidance = _guidance(kind, guidance_scale)
    if "negative_prompt" in guidance:
        guidance["negative_prompt"] = [guidance["negative_prompt"]] * len(captions)
    given.update(guidance)
    if "use_resolution_binning" in _defaults(kind):
        given["use_resolution_binning"] = False  # it would sample another size than the one asked for
    return given


def as_code(kind: type, caption: str, steps: int, guidance_scale: float) -> str:
    """Return the arguments of a call that makes an image of a caption as Python code; guidance of 1 is left out."""
    guidance = _guidance(kind, guidance_scale) if guidance_scale != 1 else {}
    given = {"num_inference_steps": steps, **guidance}
    return ", ".join([repr(caption), *(f"{name}={value!r}" for name, value in given.items())])


def _guidance(kind: type, scale: float) -> Dict[str, Any]:
    """Return by which arguments a class's call guides an image by this scale."""
    name = guidance_argument(kind)
    # Without a negative prompt, pipelines that call their scale so do not guide.
    negative = {"negative_prompt": " "} if name == "true_cfg_scale" and scale > 1 else {}
    return {name: scale, **negative} if name else {}


def guidance_argument(kind: type) -> Optional[str]:
    """Return what a class's call names its guidance scale: the first that guides by default, else the first.

    Qwen-Image has two, one of which does nothing. None if no scale is a number: guidance is then fixed or scheduled.
    """
    scales = {name: default for name, default in _defaults(kind).items()
              if name.endswith(GUIDANCE) and type(default) in (int, float)}
    return next(iter([*(name for name, default in scales.items() if default > 1), *scales]), None)


def guides_twice(pipeline, denoiser, guidance_scale: float) -> bool:
    """Return whether each step runs the denoiser with the caption and without it."""
    pipeline._guidance_scale = guidance_scale  # as its call does, before it asks itself
    says = getattr(pipeline, "do_classifier_free_guidance", None)
    if says is not None:
        return bool(says)
    kind = type(pipeline)
    # Of two scales, true_cfg_scale is the one that takes two inputs. The other is read by the denoiser: Flux.
    other = "true_cfg_scale" in _defaults(kind) and guidance_argument(kind) != "true_cfg_scale"
    return guidance_scale > 1 and not denoiser.config.get("guidance_embeds") and not other


def settings(pipeline, denoiser) -> Dict[str, Any]:
    """Return image_size (pixels a side), steps and guidance_scale as a pipeline and its class say; None if unsaid."""
    kind = type(pipeline)
    defaults, guidance = _defaults(kind), guidance_argument(kind)
    steps = defaults["num_inference_steps"]
    return {"image_size": image_size(pipeline, denoiser), "steps": steps if isinstance(steps, int) else None,
            "guidance_scale": float(guidance and defaults[guidance] or 1)}


def image_size(pipeline, denoiser) -> Optional[int]:
    """Return how many pixels a side a pipeline draws unless told otherwise; None if nothing says so."""
    sizes = getattr(pipeline, "default_sample_size", None), denoiser.config.get("sample_size")
    size, scale = next((each for each in sizes if isinstance(each, int)), None), latent_scale(pipeline)
    if size and scale:
        return size * scale
    height, width = (_defaults(type(pipeline)).get(name) for name in ("height", "width"))
    return height if isinstance(height, int) and height == width else None


def latent_scale(pipeline) -> Optional[int]:
    """Return how many pixels a side a place of a latent stands for; None if the pipeline does not say."""
    return getattr(pipeline, "vae_scale_factor", None)


def images(kind: type, output, output_type: str) -> Any:
    """Return the images that an output holds, or the latents: its first value, whatever the class calls it.

    Images are (n, height, width, 3). Raises UserError if the output holds none.
    """
    first = next(iter(output.values()), None) if isinstance(output, dict) else None
    if first is None or output_type == "np" and (np.ndim(first) != 4 or np.shape(first)[-1] != 3):
        raise UserError(f"{kind.__name__} gives {type(output).__name__}, which holds no RGB images; this program "
                        "measures pipelines that make images of captions")
    return first

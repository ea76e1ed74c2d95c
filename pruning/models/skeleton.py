"""A pipeline without weights: its components on the meta device, made from configs alone."""
from __future__ import annotations

import inspect
import math
import time
from logging import CRITICAL
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from pruning import UserError
from pruning.models import hub, pipelines, saving, signature

UNSAID = {"image_size": 1024, "steps": 50}  # if nothing says them
SCALE = 8  # pixels a side for a place of a latent, likewise: as of most VAEs
CLIP_TOKENS = 77  # of a caption
OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "_context", "txt_")  # in names of layers for text


class Skeleton(NamedTuple):
    """What a pipeline's configs say."""

    pipeline: Any  # of these parts, and without tokenizers and schedulers
    denoiser: str  # the component that is pruned
    parts: Dict[str, Any]  # component -> module on the meta device
    configs: Dict[str, Dict[str, Any]]  # component -> its config
    unknown: Dict[str, str]  # component -> why it cannot be made


def load(model: str) -> Skeleton:
    """Read the configs of a bundled model, a pipeline folder or a hub id; no weights are fetched.

    Raises UserError if there is no such model, if it is no text-to-image pipeline, or if its denoiser cannot be made
    of its config.
    """
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity(CRITICAL)
    source = pipelines.model_source(model)
    folder = Path(source).is_dir()
    manifest = saving.read_manifest(Path(source)) if folder else None
    with pipelines.reading(f"model {model!r}") if folder else hub.asking(f"cannot read model {model!r}", model):
        index = dict(diffusers.DiffusionPipeline.load_config(source))
    kind = signature.pipeline_class(index)
    name = next((name for name in saving.DENOISERS if (index.get(name) or [None])[0]), None)
    if name is None:
        raise UserError(f"{index['_class_name']} has neither a unet nor a transformer to prune")
    parts, configs, unknown = {}, {}, {}
    for part, value in index.items():
        if not (isinstance(value, (list, tuple)) and len(value) == 2 and value[1]):
            continue
        pruned = manifest and part == name
        try:
            made = saving.empty_denoiser(Path(source), manifest) if pruned else _component(source, part, *value)
        except Exception as error:  # each class fails in its own way
            unknown[part] = hub.first_line(error)
            continue
        if made is not None:
            parts[part], configs[part] = made, dict(getattr(made.config, "to_dict", lambda c=made.config: c)())
    if name in unknown:
        raise UserError(f"the {name} of model {model!r} cannot be made of its config: {unknown[name]}")
    return Skeleton(_pipeline(kind, index, parts), name, parts, configs, unknown)


def _pipeline(kind: type, index: Dict[str, Any], parts: Dict[str, Any]) -> Any:
    """Return a pipeline of some parts, which says what a whole one says of its images."""
    takes = inspect.signature(kind.__init__).parameters
    absent = {part: None for part, value in index.items() if isinstance(value, (list, tuple))}
    given = {name: value for name, value in {**index, **absent, **parts, **hub.left_out(index)}.items()
             if name in takes}
    try:
        return kind(**given)
    except Exception:  # some classes ask their tokenizer at once; such a pipeline says what its class says
        pipeline = kind.__new__(kind)
        pipeline.register_modules(**parts)
        return pipeline


def _component(source: str, part: str, library: str, kind: str) -> Optional[Any]:
    """Return a component on the meta device, or None if it has no weights."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    made = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
    if not isinstance(made, type):
        raise ValueError(f"this environment has no {library}.{kind}")
    with init_empty_weights(include_buffers=True):
        if issubclass(made, diffusers.ModelMixin):
            return made.from_config(made.load_config(source, subfolder=part)).eval()
        if issubclass(made, transformers.PreTrainedModel):
            return made(made.config_class.from_pretrained(source, subfolder=part))
    return None


def sampling(found: Skeleton, given: Dict[str, Any], model: str) -> Dict[str, Any]:
    """Return image_size, steps and guidance_scale, as given or as the pipeline's class and configs say.

    Raises UserError if a guidance scale is given and the pipeline takes none.
    """
    said = pipelines.said_settings(found.pipeline, model, given)
    return {name: UNSAID[name] if value is None else value for name, value in said.items()}


def count_macs(found: Skeleton, image_size: int) -> float:
    """Return about how many multiply-accumulates a call of the denoiser takes for one latent.

    UNet2DConditionModel is counted exactly, in a call without values. For transformers see transformer_macs.
    """
    from pruning.metrics import costs

    denoiser, config = found.parts[found.denoiser], found.configs[found.denoiser]
    side = image_size // (signature.latent_scale(found.pipeline) or SCALE)
    if type(denoiser).__name__ == "UNet2DConditionModel":
        return costs.count_macs(denoiser, _unet_call(config, side))
    patch = config.get("patch_size") or 1
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    if config.get("in_channels") == 4 * found.configs.get("vae", {}).get("latent_channels", math.nan):
        patch *= 2  # the pipeline packs 2 x 2 latents in a token
    tokens = signature.caption_tokens(type(found.pipeline)) or CLIP_TOKENS
    return transformer_macs(denoiser, (side // patch) ** 2, tokens)


def transformer_macs(denoiser, image: int, text: int) -> float:
    """Return about how many multiply-accumulates a transformer's call on so many tokens of image and text takes.

    In a block with layers for the text alone, the others read the image alone; other blocks read all tokens. AdaLN
    layers and embeddings count nothing, and all tokens attend to each other.
    """
    from torch import nn

    from pruning.methods import ranks, surgery

    once = {id(layer) for layer in ranks.modulation_layers(denoiser).values()}
    layers = {name: layer for name, layer in denoiser.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d)) and id(layer) not in once and "embed" not in name}
    of_text = {name for name in layers if any(mark in name for mark in OF_TEXT)}
    with_both = {_block(name) for name in of_text}
    macs = 0
    for name, layer in layers.items():
        tokens = text if name in of_text else image if _block(name) in with_both else image + text
        macs += layer.weight.numel() * tokens
    heads, _ = surgery.find_groups(denoiser, ("heads",))
    return macs + sum(2 * (image + text) ** 2 * group.inner for group in heads)


def _block(name: str) -> str:
    """Return the name of the block that a layer lies in: all up to the first number."""
    parts = name.split(".")
    return ".".join(parts[:next((place for place, part in enumerate(parts) if part.isdigit()), 0) + 1])


def _unet_call(config: Dict[str, Any], side: int) -> Dict[str, Any]:
    """Return the keyword arguments of a call of a UNet2DConditionModel, without values."""
    import torch

    def empty(*shape):
        return torch.empty(shape, device="meta")

    width = config["cross_attention_dim"]
    call = {"sample": empty(1, config["in_channels"], side, side), "timestep": empty(1),
            "encoder_hidden_states": empty(1, CLIP_TOKENS, width if isinstance(width, int) else max(width))}
    if config.get("addition_embed_type") == "text_time":
        call["added_cond_kwargs"] = {"time_ids": empty(1, 6), "text_embeds": empty(
            1, config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])}
    return call


def macs_a_second(device: str, dtype: str) -> float:
    """Return how many multiply-accumulates a second a product of large matrices makes: the best of some rounds."""
    import torch

    from pruning.metrics.costs import synchronize

    size = 2048 if device == "cpu" else 8192
    one = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = math.inf
    for _ in range(5):
        synchronize(one.device)
        started = time.perf_counter()
        one @ one
        synchronize(one.device)
        best = min(best, time.perf_counter() - started)
    return size ** 3 / best

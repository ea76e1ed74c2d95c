"""What share of published denoisers each method reaches, from their configs, as the table in docs/methods.md.

example:
  python benchmarks/families.py
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Dict, Tuple

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import diffusers
from accelerate import init_empty_weights
from tabulate import tabulate

from pruning.methods import Unreached, ranks, reach, surgery

# Model -> class of its denoiser, and what of its config differs from the defaults of the class.
PUBLISHED = {
    "Stable Diffusion 1.5": ("UNet2DConditionModel", dict(cross_attention_dim=768)),
    "Stable Diffusion XL": ("UNet2DConditionModel", dict(
        cross_attention_dim=2048, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816)),
    "Stable Diffusion 3.5 Large": ("SD3Transformer2DModel", dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm",
        pos_embed_max_size=96)),
    "Flux": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    "Flux.2": ("Flux2Transformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "Lumina-Image 2": ("Lumina2Transformer2DModel", dict(cap_feat_dim=2304)),
    "PixArt-Σ": ("PixArtTransformer2DModel", dict(caption_channels=4096)),
    "Sana": ("SanaTransformer2DModel", {}),
}
COLUMNS = ("structured", "attention_heads", "modulation")


def build(model: str):
    """Return the denoiser of a published model on the meta device, or None if diffusers does not have its class."""
    kind, config = PUBLISHED[model]
    if not hasattr(diffusers, kind):
        return None
    with init_empty_weights():
        return getattr(diffusers, kind)(**config)


def removed_by_units(denoiser) -> Tuple[Dict[str, int], Dict[str, Unreached]]:
    """Return how many numbers of each parameter units and ranks hold, and what is left of each and why."""
    groups, skipped = surgery.survey(denoiser, "heads", "neurons", "channels")
    reached = surgery.reached(denoiser, groups)
    for name, layer in ranks.modulation_layers(denoiser).items():
        reached[f"{name}.weight"] = layer.weight.numel()
    return reached, reach.unreached(reach.parameters(denoiser, removes=True), reached, skipped)


def table() -> str:
    """Return the table of docs/methods.md: a row a model, and the share that each method reaches, in per cent."""
    rows = []
    for model in PUBLISHED:
        denoiser = build(model)
        total, found = denoiser.num_parameters(), reach.by_method(denoiser)
        shares = [100 * sum(found[method].values()) / total for method in COLUMNS]
        together = 100 * sum(removed_by_units(denoiser)[0].values()) / total
        cells = [f"{share:.1f}" if share else "–" for share in (*shares, together)]
        rows.append([model, f"{total / 1e9:.2f}", *cells])
    return tabulate(rows, ["model", "billion parameters", *(f"`{method}`" for method in COLUMNS), "together"],
                    tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    print(table())

"""What share of published denoisers each method reaches, from their configs, as the table in docs/methods.md.

example:
  python benchmarks/families.py
"""
from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import diffusers
from accelerate import init_empty_weights
from tabulate import tabulate

from benchmarks import denoisers
from pruning.methods import reach

# Model -> class of its denoiser, and what of its config differs from the defaults of the class.
PUBLISHED = {
    **{model: (denoisers.MODELS[name].denoiser, denoisers.MODELS[name].config) for model, name in (
        ("Stable Diffusion 1.5", "sd15"), ("Stable Diffusion XL", "sdxl"), ("Stable Diffusion 3.5 Large", "sd35"),
        ("Flux", "flux"))},
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


def table() -> str:
    """Return the table of docs/methods.md: a row a model, and the share that each method reaches, in per cent."""
    rows = []
    for model in PUBLISHED:
        denoiser = build(model)
        total, found = denoiser.num_parameters(), reach.by_method(denoiser)
        shares = [100 * sum(found[method].values()) / total for method in COLUMNS]
        together = 100 * sum(reach.by_units(denoiser)[0].values()) / total
        cells = [f"{share:.1f}" if share else "–" for share in (*shares, together)]
        rows.append([model, f"{total / 1e9:.2f}", *cells])
    return tabulate(rows, ["model", "billion parameters", *(f"`{method}`" for method in COLUMNS), "together"],
                    tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    print(table())

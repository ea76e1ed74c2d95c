"""ImageReward, a BLIP trained to score images as people rank them (Xu et al., 2023, arXiv 2304.05977).

The authors' package needs old versions of its libraries, so their weights are loaded into transformers' BLIP here.
"""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Dict, List

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

LIMIT = 35  # tokens of a caption, [CLS] and [SEP] included
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # by which the authors normalise what the head returns

# BLIP's "large" image encoder, which the authors' code builds by name.
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
              patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6)
# What the text encoder takes from med_config.json.
TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id")

# Patterns in the names of the published tensors -> what stands there in this file, replaced one after the other.
NAMES = {
    r"^blip\.visual_encoder\.": "vision.",
    r"^vision\.cls_token$": "vision.embeddings.class_embedding",
    r"^vision\.pos_embed$": "vision.embeddings.position_embedding",
    r"^vision\.patch_embed\.proj\.": "vision.embeddings.patch_embedding.",
    r"^vision\.norm\.": "vision.post_layernorm.",
    r"^vision\.blocks\.": "vision.encoder.layers.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"^blip\.text_encoder\.": "text.",
    r"^mlp\.layers\.": "head.",
}
# Published too, but no part of the score: BLIP's projections for contrastive training, and the numbers 0, 1, 2, ...
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward(nn.Module):
    """BLIP's text encoder, whose layers attend to the encoded image, and a head that makes a score of the first token.

    vision: a BlipVisionConfig. text: TEXT and its values. tokenizer: BERT's.
    """

    def __init__(self, vision: Dict, text: Dict, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        # torchvision resizes PIL's images as the authors did. Generated images are square, so nothing is cropped.
        self.prepare = transforms.Compose([
            transforms.Resize(vision["image_size"], transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(vision["image_size"]), transforms.ToTensor(),
            transforms.Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)])
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        # is_decoder adds the layers that attend to the image. Attention within the caption stays bidirectional, because
        # that is decided by an argument of the same name in each call.
        self.text = BlipTextModel(BlipTextConfig(**text, is_decoder=True, encoder_hidden_size=vision["hidden_size"]),
                                  add_pooling_layer=False)
        self.head = nn.Sequential(  # there are no activations; dropout keeps the places that it has in the weights file
            nn.Linear(text["hidden_size"], 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, images, captions) -> Tensor:
        """Return the score of each image for its caption, (n,). images: uint8 (n, h, w, 3); captions: n strings."""
        device = next(self.parameters()).device
        pixels = torch.stack([self.prepare(Image.fromarray(image)) for image in images]).to(device)
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=LIMIT,
                                return_tensors="pt").to(device)
        seen = self.vision(pixels).last_hidden_state
        read = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        return (self.head(read.last_hidden_state[:, 0]).squeeze(1) - MEAN) / STD

    def truncated(self, captions) -> List[int]:
        """Return which captions are longer than LIMIT tokens; forward() cuts them there, as the authors do."""
        ids = self.tokenizer(list(captions), verbose=False).input_ids
        return [i for i, own in enumerate(ids) if len(own) > LIMIT]


def load(weights, config, tokenizer) -> ImageReward:
    """Return ImageReward on the CPU, in float32 and eval mode, from the published ImageReward.pt and med_config.json.

    Raises ValueError that names the tensors that are missing, unknown or of another shape.
    """
    settings = json.loads(Path(config).read_text(encoding="utf-8"))
    network = ImageReward(VISION, {name: settings[name] for name in TEXT}, tokenizer)
    tensors = {renamed(name): tensor for name, tensor in torch.load(
        weights, map_location="cpu", weights_only=True).items() if not name.startswith(UNUSED)}
    check_fit(network.state_dict(), tensors)
    network.load_state_dict(tensors)
    return network.float().eval().requires_grad_(False)


def renamed(name: str) -> str:
    """Return the name in this file of a published tensor."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def check_fit(own: Dict[str, Tensor], found: Dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors found have the names and shapes of the network's own."""
    faults = [f"{name} is missing" for name in own if name not in found]
    faults += [f"{name} is unknown" for name in found if name not in own]
    faults += [f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
               for name, tensor in own.items() if name in found and found[name].shape != tensor.shape]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"tensors do not fit: {', '.join(faults[:3])}{more}")

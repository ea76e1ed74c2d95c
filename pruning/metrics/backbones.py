"""The networks behind the metrics: loading them, and turning captions and images into features.

Images are uint8 arrays (n, height, width, 3). They are resized only if a network requires a fixed size.
Everything that decides the features is in this file, because the cache of features uses its source text as a key.
"""
from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any, List, NamedTuple, Tuple

import numpy as np

from pruning import UserError, check_name, check_online
from pruning.metrics import BACKBONES
from pruning.progress import tqdm

BUNDLED = Path(__file__).resolve().parents[1] / "shapes"
CLIP_ID, CLIP_REVISION = "openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3"
# PickScore is a fine-tuned CLIP ViT-H, whose tokenizer and image processor its authors use (Kirstain et al., 2023).
PICK_ID, PICK_PROCESSOR_ID = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# Of BERT, ImageReward needs the tokenizer alone. The two tokens that BLIP adds to it occur in no caption.
REWARD_ID, REWARD_FILES = "THUDM/ImageReward", ("ImageReward.pt", "med_config.json")
BERT_ID, BERT_FILES = "google-bert/bert-base-uncased", ("vocab.txt", "tokenizer.json", "tokenizer_config.json")


class Clip(NamedTuple):
    """A CLIP model, the tokenizer of its captions and the processor of its images."""

    model: Any
    tokenizer: Any
    processor: Any

    @property
    def scale(self) -> float:
        """What the model multiplies cosines by, learnt in training."""
        return float(self.model.logit_scale.exp())


# ---------------------------------------------------------------- loading

def load_backbone(kind: str, family: str, device="cpu"):
    """Return a network of BACKBONES on the device, in float32 and eval mode: a Clip for captions, else a module.

    A "features" network maps uint8 images (n, 3, h, w) to features (n, d). An "lpips" network maps two batches of
    images in [-1, 1] to their distances. A "reward" network maps uint8 images (n, h, w, 3) and their captions to scores
    (n,). Raises UserError if a name is unknown or if the weights cannot be loaded; the error says which file to
    download and where to put it.
    """
    check_name("metric backbones", kind, BACKBONES)
    check_name("family of metric backbones", family, BACKBONES[kind])
    load = {
        "bundled": {"clip": _bundled_clip, "features": _bundled_features, "lpips": _bundled_lpips},
        "standard": {"clip": _standard_clip, "features": _standard_features, "lpips": _standard_lpips,
                     "preference": _standard_preference, "reward": _standard_reward},
    }[kind][family]
    network = load()
    if isinstance(network, Clip):
        return network._replace(model=network.model.to(device))
    return network.to(device)


def backbone_files(kind: str, family: str) -> List[Path]:
    """Return the weight files of a network of BACKBONES; loads the network once, which downloads missing files.

    Raises UserError like load_backbone.
    """
    load_backbone(kind, family)
    if kind == "bundled":
        path = _bundled_path("clip" if family == "clip" else "squeezenet.safetensors")
        return sorted(path.iterdir()) if path.is_dir() else [path]
    cached = {
        "clip": [(CLIP_ID, "config.json", CLIP_REVISION)],
        "preference": [(PICK_ID, "config.json", None), (PICK_PROCESSOR_ID, "preprocessor_config.json", None)],
        "reward": [(REWARD_ID, REWARD_FILES[0], None), (BERT_ID, BERT_FILES[0], None)],
    }.get(family)
    if cached:
        from huggingface_hub import try_to_load_from_cache

        known = [try_to_load_from_cache(source, name, revision=revision) for source, name, revision in cached]
        return sorted(path for each in known for path in Path(each).parent.iterdir() if path.is_file())
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import AlexNet_Weights

    return [_hub_file(URL_INCEPTION_V3 if family == "features" else AlexNet_Weights.IMAGENET1K_V1.url)]


def load_clip(source, revision: str = "main", processor_source=None) -> Clip:
    """Return CLIP on the CPU, in float32 and eval mode, from a save_pretrained folder or from the hub by its id.

    processor_source: where tokenizer and image processor are, if they are not beside the model. Raises UserError if it
    cannot be loaded.
    """
    import transformers

    if Path(source).exists():
        remedy = "the folder must hold a CLIPModel, its tokenizer and its image processor, saved by save_pretrained"
    else:
        remedy = _from_hub(*(str(each) for each in (source, processor_source) if each), revision=revision)
    # Since transformers 5, CLIPImageProcessor resizes with torchvision. PIL gives the same pixels in all releases.
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    transformers.utils.logging.disable_progress_bar()
    with _one_line_errors(f"CLIP from {source}", remedy):
        model = transformers.CLIPModel.from_pretrained(source, revision=revision)
        return Clip(model.float().eval().requires_grad_(False),
                    transformers.AutoTokenizer.from_pretrained(processor_source or source, revision=revision),
                    processor.from_pretrained(processor_source or source, revision=revision))


def _from_hub(*sources: str, revision: str = "main") -> str:
    """Return how to bring repositories into the hub's cache. A source is an id, and files if not all are needed."""
    from huggingface_hub.constants import HF_HUB_CACHE

    runs = " and ".join(f"'hf download {each} --revision {revision}'" for each in sources)
    folders = " and ".join(f"models--{each.split()[0].replace('/', '--')}" for each in sources)
    return (f"on a machine with a network, run {runs}, and copy the folder{'s' * (len(sources) > 1)} {folders} "
            f"from its cache into {HF_HUB_CACHE}")


@contextlib.contextmanager
def _one_line_errors(what: str, remedy: str):
    """Turn any error of the block into a UserError of one line, and silence the block's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # each library raises its own errors for failed downloads and broken files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load {what}: {reason} -- {remedy}") from error


def _bundled_path(name: str) -> Path:
    path = BUNDLED / name
    if not path.exists():
        raise UserError(f"bundled weights are missing: {path} -- restore them with "
                        f"'git checkout -- pruning/shapes/{name}'")
    return path


def _bundled_clip() -> Clip:
    return load_clip(_bundled_path("clip"))


def _bundled_squeezenet():
    """Return the classifier of pruning/shapes/train.py, which takes images in [-1, 1]."""
    from safetensors.torch import load_file
    from torchvision.models import squeezenet1_1

    path = _bundled_path("squeezenet.safetensors")
    network = squeezenet1_1(weights=None, num_classes=64)
    with _one_line_errors(f"bundled weights from {path}",
                          f"restore them with 'git checkout -- pruning/shapes/{path.name}'"):
        network.load_state_dict(load_file(str(path)))
    return network.eval().requires_grad_(False)


def _bundled_features():
    from torch.nn.functional import interpolate

    def prepare(module, args):
        x = to_signed(args[0])
        if x.shape[-2:] != (64, 64):  # the size of the training images
            x = interpolate(x, (64, 64), mode="bilinear", align_corners=False, antialias=True)
        return (x,)

    network = _bundled_squeezenet()
    network.register_forward_pre_hook(prepare)
    return network


def _bundled_lpips():
    import lpips
    import torch

    backbone = _bundled_squeezenet().features
    with _one_line_errors("lpips", "see requirements.txt"):
        network = lpips.LPIPS(net="squeeze", pnet_rand=True, lpips=False, verbose=False)
    network.scaling_layer = torch.nn.Identity()  # the package's own layer normalises images for ImageNet
    for part in network.net.children():
        for index, layer in part.named_children():
            layer.load_state_dict(backbone[int(index)].state_dict())
    # The package sums |a - b|² = 2 (1 - cos) of unit vectors over the layers. Dividing gives the mean of 1 - cos.
    network.register_forward_hook(lambda module, args, distance: distance / (2 * module.L))
    return network.eval().requires_grad_(False)


def _standard_clip() -> Clip:
    return load_clip(CLIP_ID, CLIP_REVISION)


def _standard_preference() -> Clip:
    return load_clip(PICK_ID, processor_source=PICK_PROCESSOR_ID)


def _standard_reward():
    from huggingface_hub import hf_hub_download
    from transformers import BertTokenizer

    from pruning.metrics import image_reward

    with _one_line_errors("ImageReward", _from_hub(" ".join((REWARD_ID, *REWARD_FILES)),
                                                   " ".join((BERT_ID, *BERT_FILES)))):
        tokenizer = BertTokenizer.from_pretrained(BERT_ID)
        return image_reward.load(*(hf_hub_download(REWARD_ID, name) for name in REWARD_FILES), tokenizer)


def _hub_file(url: str) -> Path:
    """Return the path at which torch.hub keeps the download of this URL. Raises UserError if it may not be fetched."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        check_online(f"{url} to {path}")
    return path


def _standard_features():
    # torch-fidelity resizes like TensorFlow, as the original FID does. torchmetrics' resizing changed in release 1.8.
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    with _one_line_errors("Inception-v3 for FID", f"download {URL_INCEPTION_V3} to {_hub_file(URL_INCEPTION_V3)}"):
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    network.register_forward_hook(lambda module, args, outputs: outputs[0])
    return network


def _standard_lpips():
    import lpips
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.IMAGENET1K_V1.url
    with _one_line_errors("AlexNet for LPIPS", f"download {url} to {_hub_file(url)}"):
        return lpips.LPIPS(net="alex", verbose=False).requires_grad_(False)


# ---------------------------------------------------------------- arrays and tensors

def check_images(images) -> None:
    """Raise ValueError unless images are uint8 (n, h, w, 3). Floats would pass every network and give wrong numbers."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images (n, h, w, 3), got {images.dtype} {images.shape}")


def to_tensor(images, device):
    """Return images (n, h, w, 3) as a uint8 tensor (n, 3, h, w) on the device."""
    import torch

    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)


def to_signed(pixels):
    """Return a uint8 tensor as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def device_of(network):
    """Return the device of a module's parameters."""
    return next(network.parameters()).device


def in_batches(compute, batch_size: int, what: str, *stacks) -> np.ndarray:
    """Return the rows of compute(*batches) over equally long stacks; shows a progress bar after two seconds."""
    import torch

    starts = tqdm(range(0, len(stacks[0]), batch_size), desc=what, delay=2, leave=False)
    with torch.inference_mode():
        return np.concatenate([compute(*(stack[i:i + batch_size] for stack in stacks)).cpu().numpy() for i in starts])


# ---------------------------------------------------------------- features

def embed_captions(clip: Clip, captions, batch_size: int = 64) -> Tuple[np.ndarray, List[int]]:
    """Return CLIP's text embeddings, unit rows (n, d), and which captions were cut at the model's token limit."""
    from torch.nn.functional import normalize

    limit = clip.model.config.text_config.max_position_embeddings

    def compute(batch):
        tokens = clip.tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = tokens.to(device_of(clip.model))
        # Not get_text_features, whose return type changed in transformers 5.
        pooled = clip.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return normalize(clip.model.text_projection(pooled), dim=-1)

    captions = list(captions)
    truncated = [i for i, ids in enumerate(clip.tokenizer(captions, verbose=False).input_ids) if len(ids) > limit]
    return in_batches(compute, batch_size, "caption embeddings", captions), truncated


def embed_images(clip: Clip, images, batch_size: int = 64) -> np.ndarray:
    """Return CLIP's image embeddings, unit rows (n, d). CLIP's own processor resizes and crops images of any size.

    Raises ValueError if images are not uint8 (n, h, w, 3).
    """
    from torch.nn.functional import normalize

    def compute(batch):
        inputs = clip.processor(images=list(batch), input_data_format="channels_last", return_tensors="pt")
        pooled = clip.model.vision_model(inputs.pixel_values.to(device_of(clip.model))).pooler_output
        return normalize(clip.model.visual_projection(pooled), dim=-1)

    check_images(images)
    return in_batches(compute, batch_size, "image embeddings", images)


def image_features(network, images, batch_size: int = 32) -> np.ndarray:
    """Return the features of images, float32 (n, d), by a "features" network of load_backbone.

    Raises ValueError if images are not uint8 (n, h, w, 3).
    """
    check_images(images)
    device = device_of(network)
    return in_batches(lambda batch: network(to_tensor(batch, device)), batch_size, "image features", images)


def describe(family: str, network, images) -> np.ndarray:
    """Return the features (n, d) of images by a network of the family: embed_images of a Clip, else image_features.

    Raises KeyError for a family whose networks compare pairs of images instead, and ValueError if images are not uint8
    (n, h, w, 3).
    """
    return {"clip": embed_images, "preference": embed_images, "features": image_features}[family](network, images)

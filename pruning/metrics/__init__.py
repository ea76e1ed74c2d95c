"""The metrics: numbers about images, and the networks behind them.

METRICS says what each number means, BACKBONES which network gives it; both load
without torch. Images are uint8 arrays (n, height, width, 3) everywhere, and are
resized only where a network demands its own size.
"""
from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pruning import UserError, check_name
from pruning.metrics.intervals import FEWEST, Interval, by_sample, mean_interval, student


class Metric(NamedTuple):
    """What a number means."""

    help: str
    better: str  # "higher" or "lower"
    per_image: bool  # a value for each image, whose mean is the metric; else one value for the whole set
    unit: str
    backbone: str | None  # the family in BACKBONES that it needs
    interval: str | None = None  # of the "difference" to dense image by image, or of the "value"


METRICS = {
    "clip_score": Metric("how well images match their captions: cosine of CLIP's embeddings",
                         better="higher", per_image=True, unit="100·cos", backbone="clip", interval="difference"),
    "kid": Metric("kernel distance of the set of images to the reference images, unbiased at any number; may be "
                  "below 0", better="lower", per_image=False, unit="1000·MMD²", backbone="features", interval="value"),
    "cmmd": Metric("kernel distance of the set of images to the reference images in CLIP's embeddings, unbiased; may "
                   "be below 0", better="lower", per_image=False, unit="1000·MMD²", backbone="clip", interval="value"),
    "fid": Metric("Fréchet distance of the set of images to the reference images; biased upward for few images",
                  better="lower", per_image=False, unit="", backbone="features"),
    "lpips": Metric("perceptual distance of images to the originals of their captions",
                    better="lower", per_image=True, unit="", backbone="lpips", interval="difference"),
    "lpips_dense": Metric("perceptual distance of images to those of the dense model from the same noise",
                          better="lower", per_image=True, unit="", backbone="lpips", interval="value"),
    "ssim_dense": Metric("structural similarity of images to those of the dense model from the same noise",
                         better="higher", per_image=True, unit="", backbone=None, interval="value"),
    "psnr_dense": Metric("peak signal-to-noise ratio of images to those of the dense model from the same noise",
                         better="higher", per_image=True, unit="dB", backbone=None, interval="value"),
    "generation_time": Metric("mean time to make an image",
                              better="lower", per_image=False, unit="s/image", backbone=None),
}

# What a record shows beside each number. Two numbers compare only where these agree.
BACKBONES = {
    "bundled": {
        "clip": "bundled shapes-clip",
        "features": "bundled shapes-squeezenet (64 outputs)",
        "lpips": "bundled shapes-squeezenet (unweighted)",
    },
    "standard": {
        "clip": "standard openai/clip-vit-base-patch16@57c21647",
        "features": "standard Inception-v3 (torch-fidelity, 2048 features)",
        "lpips": "standard AlexNet (LPIPS 0.1)",
    },
}

BUNDLED = Path(__file__).resolve().parents[1] / "shapes"
KERNEL_ENTRIES = 2 ** 22  # of a kernel matrix held at a time
CLIP_ID, CLIP_REVISION = "openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3"


class Distance(NamedTuple):
    """An estimate and its 95 % interval, None where there are too few images for one."""

    value: float
    interval: Interval


def summarise(values: dict, finite, dense: dict | None, seeds: int = 1):
    """Values of metrics as measured -> {metric: mean}, {metric: values of the images}, {metric: 95 % interval}.

    values: arrays (n,), Distances or numbers. finite: bool (n,), which images exist. dense: values of the dense
    model's images, None where these are. seeds: how many noise seeds the images have, one after another.
    """
    means, per_image, sure = {}, {}, {}
    for name, value in values.items():
        if METRICS[name].per_image:
            own = per_image[name] = np.where(finite, value, math.nan)
            means[name] = float(own.mean())
            if METRICS[name].interval == "difference":
                own = own - np.array((dense or per_image)[name], float)
            if METRICS[name].interval:
                sure[name] = mean_interval(by_sample(own, seeds))
        else:
            value, interval = value if isinstance(value, Distance) else (value, None)
            # A set with an image that does not exist has no distance.
            exists = finite.all() or METRICS[name].backbone is None
            means[name] = float(value) if exists else math.nan
            if METRICS[name].interval:
                sure[name] = interval if exists else None
    return means, {name: value.tolist() for name, value in per_image.items()}, sure


# ---------------------------------------------------------------- networks

class Clip(NamedTuple):
    """A CLIP model with what prepares its inputs."""

    model: Any
    tokenizer: Any
    processor: Any


def load_backbone(kind: str, family: str, device="cpu"):
    """Load a network of BACKBONES in eval mode and float32: a Clip, or a module.

    A "features" network maps uint8 (n, 3, h, w) to (n, d); an "lpips" network
    maps two batches in [-1, 1] to their distances. Raises UserError where the
    weights cannot be had, with what to download and where to put it.
    """
    check_name("metric backbones", kind, BACKBONES)
    check_name("family of metric backbones", family, BACKBONES[kind])
    load = {
        "bundled": {"clip": _bundled_clip, "features": _bundled_features, "lpips": _bundled_lpips},
        "standard": {"clip": _standard_clip, "features": _standard_features, "lpips": _standard_lpips},
    }[kind][family]
    network = load()
    if family == "clip":
        return network._replace(model=network.model.to(device))
    return network.to(device)


def backbone_files(kind: str, family: str) -> list:
    """The files of a network of BACKBONES, fetched by loading it once. Raises UserError as load_backbone."""
    load_backbone(kind, family)
    if kind == "bundled":
        path = _bundled_path("clip" if family == "clip" else "squeezenet.safetensors")
        return sorted(path.iterdir()) if path.is_dir() else [path]
    if family == "clip":
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(CLIP_ID, "config.json", revision=CLIP_REVISION)
        return sorted(path for path in Path(config).parent.iterdir() if path.is_file())
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import AlexNet_Weights

    url = URL_INCEPTION_V3 if family == "features" else AlexNet_Weights.IMAGENET1K_V1.url
    return [Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]]


@contextlib.contextmanager
def _loading(what: str, remedy: str):
    """Make one line of whatever a library raises while it loads weights, and drop its deprecation warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # downloads and broken files fail in as many ways as there are libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load {what}: {reason} -- {remedy}") from error


def load_clip(source, revision: str = "main") -> Clip:
    """CLIP on the CPU from a folder as save_pretrained writes it, or from the hub by its id."""
    import transformers
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(source).exists():
        remedy = "the folder must hold a CLIPModel, its tokenizer and its image processor, saved by save_pretrained"
    else:
        remedy = (f"where there is a network, run 'hf download {source} --revision {revision}', and copy the folder "
                  f"models--{str(source).replace('/', '--')} from its cache into {HF_HUB_CACHE}")
    # From transformers 5 on, the plain name resizes with torchvision. PIL at all versions gives the same pixels.
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    transformers.utils.logging.disable_progress_bar()
    with _loading(f"CLIP from {source}", remedy):
        model = transformers.CLIPModel.from_pretrained(source, revision=revision)
        return Clip(model.float().eval().requires_grad_(False),
                    transformers.AutoTokenizer.from_pretrained(source, revision=revision),
                    processor.from_pretrained(source, revision=revision))


def _bundled_path(name: str) -> Path:
    path = BUNDLED / name
    if not path.exists():
        raise UserError(f"bundled weights are missing: {path} -- they come with the repository, "
                        f"bring them back with 'git checkout -- pruning/shapes/{name}'")
    return path


def _bundled_clip() -> Clip:
    return load_clip(_bundled_path("clip"))


def _bundled_squeezenet():
    """The classifier that pruning/shapes/train.py trains, on plain [-1, 1] images."""
    from safetensors.torch import load_file
    from torchvision.models import squeezenet1_1

    path = _bundled_path("squeezenet.safetensors")
    network = squeezenet1_1(weights=None, num_classes=64)
    with _loading(f"bundled weights from {path}", f"bring them back with 'git checkout -- pruning/shapes/{path.name}'"):
        network.load_state_dict(load_file(str(path)))
    return network.eval().requires_grad_(False)


def _bundled_features():
    from torch.nn.functional import interpolate

    def prepare(module, args):
        x = _signed(args[0])
        if x.shape[-2:] != (64, 64):  # the size that it was trained on
            x = interpolate(x, (64, 64), mode="bilinear", align_corners=False, antialias=True)
        return (x,)

    network = _bundled_squeezenet()
    network.register_forward_pre_hook(prepare)
    return network


def _bundled_lpips():
    import lpips
    import torch

    backbone = _bundled_squeezenet().features
    with _loading("lpips", "see requirements.txt"):
        network = lpips.LPIPS(net="squeeze", pnet_rand=True, lpips=False, verbose=False)
    network.scaling_layer = torch.nn.Identity()  # lpips would scale as for ImageNet
    for part in network.net.children():
        for index, layer in part.named_children():
            layer.load_state_dict(backbone[int(index)].state_dict())
    # |a - b|^2 = 2 (1 - cos) for unit vectors, summed over layers: brought to [0, 1] like the learnt distance.
    network.register_forward_hook(lambda module, args, distance: distance / (2 * module.L))
    return network.eval().requires_grad_(False)


def _standard_clip() -> Clip:
    return load_clip(CLIP_ID, CLIP_REVISION)


def _hub_remedy(url: str) -> str:
    import torch

    return f"download {url} to {os.path.join(torch.hub.get_dir(), 'checkpoints', url.rsplit('/', 1)[-1])}"


def _standard_features():
    # Not torchmetrics' wrapper: its resizing changed in 1.8, this one's is TensorFlow's, as in FID's first code.
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    with _loading("Inception-v3 for FID", _hub_remedy(URL_INCEPTION_V3)):
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    network.register_forward_hook(lambda module, args, outputs: outputs[0])
    return network


def _standard_lpips():
    import lpips
    from torchvision.models import AlexNet_Weights

    with _loading("AlexNet for LPIPS", _hub_remedy(AlexNet_Weights.IMAGENET1K_V1.url)):
        return lpips.LPIPS(net="alex", verbose=False).requires_grad_(False)


# ---------------------------------------------------------------- images to arrays

def _check_images(images) -> None:
    # Floats in [0, 1] would pass through every network and give wrong numbers.
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images (n, h, w, 3), got {images.dtype} {images.shape}")


def _check_pairs(images, others) -> None:
    _check_images(images)
    _check_images(others)
    if images.shape != others.shape:
        raise ValueError(f"unpaired images: {images.shape} and {others.shape}")


def _signed(pixels):
    """Tensor of uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _device(network):
    return next(network.parameters()).device


def _batched(compute, batch_size: int, what: str, *stacks) -> np.ndarray:
    """The rows of `compute` over batches of equally long stacks; a bar where it takes more than two seconds."""
    import torch

    starts = tqdm(range(0, len(stacks[0]), batch_size), desc=what, delay=2, leave=False)
    with torch.inference_mode():
        return np.concatenate([compute(*(stack[i:i + batch_size] for stack in stacks)).cpu().numpy() for i in starts])


def _to_tensor(images, device):
    """(n, h, w, 3) array -> (n, 3, h, w) tensor on the device."""
    import torch

    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- CLIP score

def embed_captions(clip: Clip, captions, batch_size: int = 64):
    """Unit rows (n, d), and how many captions were cut at the model's token limit."""
    from torch.nn.functional import normalize

    limit = clip.model.config.text_config.max_position_embeddings

    def compute(batch):
        tokens = clip.tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = tokens.to(_device(clip.model))
        # Not get_text_features: what it returns changed in transformers 5.
        pooled = clip.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return normalize(clip.model.text_projection(pooled), dim=-1)

    captions = list(captions)
    truncated = sum(len(ids) > limit for ids in clip.tokenizer(captions, verbose=False).input_ids)
    return _batched(compute, batch_size, "caption embeddings", captions), truncated


def embed_images(clip: Clip, images, batch_size: int = 64) -> np.ndarray:
    """Unit rows (n, d) for images of any size; CLIP's own processor resizes and crops."""
    from torch.nn.functional import normalize

    def compute(batch):
        inputs = clip.processor(images=list(batch), input_data_format="channels_last", return_tensors="pt")
        pooled = clip.model.vision_model(inputs.pixel_values.to(_device(clip.model))).pooler_output
        return normalize(clip.model.visual_projection(pooled), dim=-1)

    _check_images(images)
    return _batched(compute, batch_size, "image embeddings", images)


def clip_score(image_embeddings, caption_embeddings) -> np.ndarray:
    """100·cos of paired unit rows: (n, d), (n, d) -> (n,). Hessel et al., 2021, without their floor at 0."""
    if image_embeddings.shape != caption_embeddings.shape:
        raise ValueError(f"unpaired embeddings: {image_embeddings.shape} and {caption_embeddings.shape}")
    return 100 * np.sum(image_embeddings * caption_embeddings, axis=1, dtype=np.float64)


# ---------------------------------------------------------------- sets of images

class Reference:
    """Features (m, d) of real images, and what distances take from them alone, computed once for many sets."""

    def __init__(self, features):
        self.features = np.asarray(features, np.float64)
        self._sums = {}

    @functools.cached_property
    def covariance_root(self) -> np.ndarray:
        """As _covariance_root."""
        return _covariance_root(self.features)

    def kernel_sums(self, kernel) -> np.ndarray:
        """As _kernel_sums."""
        if kernel not in self._sums:
            self._sums[kernel] = _kernel_sums(self.features, kernel)
        return self._sums[kernel]


def image_features(network, images, batch_size: int = 32) -> np.ndarray:
    """Features (n, d) in float64, by the "features" network of load_backbone."""
    _check_images(images)
    device = _device(network)
    return _batched(lambda batch: network(_to_tensor(batch, device)), batch_size, "image features",
                    images).astype(np.float64)


def fid(features, reference: Reference) -> Distance:
    """Fréchet distance of the Gaussians fitted to two sets of features (Heusel et al., 2017, eq. 6).

    features: (n, d). Exact: with A'A and B'B the covariances, the
    trace of the root of their product is the nuclear norm of AB', so that few images
    cost little. NaN where a set has fewer than two images. Biased upward for small n:
    compare at equal n alone.
    """
    if min(len(features), len(reference.features)) < 2:
        return Distance(math.nan, None)
    shift = features.mean(axis=0) - reference.features.mean(axis=0)
    a, b = _covariance_root(features), reference.covariance_root
    distance = shift @ shift + np.sum(a * a) + np.sum(b * b) - 2 * np.linalg.norm(a @ b.T, "nuc")
    return Distance(max(0.0, float(distance)), None)  # not below zero but by rounding; no interval heals its bias


def _covariance_root(features) -> np.ndarray:
    """A of min(n, d) rows, where A'A is the (unbiased) covariance of the features (n, d)."""
    n, d = features.shape
    centred = (features - features.mean(axis=0)) / math.sqrt(n - 1)
    return np.linalg.qr(centred, mode="r") if n > d else centred


# ---------------------------------------------------------------- kernel distances

def kid(features, reference: Reference) -> Distance:
    """1000 times the unbiased MMD² of two sets of features (n, d) with the kernel (x·y/d + 1)³.

    Bińkowski et al., 2018, over all pairs, where others average over random subsets. May be below 0.
    """
    return _unbiased_mmd(features, reference, _cubic)


def cmmd(embeddings, reference: Reference) -> Distance:
    """1000 times the unbiased MMD² of two sets of unit CLIP embeddings (n, d) with a Gaussian kernel of σ 10.

    Jayasumana et al., 2024, eq. 4 without the diagonal, so that it is about 0 for two sets of one distribution
    whatever their number. May be below 0.
    """
    return _unbiased_mmd(embeddings, reference, _gaussian)


def _cubic(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def _gaussian(a, b):
    return np.exp(-(np.sum(a * a, 1)[:, None] + np.sum(b * b, 1) - 2 * a @ b.T) / 200)


def _kernel_sums(x, kernel) -> np.ndarray:
    """Of each row of x (n, d), the sum of the kernel with all others (n,); of some rows at a time, to spare memory."""
    rows = max(1, KERNEL_ENTRIES // len(x))
    return np.concatenate([
        block.sum(axis=1) - block[np.arange(len(block)), np.arange(start, start + len(block))]
        for start in range(0, len(x), rows) for block in [kernel(x[start:start + rows], x)]])


def _unbiased_mmd(x, reference: Reference, kernel) -> Distance:
    """1000 times the U-statistic of MMD² (Gretton et al., 2012, eq. 3), its interval by the jackknife over both sets.

    NaN where a set has fewer than two.
    """
    n, m = len(x), len(reference.features)
    if min(n, m) < 2:
        return Distance(math.nan, None)
    x = x.astype(np.float64)
    of_x, of_y, between = _kernel_sums(x, kernel), reference.kernel_sums(kernel), kernel(x, reference.features)

    def mmd(sum_x, n, sum_y, m, sum_between):
        return sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2 * sum_between / (n * m)

    value = mmd(of_x.sum(), n, of_y.sum(), m, between.sum())
    if min(n, m) < FEWEST:
        return Distance(1000 * value, None)
    without_x = mmd(of_x.sum() - 2 * of_x, n - 1, of_y.sum(), m, between.sum() - between.sum(1))
    without_y = mmd(of_x.sum(), n, of_y.sum() - 2 * of_y, m - 1, between.sum() - between.sum(0))
    variance = sum((len(left) - 1) * left.var() for left in (without_x, without_y))
    reach = student(min(n, m) - 1) * math.sqrt(variance)
    return Distance(1000 * value, (1000 * (value - reach), 1000 * (value + reach)))


# ---------------------------------------------------------------- LPIPS

def lpips(network, images, others, batch_size: int = 32) -> np.ndarray:
    """Perceptual distance of paired images (n,) (Zhang et al., 2018), by the "lpips" network of load_backbone.

    The bundled network has no weights learnt from human judgement: its distance is
    1 - cos of the feature vectors, averaged over places and seven layers.
    """
    _check_pairs(images, others)
    device = _device(network)

    def compute(*pair):
        return network(*(_signed(_to_tensor(batch, device)) for batch in pair)).flatten()

    return _batched(compute, batch_size, "LPIPS", images, others).astype(np.float64)


# What compares a set of images with the reference, by the features of its backbone.
DISTANCES = {"kid": kid, "cmmd": cmmd, "fid": fid}


# ---------------------------------------------------------------- distances to the dense model's images

def psnr(images, others) -> np.ndarray:
    """10·log10(255² ÷ mean squared difference) of paired images (n,) in dB; infinite where they are equal."""
    _check_pairs(images, others)
    squares = [np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(images, others)]
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255 ** 2 / np.array(squares))


def ssim(images, others) -> np.ndarray:
    """Structural similarity of paired images (n,): Wang et al., 2004, eq. 13, by a Gaussian window of σ 1.5.

    The mean over channels and all places, the image mirrored at its edges for the 11 × 11 window, as torchmetrics does.
    """
    from scipy.ndimage import gaussian_filter1d

    _check_pairs(images, others)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def blur(x):
        for axis in (0, 1):
            x = gaussian_filter1d(x, 1.5, axis=axis, mode="mirror", truncate=3.5)
        return x

    def compute(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        mean_a, mean_b = blur(a), blur(b)
        spread = blur(a * a + b * b) - mean_a ** 2 - mean_b ** 2
        together = blur(a * b) - mean_a * mean_b
        return np.mean((2 * mean_a * mean_b + c1) * (2 * together + c2)
                       / ((mean_a ** 2 + mean_b ** 2 + c1) * (spread + c2)))

    pairs = tqdm(zip(images, others), total=len(images), desc="SSIM", delay=2, leave=False)
    return np.array([compute(*pair) for pair in pairs])

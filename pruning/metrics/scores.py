"""The metrics as functions on arrays: from images or features to numbers, and to their means and 95 % intervals.

Images are uint8 arrays (n, height, width, 3).
"""
from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from pruning.metrics import METRICS
from pruning.metrics.backbones import check_images, device_of, in_batches, to_signed, to_tensor
from pruning.metrics.intervals import MIN_SAMPLES, Interval, metric_interval, t_critical

BLOCK_ROWS = 2 ** 11  # of a set of features that are computed with at a time
STRIP_PIXELS = 2 ** 14  # of a pair of images in SSIM on a GPU at a time
WINDOW_REACH = 5  # pixels from the centre of SSIM's 11 x 11 window to its edge


class Distance(NamedTuple):
    """A distance between two sets of images, and its 95 % interval or None if it has none."""

    value: float
    interval: Interval


# ---------------------------------------------------------------- images and captions

def clip_score(image_embeddings, caption_embeddings) -> np.ndarray:
    """Return 100 times the cosine similarity of each image and its caption, (n,) in [-100, 100]; higher is better.

    image_embeddings, caption_embeddings: unit rows (n, d). CLIPScore (Hessel et al., 2021, section 3) with weight 100
    instead of 2.5, and not clipped at 0. Raises ValueError if the shapes differ.
    """
    return 100 * _cosines(image_embeddings, caption_embeddings)


def pick_score(image_embeddings, caption_embeddings, scale: float) -> np.ndarray:
    """Return PickScore of each image for its caption, (n,); higher is better (Kirstain et al., 2023, section 3).

    image_embeddings, caption_embeddings: unit rows (n, d) of PickScore's CLIP. scale: what this CLIP multiplies cosines
    by. Raises ValueError if the shapes differ.
    """
    return scale * _cosines(image_embeddings, caption_embeddings)


def image_reward(network, images, captions, batch_size: int = 32) -> np.ndarray:
    """Return ImageReward of each image for its caption, float64 (n,); higher is better (Xu et al., 2023, section 3).

    network: a "reward" network of load_backbone. captions: n strings. Raises ValueError if images are not uint8
    (n, h, w, 3) or there are not as many captions.
    """
    check_images(images)
    if len(images) != len(captions):
        raise ValueError(f"unpaired: {len(images)} images and {len(captions)} captions")
    return in_batches(network, batch_size, "ImageReward", images, captions).astype(np.float64)


def _cosines(image_embeddings, caption_embeddings) -> np.ndarray:
    if image_embeddings.shape != caption_embeddings.shape:
        raise ValueError(f"unpaired embeddings: {image_embeddings.shape} and {caption_embeddings.shape}")
    return np.sum(image_embeddings * caption_embeddings, axis=1, dtype=np.float64)


# ---------------------------------------------------------------- pairs of images

def _check_pairs(images, others) -> None:
    check_images(images)
    check_images(others)
    if images.shape != others.shape:
        raise ValueError(f"unpaired images: {images.shape} and {others.shape}")


def lpips(network, images, others, batch_size: int = 32) -> np.ndarray:
    """Return the perceptual distance of each pair of images, float64 (n,), 0 or more; 0 for equal images.

    Zhang et al., 2018, eq. 1, by an "lpips" network of load_backbone. The bundled network has no weights learnt from
    human judgement: its distance is 1 - cos of the feature vectors, averaged over places and seven layers, in [0, 1].
    Raises ValueError if images are not uint8 (n, h, w, 3) or their shapes differ.
    """
    _check_pairs(images, others)
    device = device_of(network)

    def compute(*pair):
        return network(*(to_signed(to_tensor(batch, device)) for batch in pair)).flatten()

    return in_batches(compute, batch_size, "LPIPS", images, others).astype(np.float64)


def _to_float64(image, device):
    """Return an image (h, w, 3) as a float64 tensor (1, 3, h, w) on the device, or on the CPU for a Mac's GPU."""
    import torch

    device = "cpu" if torch.device(device).type == "mps" else device  # Macs' GPUs have no float64
    return to_tensor(image[None], device).double()


def psnr(images, others, device="cpu") -> np.ndarray:
    """Return the peak signal-to-noise ratio of each pair of images in dB, float64 (n,); infinite for equal images.

    10·log10(255² ÷ mean squared difference), by torchmetrics on the device, one pair at a time. Raises ValueError if
    images are not uint8 (n, h, w, 3) or their shapes differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_pairs(images, others)
    # torchmetrics computes the logarithms of data_range and base in float32 if they are Python numbers. The logarithm
    # of data_range 1 is exact, and numpy's float64 keeps base in float64.
    return np.array([float(peak_signal_noise_ratio(*(_to_float64(image, device) / 255 for image in pair),
                                                   data_range=1.0, base=np.float64(10)))
                     for pair in zip(images, others)])


def ssim(images, others, device="cpu") -> np.ndarray:
    """Return the structural similarity of each pair of images, float64 (n,) in [-1, 1]; 1 for equal images.

    Wang et al., 2004, eq. 13, with a Gaussian window of σ 1.5 and 11 x 11 pixels, averaged over channels and all
    pixels; images are mirrored at their edges. float64, because variances are small differences of large numbers:
    float32 is wrong by up to 1e-3 on flat areas. By torchmetrics on a CUDA device, else by SciPy on the CPU: torch's
    float64 convolution takes 50 to 150 times as long there. Raises ValueError if images are not uint8 (n, h, w, 3),
    their shapes differ, or a side is shorter than 6 pixels.
    """
    _check_pairs(images, others)
    height, width = images.shape[1:3]
    if min(height, width) <= WINDOW_REACH:
        raise ValueError(f"SSIM needs images of at least 6 x 6 pixels, got {height} x {width}")
    compute = functools.partial(_ssim_by_torch, device=device) if str(device).startswith("cuda") else _ssim_by_scipy
    return np.array([compute(*pair) for pair in zip(images, others)])


def _ssim_by_torch(image, other, device) -> float:
    """Return ssim() of one pair by torchmetrics, in strips of STRIP_PIXELS. The device is waited for once."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    height, width = image.shape[:2]
    rows = max(1, STRIP_PIXELS // width)
    pair = [_to_float64(each, device) for each in (image, other)]

    def strip_sum(start):
        # The strip has more rows on both sides, so that the window of each of its own rows sees the whole image.
        first, end = max(0, start - WINDOW_REACH), start + rows + WINDOW_REACH
        strips = [each[:, :, first:end] for each in pair]
        _, similarity = structural_similarity_index_measure(*strips, data_range=255.0, return_full_image=True)
        return similarity[:, :, start - first:start - first + rows].sum()

    return float(sum(strip_sum(start) for start in range(0, height, rows))) / image.size


def _ssim_by_scipy(image, other) -> float:
    """Return ssim() of one pair by SciPy, which filters columns and rows one after the other."""
    from scipy.ndimage import gaussian_filter

    a, b = image.astype(np.float64), other.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    blur = functools.partial(gaussian_filter, sigma=(1.5, 1.5, 0), mode="mirror", truncate=WINDOW_REACH / 1.5)
    mean_a, mean_b = blur(a), blur(b)
    squares, product = mean_a ** 2 + mean_b ** 2, mean_a * mean_b
    variances, covariance = blur(a * a + b * b) - squares, blur(a * b) - product
    return float(np.mean((2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))))


# ---------------------------------------------------------------- sets of images

class Reference:
    """Features (m, d) of real images, and their parts of the distances, computed once for many sets of images."""

    def __init__(self, features):
        self.features = features
        self._sums = {}

    @functools.cached_property
    def covariance_root(self) -> np.ndarray:
        """A root (min(m, d), d) of the covariance, see _covariance_root."""
        return _covariance_root(self.features)

    def kernel_sums(self, kernel) -> np.ndarray:
        """Return the sum (m,) of the kernel of each row with all others, see _sums_within."""
        if kernel not in self._sums:
            self._sums[kernel] = _sums_within(self.features, kernel)
        return self._sums[kernel]


def fid(features, reference: Reference) -> Distance:
    """Return the Fréchet distance of Gaussians fitted to two sets of features (Heusel et al., 2017, eq. 6), 0 or more.

    features: (n, d). NaN if a set has fewer than two rows. It is biased upward for small n: only compare distances of
    equal n. It has no interval, because an interval would not correct the bias. The computation is exact and quick for
    few images: if AᵀA and BᵀB are the covariances, the trace of the root of their product is the nuclear norm of ABᵀ.
    """
    if min(len(features), len(reference.features)) < 2:
        return Distance(math.nan, None)
    shift = _mean(features) - _mean(reference.features)
    a, b = _covariance_root(features), reference.covariance_root
    distance = shift @ shift + np.sum(a * a) + np.sum(b * b) - 2 * np.linalg.norm(a @ b.T, "nuc")
    return Distance(max(0.0, float(distance)), None)  # rounding can make a distance of 0 negative


def _mean(features) -> np.ndarray:
    return features.mean(axis=0, dtype=np.float64)


def _covariance_root(features) -> np.ndarray:
    """Return A (min(n, d), d) such that AᵀA is the unbiased covariance of features (n, d)."""
    n, d = features.shape
    mean, root = _mean(features), np.empty((0, d))
    for rows in _blocks(features):
        root = np.concatenate([root, (features[rows] - mean) / math.sqrt(n - 1)])
        root = np.linalg.qr(root, mode="r") if len(root) > d else root
    return root


def _blocks(features) -> List[slice]:
    """Return the rows of features in blocks of BLOCK_ROWS. Only a block is computed with in float64."""
    return [slice(start, start + BLOCK_ROWS) for start in range(0, len(features), BLOCK_ROWS)]


def kid(features, reference: Reference) -> Distance:
    """Return 1000 times the unbiased MMD² of two sets of features with the kernel (x·y/d + 1)³.

    features: (n, d). Bińkowski et al., 2018, section 4, over all pairs of images; other implementations average over
    random subsets. It can be negative. NaN if a set has fewer than two rows; no interval if a set has fewer than
    MIN_SAMPLES rows.
    """
    return _unbiased_mmd(features, reference, _cubic)


def cmmd(embeddings, reference: Reference) -> Distance:
    """Return 1000 times the unbiased MMD² of two sets of unit CLIP embeddings with a Gaussian kernel of σ 10.

    embeddings: (n, d). Jayasumana et al., 2024, eq. 4; the authors' code computes the biased estimate. It can be
    negative. NaN if a set has fewer than two rows; no interval if a set has fewer than MIN_SAMPLES rows.
    """
    return _unbiased_mmd(embeddings, reference, _gaussian)


def _cubic(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def _gaussian(a, b):
    return np.exp(-(np.sum(a * a, 1)[:, None] + np.sum(b * b, 1) - 2 * a @ b.T) / 200)


def _sums_within(x, kernel) -> np.ndarray:
    """Return the sum (n,) of the kernel of each row of x (n, d) with all other rows."""
    sums = np.zeros(len(x))
    for rows, others in itertools.combinations_with_replacement(_blocks(x), 2):
        block = _kernel_block(kernel, x[rows], x[others])
        if rows == others:
            np.fill_diagonal(block, 0)
        else:  # the kernel is symmetric
            sums[others] += block.sum(axis=0)
        sums[rows] += block.sum(axis=1)
    return sums


def _sums_between(x, y, kernel) -> Tuple[np.ndarray, np.ndarray]:
    """Return the sum (n,) of the kernel of each row of x (n, d) with all rows of y (m, d), and (m,) of y's with x."""
    of_x, of_y = np.zeros(len(x)), np.zeros(len(y))
    for rows, others in itertools.product(_blocks(x), _blocks(y)):
        block = _kernel_block(kernel, x[rows], y[others])
        of_x[rows] += block.sum(axis=1)
        of_y[others] += block.sum(axis=0)
    return of_x, of_y


def _kernel_block(kernel, a, b) -> np.ndarray:
    return kernel(a.astype(np.float64), b.astype(np.float64))


def _unbiased_mmd(x, reference: Reference, kernel) -> Distance:
    """Return 1000 times the U-statistic of MMD² (Gretton et al., 2012, eq. 3) with its jackknife interval."""
    n, m = len(x), len(reference.features)
    if min(n, m) < 2:
        return Distance(math.nan, None)
    of_x, of_y = _sums_within(x, kernel), reference.kernel_sums(kernel)
    x_with_y, y_with_x = _sums_between(x, reference.features, kernel)

    def mmd(sum_x, n, sum_y, m, sum_between):
        return sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2 * sum_between / (n * m)

    between = x_with_y.sum()
    value = mmd(of_x.sum(), n, of_y.sum(), m, between)
    if min(n, m) < MIN_SAMPLES:
        return Distance(1000 * value, None)
    without_x = mmd(of_x.sum() - 2 * of_x, n - 1, of_y.sum(), m, between - x_with_y)
    without_y = mmd(of_x.sum(), n, of_y.sum() - 2 * of_y, m - 1, between - y_with_x)
    # The jackknife leaves out one row of one set at a time; the variances of both sets add up.
    variance = sum((len(estimates) - 1) * estimates.var() for estimates in (without_x, without_y))
    reach = t_critical(min(n, m) - 1) * math.sqrt(variance)
    return Distance(1000 * value, (1000 * (value - reach), 1000 * (value + reach)))


# ---------------------------------------------------------------- what a point records

def summarise(values: Dict[str, Any], finite: np.ndarray, dense: Optional[Dict[str, list]], seeds: int = 1
              ) -> Tuple[Dict[str, float], Dict[str, List[float]], Dict[str, Interval]]:
    """Return {metric: mean}, {metric: values of the images} and {metric: 95 % interval} for measured values.

    values: {metric: array (n,), Distance or number}. finite: bool (n,), False for images that are not finite. dense:
    {metric: values of the dense model's images}, None if these are the dense model's. seeds: the number of noise seeds;
    the images are ordered seed by seed. An image that is not finite has the value NaN, and no set that contains it has
    a mean or an interval; costs do not depend on the images. Only the entries of METRICS decide what is computed.
    """
    means, per_image, intervals = {}, {}, {}
    for name, value in values.items():
        metric = METRICS[name]
        if metric.per_image:
            own = per_image[name] = np.where(finite, value, math.nan)
            means[name] = float(own.mean())
            if metric.interval:
                intervals[name] = metric_interval(metric, own, (dense or per_image).get(name), seeds)
        else:
            value, interval = value if isinstance(value, Distance) else (value, None)
            exists = finite.all() or metric.cost
            means[name] = float(value) if exists else math.nan
            if metric.interval:
                intervals[name] = interval if exists else None
    return means, {name: value.tolist() for name, value in per_image.items()}, intervals

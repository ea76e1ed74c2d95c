"""Each metric on pictures whose answer is known.

Networks are the real classes with random weights, saved as the bundled ones
are; the tests whose names end in `_bundled` use the bundled weights themselves.
"""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pruning import UserError, metrics
from pruning.metrics import BACKBONES, METRICS
from pruning.shapes import scenes, train

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("clip", "features", "lpips")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as pruning/shapes, with random weights."""
    from transformers import CLIPImageProcessor

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tokenizer = train.make_tokenizer(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    train.make_clip(tokenizer).half().save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3,
                       image_std=[0.5] * 3).save_pretrained(folder / "clip")
    squeezenet = train.make_features()
    torch.nn.init.normal_(squeezenet.classifier[1].weight, std=0.3)  # apart from each other also when untrained
    save_file({k: v.half() for k, v in squeezenet.state_dict().items()}, str(folder / "squeezenet.safetensors"))
    return folder


@pytest.fixture(scope="module")
def networks(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "BUNDLED", weights)
        return {family: metrics.load_backbone("bundled", family, "cpu") for family in FAMILIES}


@pytest.fixture(scope="module")
def bundled():
    return {family: metrics.load_backbone("bundled", family, "cpu") for family in FAMILIES}


def drawn(count, first=0):
    """Scenes no network was trained on, and their images."""
    chosen = [scenes.scene("prompts", first + i) for i in range(count)]
    return chosen, np.stack([np.asarray(scenes.render(s)) for s in chosen])


def noisy(images, level, seed=0):
    noise = np.random.RandomState(seed).normal(0, 255 * level, images.shape)
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def signed(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def gets_worse(metric, values):
    """Whether the values fall off steadily, in the metric's own direction."""
    steps = np.diff(values)
    return bool(np.all(steps < 0 if METRICS[metric].better == "higher" else steps > 0))


# ---------------------------------------------------------------- tables

def test_the_tables_load_without_torch():
    code = ("import sys; from pruning.metrics import METRICS, BACKBONES; "
            "print(*METRICS); print(*{'torch', 'torchvision', 'transformers', 'lpips'} & set(sys.modules))")
    out = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), check=True, stdout=subprocess.PIPE)
    assert out.stdout.decode().split() == list(METRICS)


def test_every_metric_has_a_direction_and_a_named_backbone_of_each_kind():
    for metric in METRICS.values():
        assert metric.better in ("higher", "lower")
        assert metric.help
    needed = {metric.backbone for metric in METRICS.values()} - {None}
    for kind, names in BACKBONES.items():
        assert set(names) == needed == set(FAMILIES)
        assert all(name.startswith(f"{kind} ") for name in names.values())
    assert METRICS["generation_time"][1:] == ("lower", False, "s/image", None, None)


# ---------------------------------------------------------------- loading

def test_backbones_are_float32_in_eval_mode_and_not_trainable(networks):
    for network in (networks["clip"].model, networks["features"], networks["lpips"]):
        assert not any(module.training for module in network.modules())
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in network.parameters())


def test_loading_prints_nothing_on_stdout(weights, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "BUNDLED", weights)
    for family in FAMILIES:
        metrics.load_backbone("bundled", family, "cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_bundled_weights_are_named(family, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}.*git checkout"):
        metrics.load_backbone("bundled", family, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_bundled_weights_are_named(family, weights, tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    for file in (weights / "clip").iterdir():
        (tmp_path / "clip" / file.name).write_bytes(file.read_bytes())
    for name in ("clip/model.safetensors", "squeezenet.safetensors"):
        (tmp_path / name).write_bytes((weights / name).read_bytes()[:1000])
    monkeypatch.setattr(metrics, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match=str(tmp_path / ("clip" if family == "clip" else "squeezenet"))):
        metrics.load_backbone("bundled", family, "cpu")


@pytest.mark.parametrize(("family", "file", "place"), [
    ("clip", "nobody/no-such-clip", "models--nobody--no-such-clip"),
    ("features", "weights-inception-2015-12-05-6726825d.pth", "hub/checkpoints/weights-inception-2015"),
    ("lpips", "alexnet-owt-7be5be79.pth", "hub/checkpoints/alexnet-owt"),
])
def test_offline_it_says_what_to_download_and_where_to_put_it(family, file, place, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CLIP_ID", "nobody/no-such-clip")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        metrics.load_backbone("standard", family, "cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert "download" in message
    assert file in message
    assert place in message


@pytest.mark.parametrize(("kind", "family", "near"), [("bundle", "clip", "'bundled'"), ("bundled", "clips", "'clip'")])
def test_a_wrong_name_gets_the_near_one(kind, family, near):
    with pytest.raises(UserError, match=near):
        metrics.load_backbone(kind, family, "cpu")


def test_images_that_are_not_uint8_are_refused(networks):
    _, images = drawn(2)
    floats = images / 255
    for call in (lambda: metrics.embed_images(networks["clip"], floats),
                 lambda: metrics.image_features(networks["features"], floats),
                 lambda: metrics.lpips(networks["lpips"], images, floats)):
        with pytest.raises(ValueError, match="uint8"):
            call()


# ---------------------------------------------------------------- CLIP score

def test_clip_score_is_what_transformers_computes(networks):
    clip = networks["clip"]
    chosen, images = drawn(5)
    captions = [s.caption for s in chosen]
    tokens = clip.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=signed(images))
    texts, truncated = metrics.embed_captions(clip, captions)
    pictures = metrics.embed_images(clip, images)
    assert truncated == 0
    assert np.abs(texts - out.text_embeds.numpy()).max() < 1e-5
    assert np.abs(pictures - out.image_embeds.numpy()).max() < 1e-5
    logits = out.logits_per_image / clip.model.logit_scale.exp()
    assert metrics.clip_score(pictures, texts) == pytest.approx(100 * logits.diag().detach().numpy(), abs=1e-4)


def test_clip_score_of_parallel_and_opposite_embeddings():
    rows = np.eye(4)[:3]
    scores = metrics.clip_score(np.concatenate([rows, rows, rows]), np.concatenate([rows, rows[[1, 2, 0]], -rows]))
    assert scores.tolist() == [100] * 3 + [0] * 3 + [-100] * 3
    assert gets_worse("clip_score", scores[::3])
    with pytest.raises(ValueError, match="unpaired"):
        metrics.clip_score(rows, rows[:1])


def test_clip_embeddings_do_not_depend_on_the_batch_size(networks):
    chosen, images = drawn(5)
    captions = [s.caption for s in chosen]
    for embed, items in ((metrics.embed_images, images),
                         (lambda *args: metrics.embed_captions(*args)[0], captions)):
        together = embed(networks["clip"], items, 5)
        assert np.abs(embed(networks["clip"], items, 2) - together).max() < 1e-5
        assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
        assert np.abs(together[0] - together[1]).max() > 1e-3


def test_captions_over_the_limit_are_cut_and_counted(networks):
    words = ["red"] * (train.TOKENS - 2)
    captions = ["a red star", " ".join(words), " ".join([*words, "blue"]), " ".join([*words, "black", "ring"])]
    rows, truncated = metrics.embed_captions(networks["clip"], captions)
    assert truncated == 2
    assert np.abs(rows[2:] - rows[1]).max() < 1e-5  # what is left is the caption up to the limit, with its end mark
    assert np.abs(rows[1] - rows[0]).max() > 1e-3


def test_clip_resizes_images_of_another_size_as_pil_does(networks):
    _, images = drawn(3)
    large = [Image.fromarray(image).resize((96, 96), Image.BICUBIC) for image in images]
    small = np.stack([np.asarray(image.resize((64, 64), Image.BICUBIC)) for image in large])
    rows = metrics.embed_images(networks["clip"], np.stack([np.asarray(image) for image in large]))
    assert np.abs(rows - metrics.embed_images(networks["clip"], small)).max() < 1e-5


def test_clip_score_prefers_the_true_caption_bundled(bundled):
    chosen, images = drawn(32)
    captions = np.array([s.caption for s in chosen])
    texts, truncated = metrics.embed_captions(bundled["clip"], captions.tolist())
    pictures = metrics.embed_images(bundled["clip"], images)
    assert truncated == 0
    for k in range(len(images)):
        wrong = captions != captions[k]
        others = metrics.clip_score(np.repeat(pictures[k:k + 1], wrong.sum(), 0), texts[wrong])
        true = metrics.clip_score(pictures[k:k + 1], texts[k:k + 1])[0]
        assert gets_worse("clip_score", [true, others.mean()])


def test_clip_score_falls_with_noise_bundled(bundled):
    chosen, images = drawn(32)
    texts, _ = metrics.embed_captions(bundled["clip"], [s.caption for s in chosen])
    scores = [metrics.clip_score(metrics.embed_images(bundled["clip"], noisy(images, level)), texts).mean()
              for level in (0, 0.2, 0.8)]
    assert gets_worse("clip_score", scores)


# ---------------------------------------------------------------- FID

def gaussian(n, d, seed=0):
    rng = np.random.RandomState(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def exact(n, mean, std, seed=0):
    """n rows whose sample mean and (diagonal) sample covariance are these to rounding."""
    x = np.random.RandomState(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T).reshape(len(mean), -1))).T
    return x * std + mean


@pytest.mark.parametrize(("n", "d"), [(20, 64), (200, 16)])
def test_fid_of_equal_sets_is_zero(n, d):
    x = gaussian(n, d)
    shuffled = x[np.random.RandomState(1).permutation(n)]
    assert 0 <= metrics.fid(x, metrics.Reference(shuffled)).value < 1e-8 * np.trace(np.cov(x.T))


@pytest.mark.parametrize("n", [6, 300])
@pytest.mark.parametrize(("means", "stds"), [
    (([1.0], [4.0]), ([2.0], [0.5])),
    (([0.0, 1, 2, 3], [1.0, 1, 0, -1]), ([1.0, 2, 3, 4], [4.0, 0.1, 3, 1])),
])
def test_fid_is_the_closed_form_for_diagonal_gaussians(n, means, stds):
    mean, other = map(np.array, means)
    std, wide = map(np.array, stds)
    expected = np.sum((mean - other) ** 2) + np.sum((std - wide) ** 2)
    distance = metrics.fid(exact(n, mean, std), metrics.Reference(exact(n + 1, other, wide, seed=1)))
    assert distance.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 300), (300, 400)])
def test_fid_is_that_of_torchmetrics(n, m):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(torch.nn.Module):  # an image is its own features
        num_features = 48

        def forward(self, images):
            return images.flatten(1).double()

    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (n, 3, 4, 4)).astype(np.uint8)
    others = (rng.randint(0, 256, (m, 3, 4, 4)) * rng.uniform(0.3, 1, (m, 1, 1, 1))).astype(np.uint8)
    judge = FrechetInceptionDistance(feature=Pixels())
    judge.update(torch.from_numpy(images), real=False)
    judge.update(torch.from_numpy(others), real=True)
    ours = metrics.fid(images.reshape(n, -1).astype(np.float64), metrics.Reference(others.reshape(m, -1))).value
    assert ours == pytest.approx(judge.compute().item(), rel=1e-4)
    assert ours > 100


def test_fid_through_the_network_is_that_of_torchmetrics(networks):
    from torchmetrics.image.fid import FrechetInceptionDistance

    _, images = drawn(80)
    others = noisy(images, 0.2)
    judge = FrechetInceptionDistance(feature=networks["features"])
    judge.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=True)
    judge.update(torch.from_numpy(others).permute(0, 3, 1, 2), real=False)
    rows = [metrics.image_features(networks["features"], x) for x in (others, images)]
    assert rows[0].dtype == np.float64
    assert rows[0].shape == (80, 64)
    assert metrics.fid(rows[0], metrics.Reference(rows[1])).value == pytest.approx(judge.compute().item(), rel=1e-4)


def fid_by_noise(network):
    _, images = drawn(48)
    reference = metrics.Reference(metrics.image_features(network, images))
    return [metrics.fid(metrics.image_features(network, noisy(images, level)), reference).value
            for level in (0, 0.05, 0.15, 0.4)]


def test_fid_rises_with_noise(networks):
    values = fid_by_noise(networks["features"])
    assert values[0] < 1e-8 * values[1]
    assert gets_worse("fid", values)


def test_fid_rises_with_noise_bundled(bundled):
    values = fid_by_noise(bundled["features"])
    assert values[0] < 1e-8 * values[1]
    assert gets_worse("fid", values)


def test_fid_of_unseen_scenes_is_far_below_that_of_noisy_ones_bundled(bundled):
    reference, same, spoilt = (metrics.image_features(bundled["features"], images) for images in (
        drawn(192)[1], drawn(192, first=192)[1], noisy(drawn(192, first=192)[1], 0.1)))
    reference = metrics.Reference(reference)
    assert 10 * metrics.fid(same, reference).value < metrics.fid(spoilt, reference).value


@pytest.mark.parametrize("sizes", [(1, 20), (20, 1)])
def test_fid_of_a_single_image_is_nan(sizes):
    features, reference = (gaussian(n, 4) for n in sizes)
    assert np.isnan(metrics.fid(features, metrics.Reference(reference)).value)


def test_features_see_signed_pixels_at_the_size_of_training(networks, weights):
    from safetensors.torch import load_file

    plain = train.make_features().eval()
    plain.load_state_dict(load_file(str(weights / "squeezenet.safetensors")))
    _, images = drawn(3)
    large = np.stack([np.asarray(Image.fromarray(image).resize((128, 128))) for image in images])
    resized = torch.nn.functional.interpolate(signed(large), (64, 64), mode="bilinear", antialias=True)
    for given, seen in ((images, signed(images)), (large, resized)):
        with torch.no_grad():
            assert np.abs(metrics.image_features(networks["features"], given) - plain(seen).numpy()).max() < 1e-5


def test_features_do_not_depend_on_the_batch_size(networks):
    _, images = drawn(5)
    together, apart = (metrics.image_features(networks["features"], images, size) for size in (5, 2))
    assert np.abs(together - apart).max() < 1e-5
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_inception_features_are_those_of_torchmetrics_and_come_from_the_hub_cache(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    torch.save({}, str(tmp_path / "none.pth"))
    path = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    state = Untrained("inception-v3-compat", ["2048"], str(tmp_path / "none.pth")).state_dict()
    for weight in (v for v in state.values() if v.dim() == 4):
        weight.normal_(std=(2 / weight[0].numel()) ** 0.5)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, str(path))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = metrics.load_backbone("standard", "features", "cpu")
    judge = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    judge.use_antialias = False  # torchmetrics before 1.8 had no other way
    _, images = drawn(2)
    with torch.no_grad():
        expected = judge(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    features = metrics.image_features(network, images)
    assert features.shape == (2, 2048)
    assert features == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-4


# ---------------------------------------------------------------- kernel distances

def test_kid_through_the_network_is_that_of_torchmetrics(networks):
    from torchmetrics.image.kid import KernelInceptionDistance

    _, images = drawn(60)
    others = noisy(images, 0.2)
    judge = KernelInceptionDistance(feature=networks["features"], subsets=1, subset_size=60)
    judge.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=True)
    judge.update(torch.from_numpy(others).permute(0, 3, 1, 2), real=False)
    features, reference = (metrics.image_features(networks["features"], x) for x in (others, images))
    ours = metrics.kid(features, metrics.Reference(reference))
    assert ours.value == pytest.approx(1000 * judge.compute()[0].item(), rel=1e-4)


def test_kernel_distances_are_their_sums_over_all_pairs():
    x, y = gaussian(7, 3), gaussian(9, 3, seed=1)
    kernels = {metrics.kid: lambda a, b: (a @ b / 3 + 1) ** 3,
               metrics.cmmd: lambda a, b: np.exp(-np.sum((a - b) ** 2) / (2 * 10 ** 2))}
    for distance, kernel in kernels.items():
        within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
        between = np.mean([kernel(a, b) for a in x for b in y])
        assert distance(x, metrics.Reference(y)).value == pytest.approx(1000 * (sum(within) - 2 * between), rel=1e-9)


def test_kernel_sums_are_the_same_a_few_rows_at_a_time(monkeypatch):
    x, reference = gaussian(30, 5), gaussian(50, 5, seed=1)
    whole = metrics.kid(x, metrics.Reference(reference))
    monkeypatch.setattr(metrics, "KERNEL_ENTRIES", 120)  # two rows of the reference, and none of a longer one
    parts = metrics.kid(x, metrics.Reference(reference))
    assert (parts.value, *parts.interval) == pytest.approx((whole.value, *whole.interval), rel=1e-12)


@pytest.mark.parametrize("distance", [metrics.kid, metrics.cmmd])
def test_kernel_distances_are_unbiased_at_few_images_and_their_intervals_cover(distance):
    """Sets of one distribution, where FID is far from 0."""
    rng, found = np.random.RandomState(0), []
    for _ in range(300):
        found.append(distance(rng.normal(size=(12, 6)), metrics.Reference(rng.normal(size=(40, 6)))))
    values = np.array([d.value for d in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert values.min() < 0
    assert np.mean([low <= 0 <= high for low, high in (d.interval for d in found)]) >= 0.9
    near, far = (distance(rng.normal(size=(30, 6)), metrics.Reference(shift + rng.normal(size=(40, 6))))
                 for shift in (0, 1))
    assert near.interval[1] < far.interval[0]


def test_a_jackknife_interval_is_as_wide_as_the_estimate_scatters():
    rng = np.random.RandomState(0)
    pairs = [(rng.normal(size=(40, 4)) + 0.5, rng.normal(size=(60, 4))) for _ in range(200)]
    found = [metrics.kid(features, metrics.Reference(reference)) for features, reference in pairs]
    scatter = np.std([d.value for d in found])
    widths = [(d.interval[1] - d.interval[0]) / (2 * 2.02) for d in found]
    assert np.median(widths) == pytest.approx(scatter, rel=0.25)


@pytest.mark.parametrize("distance", [metrics.kid, metrics.cmmd])
def test_kernel_distances_claim_nothing_of_too_few_images(distance):
    assert np.isnan(distance(gaussian(1, 4), metrics.Reference(gaussian(20, 4))).value)
    assert distance(gaussian(4, 4), metrics.Reference(gaussian(20, 4))).interval is None


# ---------------------------------------------------------------- SSIM and PSNR

def test_ssim_and_psnr_are_those_of_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    _, images = drawn(5)
    others = noisy(images, 0.1)
    pair = [torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in (images, others)]
    expected = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none").numpy()
    assert metrics.ssim(images, others) == pytest.approx(expected, rel=1e-6)
    expected = peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3)).numpy()
    assert metrics.psnr(images, others) == pytest.approx(expected, rel=1e-5)


def test_equal_images_have_ssim_1_and_no_finite_psnr():
    _, images = drawn(2)
    assert metrics.ssim(images, images) == pytest.approx(1)
    assert np.all(np.isinf(metrics.psnr(images, images)))


# ---------------------------------------------------------------- what a point holds

def test_intervals_are_of_the_paired_difference_to_dense():
    """Images that differ widely and all lose 2 have lost 2 for sure."""
    dense = {"clip_score": list(np.random.RandomState(0).normal(80, 10, size=20))}
    lost = np.array(dense["clip_score"]) - 2 + np.random.RandomState(1).normal(0, 0.1, size=20)
    means, per_image, intervals = metrics.summarise({"clip_score": lost}, np.ones(20, bool), dense)
    low, high = intervals["clip_score"]
    assert -2.2 < low < -2 < high < -1.8
    assert means["clip_score"] == pytest.approx(np.mean(per_image["clip_score"]))


def test_a_set_with_an_image_that_does_not_exist_has_no_mean_and_no_interval():
    finite = np.array([True] * 6 + [False])
    values = {"lpips_dense": np.arange(7.0), "kid": metrics.Distance(1.0, (0.0, 2.0)), "generation_time": 0.5}
    means, per_image, intervals = metrics.summarise(values, finite, None)
    assert np.isnan([means["lpips_dense"], means["kid"], per_image["lpips_dense"][-1]]).all()
    assert means["generation_time"] == 0.5
    assert intervals == {"lpips_dense": None, "kid": None}


# ---------------------------------------------------------------- LPIPS

def lpips_by_noise(network):
    _, images = drawn(6)
    return np.array([metrics.lpips(network, noisy(images, level), images) for level in (0, 0.05, 0.15, 0.4)])


def test_lpips_is_zero_for_equal_images_and_rises_with_distortion(networks):
    values = lpips_by_noise(networks["lpips"])
    assert values.shape == (4, 6)
    assert np.all(values[0] == 0)
    for metric in ("lpips", "lpips_dense"):
        assert all(gets_worse(metric, image) for image in values.T)


def test_lpips_is_zero_for_equal_images_and_rises_with_distortion_bundled(bundled):
    values = lpips_by_noise(bundled["lpips"])
    assert np.all(values[0] == 0)
    assert all(gets_worse("lpips", image) for image in values.T)


def test_bundled_lpips_is_its_formula_on_the_layers_of_the_classifier(networks, weights):
    from safetensors.torch import load_file

    plain = train.make_features().eval()
    plain.load_state_dict(load_file(str(weights / "squeezenet.safetensors")))
    _, images = drawn(4)
    others = images[[1, 2, 3, 0]]

    def layers(x):  # those that lpips takes of SqueezeNet 1.1
        outputs = []
        for layer in plain.features:
            x = layer(x)
            outputs.append(x.clone())  # some layers work in place
        return [outputs[k] / outputs[k].norm(dim=1, keepdim=True) for k in (1, 4, 7, 9, 10, 11, 12)]

    with torch.no_grad():
        pairs = list(zip(layers(signed(images)), layers(signed(others))))
        expected = sum(1 - (a * b).sum(1).mean((1, 2)) for a, b in pairs) / 7
    values = metrics.lpips(networks["lpips"], images, others)
    assert values.dtype == np.float64
    assert values == pytest.approx(expected.numpy(), rel=1e-4)
    assert np.all((values > 0) & (values < 1))
    assert metrics.lpips(networks["lpips"], others, images) == pytest.approx(values, rel=1e-5)
    assert metrics.lpips(networks["lpips"], images, others, batch_size=3) == pytest.approx(values, rel=1e-5)


def test_lpips_refuses_unpaired_images(networks):
    _, images = drawn(2)
    with pytest.raises(ValueError, match="unpaired"):
        metrics.lpips(networks["lpips"], images, images[:1])


@pytest.mark.filterwarnings("ignore")  # of the package, when the test calls it itself
def test_standard_lpips_is_the_package_with_its_heads_over_the_cached_alexnet(tmp_path, monkeypatch):
    from lpips import LPIPS
    from torchvision.models import alexnet

    with torch.device("meta"):
        shapes = {k: v.shape for k, v in alexnet().state_dict().items()}
    torch.manual_seed(0)
    state = {k: torch.randn(shape) * 0.05 if k.startswith("features") else torch.zeros(1).expand(shape)
             for k, shape in shapes.items()}  # the classifier, of which LPIPS uses nothing, takes no room so
    path = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, str(path))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = metrics.load_backbone("standard", "lpips", "cpu")
    _, images = drawn(4)
    others = noisy(images, 0.1)
    judge = LPIPS(net="alex", verbose=False)
    with torch.no_grad():
        expected = torch.cat([judge(a[None], b[None]).flatten() for a, b in zip(signed(images), signed(others))])
    assert metrics.lpips(network, images, others) == pytest.approx(expected.numpy(), rel=1e-4)
    assert np.all(metrics.lpips(network, images, images) == 0)
    assert expected.min() > 0

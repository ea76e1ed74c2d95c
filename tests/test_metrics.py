"""Each metric gives the known answer on images and features whose answer is known.

Most networks are the real classes with random weights, saved like the bundled ones. Tests whose names end in `_bundled`
use the bundled weights.
"""
from __future__ import annotations

import ast
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pruning import UserError, metrics
from pruning.metrics import BACKBONES, METRICS, Metric, backbones, costs, scores
from pruning.shapes import scenes, train

FAMILIES = ("clip", "features", "lpips")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a folder with the files of pruning/shapes that the metrics need, with random weights."""
    from transformers import CLIPImageProcessor

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tokenizer = train.make_tokenizer(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    train.make_clip(tokenizer).half().save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3,
                       image_std=[0.5] * 3).save_pretrained(folder / "clip")
    squeezenet = train.make_features()
    torch.nn.init.normal_(squeezenet.classifier[1].weight, std=0.3)  # large enough to tell images apart untrained
    save_file({k: v.half() for k, v in squeezenet.state_dict().items()}, str(folder / "squeezenet.safetensors"))
    return folder


@pytest.fixture(scope="module")
def networks(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "BUNDLED", weights)
        return {family: backbones.load_backbone("bundled", family, "cpu") for family in FAMILIES}


@pytest.fixture(scope="module")
def bundled():
    return {family: backbones.load_backbone("bundled", family, "cpu") for family in FAMILIES}


def drawn(count, first=0):
    """Return scenes on which no network was trained, and their images."""
    chosen = [scenes.scene("prompts", first + i) for i in range(count)]
    return chosen, np.stack([np.asarray(scenes.render(s)) for s in chosen])


def noisy(images, level, seed=0):
    noise = np.random.RandomState(seed).normal(0, 255 * level, images.shape)
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def signed(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def gets_worse(metric, values):
    """Return whether each value is worse than the one before, in the metric's own direction."""
    steps = np.diff(values)
    return bool(np.all(steps < 0 if METRICS[metric].better == "higher" else steps > 0))


# ---------------------------------------------------------------- tables

def test_every_entry_of_the_tables_is_complete_and_consistent():
    for metric in METRICS.values():
        assert metric.help
        assert metric.better in ("higher", "lower")
        assert metric.interval in ("difference", "value", None)
        assert metric.relative in ("ratio", "value", "1 - value", "")
        assert metric.cost == (metric.against == "")  # quality is always a comparison
        if not metric.cost:
            assert metric.per_image == (metric.against in ("caption", "original", "dense"))
            assert metric.per_image or metric.against == "reference"
    needed = {metric.backbone for metric in METRICS.values() if not metric.optional} - {None}
    optional = {metric.backbone for metric in METRICS.values() if metric.optional}
    assert set(BACKBONES["standard"]) == needed | optional
    for kind, names in BACKBONES.items():
        assert set(names) - optional == needed == set(FAMILIES)
        assert all(name.startswith(f"{kind} ") for name in names.values())


def test_no_code_of_the_metrics_depends_on_the_name_of_a_metric():
    """A new metric is an entry and a function, so no other code may name one."""
    names = set(METRICS) - set(FAMILIES)
    for path in Path(metrics.__file__).parent.glob("*.py"):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        assert names & set(texts) == (names if path.name == "__init__.py" else set()), path


# ---------------------------------------------------------------- loading

def test_backbones_are_float32_in_eval_mode_and_not_trainable(networks):
    for network in (networks["clip"].model, networks["features"], networks["lpips"]):
        assert not any(module.training for module in network.modules())
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in network.parameters())


def test_loading_prints_nothing_on_stdout(weights, monkeypatch, capsys):
    monkeypatch.setattr(backbones, "BUNDLED", weights)
    for family in FAMILIES:
        backbones.load_backbone("bundled", family, "cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_names_missing_bundled_weights(family, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}.*git checkout"):
        backbones.load_backbone("bundled", family, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_names_broken_bundled_weights(family, weights, tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    for file in (weights / "clip").iterdir():
        (tmp_path / "clip" / file.name).write_bytes(file.read_bytes())
    for name in ("clip/model.safetensors", "squeezenet.safetensors"):
        (tmp_path / name).write_bytes((weights / name).read_bytes()[:1000])
    monkeypatch.setattr(backbones, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match=str(tmp_path / ("clip" if family == "clip" else "squeezenet"))):
        backbones.load_backbone("bundled", family, "cpu")


@pytest.mark.parametrize(("family", "file", "place"), [
    ("clip", "nobody/no-such-clip", "models--nobody--no-such-clip"),
    ("features", "weights-inception-2015-12-05-6726825d.pth", "hub/checkpoints/weights-inception-2015"),
    ("lpips", "alexnet-owt-7be5be79.pth", "hub/checkpoints/alexnet-owt"),
])
def test_an_offline_error_says_what_to_download_and_where_to_put_it(family, file, place, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "CLIP_ID", "nobody/no-such-clip")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        backbones.load_backbone("standard", family, "cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert "download" in message
    assert file in message
    assert place in message


@pytest.mark.parametrize(("kind", "family", "near"), [("bundle", "clip", "'bundled'"), ("bundled", "clips", "'clip'")])
def test_an_error_suggests_the_nearest_name(kind, family, near):
    with pytest.raises(UserError, match=near):
        backbones.load_backbone(kind, family, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_of_a_bundled_network_are_its_weights(family, weights, monkeypatch):
    monkeypatch.setattr(backbones, "BUNDLED", weights)
    files = backbones.backbone_files("bundled", family)
    assert weights / ("clip/model.safetensors" if family == "clip" else "squeezenet.safetensors") in files
    assert all(path.is_file() for path in files)


def test_images_that_are_not_uint8_are_refused(networks):
    _, images = drawn(2)
    floats = images / 255
    for call in (lambda: backbones.embed_images(networks["clip"], floats),
                 lambda: backbones.image_features(networks["features"], floats),
                 lambda: scores.lpips(networks["lpips"], images, floats),
                 lambda: scores.ssim(floats, images),
                 lambda: scores.psnr(images, floats)):
        with pytest.raises(ValueError, match="uint8"):
            call()


def test_unpaired_images_are_refused(networks):
    _, images = drawn(2)
    for call in (lambda *pair: scores.lpips(networks["lpips"], *pair), scores.ssim, scores.psnr):
        with pytest.raises(ValueError, match="unpaired"):
            call(images, images[:1])


def test_a_family_describes_images_by_its_own_network(networks):
    _, images = drawn(3)
    expected = {"clip": backbones.embed_images(networks["clip"], images),
                "features": backbones.image_features(networks["features"], images)}
    for family, features in expected.items():
        assert np.array_equal(backbones.describe(family, networks[family], images), features)
    with pytest.raises(KeyError, match="lpips"):
        backbones.describe("lpips", networks["lpips"], images)


# ---------------------------------------------------------------- CLIP score

def test_clip_score_equals_that_of_transformers(networks):
    clip = networks["clip"]
    chosen, images = drawn(5)
    captions = [s.caption for s in chosen]
    tokens = clip.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=signed(images))
    texts, truncated = backbones.embed_captions(clip, captions)
    pictures = backbones.embed_images(clip, images)
    assert truncated == []
    assert np.abs(texts - out.text_embeds.numpy()).max() < 1e-5
    assert np.abs(pictures - out.image_embeds.numpy()).max() < 1e-5
    logits = out.logits_per_image / clip.model.logit_scale.exp()
    assert scores.clip_score(pictures, texts) == pytest.approx(100 * logits.diag().detach().numpy(), abs=1e-4)


def test_clip_score_is_100_for_parallel_0_for_orthogonal_and_minus_100_for_opposite_embeddings():
    rows = np.eye(4)[:3]
    values = scores.clip_score(np.concatenate([rows, rows, rows]), np.concatenate([rows, rows[[1, 2, 0]], -rows]))
    assert values.tolist() == [100] * 3 + [0] * 3 + [-100] * 3
    assert gets_worse("clip_score", values[::3])
    with pytest.raises(ValueError, match="unpaired"):
        scores.clip_score(rows, rows[:1])


def test_clip_embeddings_do_not_depend_on_the_batch_size(networks):
    chosen, images = drawn(5)
    captions = [s.caption for s in chosen]
    for embed, items in ((backbones.embed_images, images),
                         (lambda *args: backbones.embed_captions(*args)[0], captions)):
        together = embed(networks["clip"], items, 5)
        assert np.abs(embed(networks["clip"], items, 2) - together).max() < 1e-5
        assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
        assert np.abs(together[0] - together[1]).max() > 1e-3


def test_captions_over_the_token_limit_are_cut_and_named(networks):
    words = ["red"] * (train.TOKENS - 2)
    captions = ["a red star", " ".join(words), " ".join([*words, "blue"]), " ".join([*words, "black", "ring"])]
    rows, truncated = backbones.embed_captions(networks["clip"], captions)
    assert truncated == [2, 3]
    assert np.abs(rows[2:] - rows[1]).max() < 1e-5  # what is left is the caption up to the limit, with its end token
    assert np.abs(rows[1] - rows[0]).max() > 1e-3


def test_clip_resizes_images_like_pil(networks):
    _, images = drawn(3)
    large = [Image.fromarray(image).resize((96, 96), Image.BICUBIC) for image in images]
    small = np.stack([np.asarray(image.resize((64, 64), Image.BICUBIC)) for image in large])
    rows = backbones.embed_images(networks["clip"], np.stack([np.asarray(image) for image in large]))
    assert np.abs(rows - backbones.embed_images(networks["clip"], small)).max() < 1e-5


def test_clip_score_prefers_the_true_caption_bundled(bundled):
    chosen, images = drawn(32)
    captions = np.array([s.caption for s in chosen])
    texts, truncated = backbones.embed_captions(bundled["clip"], captions.tolist())
    pictures = backbones.embed_images(bundled["clip"], images)
    assert truncated == []
    for k in range(len(images)):
        wrong = captions != captions[k]
        others = scores.clip_score(np.repeat(pictures[k:k + 1], wrong.sum(), 0), texts[wrong])
        true = scores.clip_score(pictures[k:k + 1], texts[k:k + 1])[0]
        assert gets_worse("clip_score", [true, others.mean()])


def test_clip_score_falls_with_noise_bundled(bundled):
    chosen, images = drawn(32)
    texts, _ = backbones.embed_captions(bundled["clip"], [s.caption for s in chosen])
    values = [scores.clip_score(backbones.embed_images(bundled["clip"], noisy(images, level)), texts).mean()
              for level in (0, 0.2, 0.8)]
    assert gets_worse("clip_score", values)


# ---------------------------------------------------------------- FID

def gaussian(n, d, seed=0):
    rng = np.random.RandomState(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def exact(n, mean, std, seed=0):
    """Return n rows whose sample mean and (diagonal) sample covariance are the given ones up to rounding."""
    x = np.random.RandomState(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T).reshape(len(mean), -1))).T
    return x * std + mean


@pytest.mark.parametrize(("n", "d"), [(20, 64), (200, 16)])
def test_fid_of_equal_sets_is_zero(n, d):
    x = gaussian(n, d)
    shuffled = x[np.random.RandomState(1).permutation(n)]
    assert 0 <= scores.fid(x, scores.Reference(shuffled)).value < 1e-8 * np.trace(np.cov(x.T))


@pytest.mark.parametrize("n", [6, 300])
@pytest.mark.parametrize(("means", "stds"), [
    (([1.0], [4.0]), ([2.0], [0.5])),
    (([0.0, 1, 2, 3], [1.0, 1, 0, -1]), ([1.0, 2, 3, 4], [4.0, 0.1, 3, 1])),
])
def test_fid_equals_the_closed_form_for_diagonal_gaussians(n, means, stds):
    mean, other = map(np.array, means)
    std, wide = map(np.array, stds)
    expected = np.sum((mean - other) ** 2) + np.sum((std - wide) ** 2)
    distance = scores.fid(exact(n, mean, std), scores.Reference(exact(n + 1, other, wide, seed=1)))
    assert distance.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 300), (300, 400)])
def test_fid_equals_that_of_torchmetrics(n, m):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(torch.nn.Module):  # the features of an image are its pixels
        num_features = 48

        def forward(self, images):
            return images.flatten(1).double()

    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (n, 3, 4, 4)).astype(np.uint8)
    others = (rng.randint(0, 256, (m, 3, 4, 4)) * rng.uniform(0.3, 1, (m, 1, 1, 1))).astype(np.uint8)
    judge = FrechetInceptionDistance(feature=Pixels())
    judge.update(torch.from_numpy(images), real=False)
    judge.update(torch.from_numpy(others), real=True)
    ours = scores.fid(images.reshape(n, -1).astype(np.float64), scores.Reference(others.reshape(m, -1))).value
    assert ours == pytest.approx(judge.compute().item(), rel=1e-4)
    assert ours > 100


def test_fid_through_the_network_equals_that_of_torchmetrics(networks):
    from torchmetrics.image.fid import FrechetInceptionDistance

    _, images = drawn(80)
    others = noisy(images, 0.2)
    judge = FrechetInceptionDistance(feature=networks["features"])
    judge.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=True)
    judge.update(torch.from_numpy(others).permute(0, 3, 1, 2), real=False)
    rows = [backbones.image_features(networks["features"], x) for x in (others, images)]
    assert rows[0].dtype == np.float32
    assert rows[0].shape == (80, 64)
    assert scores.fid(rows[0], scores.Reference(rows[1])).value == pytest.approx(judge.compute().item(), rel=1e-4)


def fid_by_noise(network):
    _, images = drawn(48)
    reference = scores.Reference(backbones.image_features(network, images))
    return [scores.fid(backbones.image_features(network, noisy(images, level)), reference).value
            for level in (0, 0.05, 0.15, 0.4)]


def test_fid_rises_with_noise(networks):
    values = fid_by_noise(networks["features"])
    assert values[0] < 1e-8 * values[1]
    assert gets_worse("fid", values)


def test_fid_rises_with_noise_bundled(bundled):
    values = fid_by_noise(bundled["features"])
    assert values[0] < 1e-8 * values[1]
    assert gets_worse("fid", values)


def test_fid_of_unseen_scenes_is_far_below_that_of_noisy_scenes_bundled(bundled):
    reference, same, spoilt = (backbones.image_features(bundled["features"], images) for images in (
        drawn(192)[1], drawn(192, first=192)[1], noisy(drawn(192, first=192)[1], 0.1)))
    reference = scores.Reference(reference)
    assert 10 * scores.fid(same, reference).value < scores.fid(spoilt, reference).value


@pytest.mark.parametrize("sizes", [(1, 20), (20, 1)])
def test_fid_of_a_single_image_is_nan(sizes):
    features, reference = (gaussian(n, 4) for n in sizes)
    assert np.isnan(scores.fid(features, scores.Reference(reference)).value)


def test_the_features_network_gets_signed_pixels_at_its_training_size(networks, weights):
    plain = train.make_features().eval()
    plain.load_state_dict(load_file(str(weights / "squeezenet.safetensors")))
    _, images = drawn(3)
    large = np.stack([np.asarray(Image.fromarray(image).resize((128, 128))) for image in images])
    resized = torch.nn.functional.interpolate(signed(large), (64, 64), mode="bilinear", antialias=True)
    for given, seen in ((images, signed(images)), (large, resized)):
        with torch.no_grad():
            assert np.abs(backbones.image_features(networks["features"], given) - plain(seen).numpy()).max() < 1e-5


def test_features_do_not_depend_on_the_batch_size(networks):
    _, images = drawn(5)
    together, apart = (backbones.image_features(networks["features"], images, size) for size in (5, 2))
    assert np.abs(together - apart).max() < 1e-5
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_inception_features_equal_those_of_torchmetrics_and_come_from_the_hub_cache(tmp_path, monkeypatch):
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
    network = backbones.load_backbone("standard", "features", "cpu")
    assert backbones.backbone_files("standard", "features") == [path]
    judge = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    judge.use_antialias = False  # the only way of torchmetrics before 1.8
    _, images = drawn(2)
    with torch.no_grad():
        expected = judge(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    features = backbones.image_features(network, images)
    assert features.shape == (2, 2048)
    assert features == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-4


# ---------------------------------------------------------------- kernel distances

def test_kid_through_the_network_equals_that_of_torchmetrics(networks):
    from torchmetrics.image.kid import KernelInceptionDistance

    _, images = drawn(60)
    others = noisy(images, 0.2)
    judge = KernelInceptionDistance(feature=networks["features"], subsets=1, subset_size=60)
    judge.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=True)
    judge.update(torch.from_numpy(others).permute(0, 3, 1, 2), real=False)
    features, reference = (backbones.image_features(networks["features"], x) for x in (others, images))
    ours = scores.kid(features, scores.Reference(reference))
    assert ours.value == pytest.approx(1000 * judge.compute()[0].item(), rel=1e-4)


def test_kernel_distances_equal_their_sums_over_all_pairs():
    x, y = gaussian(7, 3), gaussian(9, 3, seed=1)
    kernels = {scores.kid: lambda a, b: (a @ b / 3 + 1) ** 3,
               scores.cmmd: lambda a, b: np.exp(-np.sum((a - b) ** 2) / (2 * 10 ** 2))}
    for distance, kernel in kernels.items():
        within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
        between = np.mean([kernel(a, b) for a in x for b in y])
        assert distance(x, scores.Reference(y)).value == pytest.approx(1000 * (sum(within) - 2 * between), rel=1e-9)


@pytest.mark.parametrize("distance", [scores.kid, scores.cmmd, scores.fid])
@pytest.mark.parametrize("rows", [1, 7, 30])
def test_distances_of_sets_do_not_depend_on_the_block_size(distance, rows, monkeypatch):
    x, reference = gaussian(30, 5), gaussian(50, 5, seed=1)
    whole = distance(x, scores.Reference(reference))
    monkeypatch.setattr(scores, "BLOCK_ROWS", rows)
    parts = distance(x, scores.Reference(reference))
    assert (parts.value, *(parts.interval or ())) == pytest.approx((whole.value, *(whole.interval or ())), rel=1e-12)


@pytest.mark.parametrize("distance", [scores.kid, scores.cmmd, scores.fid])
def test_distances_of_sets_need_no_memory_for_pairs_of_images_and_no_copy_of_the_features(distance, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK_ROWS", 64)

    def peak(count):
        """The most bytes that numpy holds at a time beside the features of two sets of `count` images."""
        x, y = (gaussian(count, 256, seed=seed).astype(np.float32) for seed in (0, 1))
        tracemalloc.start()
        distance(x, scores.Reference(y))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # imports
    few, many = peak(400), peak(1600)
    assert many - few < 1200 * 256 * 4 / 2  # half of the further features of one set; all pairs take 20 MB


@pytest.mark.parametrize("distance", [scores.kid, scores.cmmd])
def test_kernel_distances_of_few_images_are_unbiased_and_their_intervals_cover(distance):
    """Both sets come from one distribution, so the true distance is 0. FID would be far from 0."""
    rng, found = np.random.RandomState(0), []
    for _ in range(300):
        found.append(distance(rng.normal(size=(12, 6)), scores.Reference(rng.normal(size=(40, 6)))))
    values = np.array([d.value for d in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert values.min() < 0
    assert np.mean([low <= 0 <= high for low, high in (d.interval for d in found)]) >= 0.9
    near, far = (distance(rng.normal(size=(30, 6)), scores.Reference(shift + rng.normal(size=(40, 6))))
                 for shift in (0, 1))
    assert near.interval[1] < far.interval[0]


def test_a_jackknife_interval_is_as_wide_as_the_scatter_of_the_estimate():
    rng = np.random.RandomState(0)
    pairs = [(rng.normal(size=(40, 4)) + 0.5, rng.normal(size=(60, 4))) for _ in range(200)]
    found = [scores.kid(features, scores.Reference(reference)) for features, reference in pairs]
    scatter = np.std([d.value for d in found])
    widths = [(d.interval[1] - d.interval[0]) / (2 * 2.02) for d in found]
    assert np.median(widths) == pytest.approx(scatter, rel=0.25)


@pytest.mark.parametrize("distance", [scores.kid, scores.cmmd])
def test_kernel_distances_of_too_few_images_have_no_value_or_no_interval(distance):
    assert np.isnan(distance(gaussian(1, 4), scores.Reference(gaussian(20, 4))).value)
    assert distance(gaussian(4, 4), scores.Reference(gaussian(20, 4))).interval is None


# ---------------------------------------------------------------- SSIM and PSNR

def ssim_by_definition(image, other):
    """Return SSIM by Wang et al., 2004, eq. 13 to 16: moments of an 11 x 11 window around each pixel, two passes."""
    g = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(g, g) / g.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = []
    for channel in range(3):
        x, y = (np.lib.stride_tricks.sliding_window_view(np.pad(a[:, :, channel].astype(float), 5, mode="reflect"),
                                                         (11, 11)) for a in (image, other))
        mean_x, mean_y = (np.sum(weights * a, axis=(2, 3)) for a in (x, y))
        from_x, from_y = x - mean_x[:, :, None, None], y - mean_y[:, :, None, None]
        variances = np.sum(weights * (from_x ** 2 + from_y ** 2), axis=(2, 3))
        covariance = np.sum(weights * from_x * from_y, axis=(2, 3))
        similarity.append((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                          / ((mean_x ** 2 + mean_y ** 2 + c1) * (variances + c2)))
    return np.mean(similarity)


def image_pairs():
    """Return {kind: a pair of stacks of images}."""
    rng = np.random.RandomState(0)
    noise = rng.randint(0, 256, (3, 20, 33, 3)).astype(np.uint8)
    flat = np.full((3, 33, 20, 3), 250, np.uint8) - np.array([0, 100, 240], np.uint8)[:, None, None, None]
    _, scene = drawn(3)
    return {"unrelated": (noise, noise[[1, 2, 0]]), "noise": (noise, noisy(noise, 0.1)),
            "flat": (flat, flat + np.uint8(1)), "flat, faint noise": (flat, noisy(flat, 0.005)),
            "scenes": (scene, scene[[1, 2, 0]]), "scenes, noise": (scene, noisy(scene, 0.1))}


@pytest.mark.parametrize("kind", image_pairs())
def test_ssim_and_psnr_equal_their_definitions(kind):
    images, others = image_pairs()[kind]
    values = scores.ssim(images, others)
    assert values.dtype == np.float64
    assert values == pytest.approx([ssim_by_definition(*pair) for pair in zip(images, others)], abs=1e-10)
    squares = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(images, others)]
    assert scores.psnr(images, others) == pytest.approx(10 * np.log10(255 ** 2 / np.array(squares)), rel=1e-12)


@pytest.mark.parametrize("kind", image_pairs())
def test_ssim_and_psnr_equal_those_of_torchmetrics_on_whole_stacks(kind):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images, others = image_pairs()[kind]
    pair = [torch.from_numpy(x.copy()).permute(0, 3, 1, 2).double() for x in (images, others)]
    expected = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none").numpy()
    assert scores.ssim(images, others) == pytest.approx(expected, abs=1e-10)
    on_device = [scores._ssim_by_torch(*pair, device="cpu") for pair in zip(images, others)]
    assert on_device == pytest.approx(expected, abs=1e-10)
    expected = peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3)).numpy()
    assert scores.psnr(images, others) == pytest.approx(expected, rel=1e-6)  # its logarithm of 10 is float32


@pytest.mark.parametrize("rows", [1, 3, 7, 19])
def test_ssim_does_not_depend_on_the_block_size(rows, monkeypatch):
    (image, *_), (other, *_) = image_pairs()["noise"]
    height, width = image.shape[:2]
    monkeypatch.setattr(scores, "STRIP_PIXELS", height * width)
    whole = scores._ssim_by_torch(image, other, device="cpu")
    monkeypatch.setattr(scores, "STRIP_PIXELS", rows * width)
    assert scores._ssim_by_torch(image, other, device="cpu") == pytest.approx(whole, rel=1e-12)


def test_equal_images_have_ssim_1_and_infinite_psnr():
    _, images = drawn(2)
    assert scores.ssim(images, images) == pytest.approx(np.ones(2), abs=1e-12)
    assert np.all(scores.psnr(images, images) == np.inf)


def test_ssim_and_psnr_get_worse_with_noise():
    _, images = drawn(2)
    for metric, score in (("ssim_dense", scores.ssim), ("psnr_dense", scores.psnr)):
        values = np.array([score(noisy(images, level), images) for level in (0.02, 0.1, 0.4)])
        assert all(gets_worse(metric, image) for image in values.T)


def test_devices_without_float64_get_the_values_of_the_cpu():
    images, others = image_pairs()["noise"]
    for score in (scores.ssim, scores.psnr):
        assert np.array_equal(score(images, others, "mps"), score(images, others))


def test_ssim_refuses_images_smaller_than_half_its_window():
    images = np.zeros((1, 5, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="6 x 6"):
        scores.ssim(images, images)
    assert scores.ssim(np.zeros((1, 6, 6, 3), np.uint8), np.zeros((1, 6, 6, 3), np.uint8)) == pytest.approx(1)


# ---------------------------------------------------------------- what a point records

def test_an_interval_of_a_difference_is_paired_with_dense():
    """Images whose values differ widely and that all lose 2 have surely lost 2."""
    dense = {"clip_score": list(np.random.RandomState(0).normal(80, 10, size=20))}
    lost = np.array(dense["clip_score"]) - 2 + np.random.RandomState(1).normal(0, 0.1, size=20)
    means, per_image, intervals = scores.summarise({"clip_score": lost}, np.ones(20, bool), dense)
    low, high = intervals["clip_score"]
    assert -2.2 < low < -2 < high < -1.8
    assert means["clip_score"] == pytest.approx(np.mean(per_image["clip_score"]))


def test_a_set_with_an_image_that_is_not_finite_has_no_mean_and_no_interval():
    finite = np.array([True] * 6 + [False])
    values = {"lpips_dense": np.arange(7.0), "kid": scores.Distance(1.0, (0.0, 2.0)), "generation_time": 0.5}
    means, per_image, intervals = scores.summarise(values, finite, None)
    assert np.isnan([means["lpips_dense"], means["kid"], per_image["lpips_dense"][-1]]).all()
    assert means["generation_time"] == 0.5
    assert intervals == {"lpips_dense": None, "kid": None}


def test_a_new_metric_is_summarised_by_its_entry_alone(monkeypatch):
    entries = {
        "contrast": Metric("contrast", better="higher", per_image=True, relative="1 - value", interval="value"),
        "change": Metric("change", better="lower", per_image=True, against="dense", interval="difference"),
        "spread": Metric("spread of the set", better="higher", per_image=False, against="reference", relative=""),
        "energy": Metric("joules", better="lower", per_image=False, cost=True)}
    for name, entry in entries.items():
        monkeypatch.setitem(METRICS, name, entry)
    per_image = np.random.RandomState(0).normal(5, 1, 12)
    values = {"contrast": per_image, "change": per_image, "spread": 3.0, "energy": 7.0}
    means, each, intervals = scores.summarise(values, np.ones(12, bool), {"change": list(per_image - 1)}, seeds=2)
    assert means == {"contrast": per_image.mean(), "change": per_image.mean(), "spread": 3.0, "energy": 7.0}
    assert set(each) == set(intervals) == {"contrast", "change"}
    assert intervals["contrast"][0] < per_image.mean() < intervals["contrast"][1]
    assert intervals["change"] == pytest.approx((1, 1))
    means, _, _ = scores.summarise(values, np.arange(12) > 0, {"change": list(per_image)}, seeds=2)
    assert np.isnan([means["contrast"], means["change"], means["spread"]]).all()
    assert means["energy"] == 7.0


# ---------------------------------------------------------------- LPIPS

def lpips_by_noise(network):
    _, images = drawn(6)
    return np.array([scores.lpips(network, noisy(images, level), images) for level in (0, 0.05, 0.15, 0.4)])


def test_lpips_is_zero_for_equal_images_and_rises_with_noise(networks):
    values = lpips_by_noise(networks["lpips"])
    assert values.shape == (4, 6)
    assert np.all(values[0] == 0)
    for metric in ("lpips", "lpips_dense"):
        assert all(gets_worse(metric, image) for image in values.T)


def test_lpips_is_zero_for_equal_images_and_rises_with_noise_bundled(bundled):
    values = lpips_by_noise(bundled["lpips"])
    assert np.all(values[0] == 0)
    assert all(gets_worse("lpips", image) for image in values.T)


def test_bundled_lpips_equals_its_formula_on_the_layers_of_the_classifier(networks, weights):
    plain = train.make_features().eval()
    plain.load_state_dict(load_file(str(weights / "squeezenet.safetensors")))
    _, images = drawn(4)
    others = images[[1, 2, 3, 0]]

    def layers(x):  # the seven layers of SqueezeNet 1.1 that lpips uses
        outputs = []
        for layer in plain.features:
            x = layer(x)
            outputs.append(x.clone())  # some layers work in place
        return [outputs[k] / outputs[k].norm(dim=1, keepdim=True) for k in (1, 4, 7, 9, 10, 11, 12)]

    with torch.no_grad():
        pairs = list(zip(layers(signed(images)), layers(signed(others))))
        expected = sum(1 - (a * b).sum(1).mean((1, 2)) for a, b in pairs) / 7
    values = scores.lpips(networks["lpips"], images, others)
    assert values.dtype == np.float64
    assert values == pytest.approx(expected.numpy(), rel=1e-4)
    assert np.all((values > 0) & (values < 1))
    assert scores.lpips(networks["lpips"], others, images) == pytest.approx(values, rel=1e-5)
    assert scores.lpips(networks["lpips"], images, others, batch_size=3) == pytest.approx(values, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # the package itself warns when the test calls it
def test_standard_lpips_equals_the_package_with_its_heads_over_the_cached_alexnet(tmp_path, monkeypatch):
    from lpips import LPIPS
    from torchvision.models import alexnet

    with torch.device("meta"):
        shapes = {k: v.shape for k, v in alexnet().state_dict().items()}
    torch.manual_seed(0)
    state = {k: torch.randn(shape) * 0.05 if k.startswith("features") else torch.zeros(1).expand(shape)
             for k, shape in shapes.items()}  # LPIPS does not use the classifier; expanded zeros take no space
    path = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, str(path))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = backbones.load_backbone("standard", "lpips", "cpu")
    assert backbones.backbone_files("standard", "lpips") == [path]
    _, images = drawn(4)
    others = noisy(images, 0.1)
    judge = LPIPS(net="alex", verbose=False)
    with torch.no_grad():
        expected = torch.cat([judge(a[None], b[None]).flatten() for a, b in zip(signed(images), signed(others))])
    assert scores.lpips(network, images, others) == pytest.approx(expected.numpy(), rel=1e-4)
    assert np.all(scores.lpips(network, images, images) == 0)
    assert expected.min() > 0


# ---------------------------------------------------------------- costs

class Linear(torch.nn.Module):
    """A denoiser of one linear layer, which remembers the modes it was called in."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 64, bias=False)
        self.modes = []

    def forward(self, sample):
        self.modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return SimpleNamespace(sample=self.layer(sample))


def test_the_costs_of_a_linear_layer_are_its_known_numbers():
    denoiser, call = Linear(), {"sample": torch.zeros(4, 16, 32)}
    with torch.no_grad():
        denoiser.layer.weight[:8] = 0
    weights = 32 * 64
    assert costs.count_parameters(denoiser) == {
        "parameters": weights, "nonzero_parameters": weights - 8 * 32, "weight_bytes": 4 * weights}
    assert costs.count_macs(denoiser, call) == 16 * weights  # of one latent, zeros included
    assert costs.peak_bytes(denoiser, call) == 4 * weights + 4 * (4 * 16 * 64)  # the weights and the output


def test_every_call_of_a_denoiser_runs_in_one_mode_without_gradients():
    denoiser, call = Linear(), {"sample": torch.zeros(1, 16, 32)}
    costs.count_macs(denoiser, call)
    costs.peak_bytes(denoiser, call)
    costs.denoiser_seconds([denoiser], call, rounds=2, place=lambda denoiser: None)
    assert denoiser.modes == [(False, False)] * 6


def test_denoisers_are_timed_in_turn_and_each_is_placed_and_warmed_up_first():
    events = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __call__(self, sample):
            events.append(f"call {self.name}")

    denoisers = [Recorder("a"), Recorder("b")]
    seconds = costs.denoiser_seconds(denoisers, {"sample": torch.zeros(1)}, rounds=2)
    assert events == ["call a", "call b"] * 2
    assert len(seconds) == 2
    assert min(seconds) > 0
    events.clear()
    costs.denoiser_seconds(denoisers, {"sample": torch.zeros(1)}, rounds=1,
                           place=lambda denoiser: events.append(f"place {denoiser.name}"))
    assert events == ["place a", "call a", "call a", "place b", "call b", "call b"]


def test_a_ratio_of_times_is_measured_longer_where_the_rounds_disagree(monkeypatch):
    rng, rounds = np.random.RandomState(0), []

    def seconds(denoisers, call, count, place=None):
        rounds.append(count)
        dense = 0.1 * np.exp(busy * rng.rand(count))  # a busy machine slows both calls of a round
        return np.stack([dense, 0.5 * dense * np.exp(noise * rng.randn(count))], axis=1)

    monkeypatch.setattr(costs, "call_seconds", seconds)
    for busy, noise, expected in ((1.0, 0.001, [6]), (0.0, 0.2, [6, 3, 3, 3, 3, 3, 3])):
        rounds.clear()
        dense, ratio, (low, high) = costs.time_ratio(None, [None], {})
        assert rounds == expected
        assert low <= ratio <= high
        assert (ratio, high - low < 0.01) == (pytest.approx(0.5, rel=0.3 * noise + 0.01), noise < 0.1)
        assert dense == 0.1 or busy
    rounds.clear()
    costs.time_ratio(None, [None], {}, limit=11 * 0.15)  # a round takes about 0.15 seconds
    assert rounds == [6, 3, 3]

"""Methods that zero weights by what calibration says: wanda, sparsegpt, patterns, re-fit, allocation, recovery."""
from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from test_calibration import One
from test_plots import make_record
from test_reconstruct import Idle, Net, Twice, calibration, calls_of, fresh_error, samples, total, zeros_of
from torch import nn

from pruning import UserError, cli, methods, pruning_analysis
from pruning.methods import moments, probes, prune, recovery, refit, sparsegpt, wanda, weights
from pruning.methods.calibration import Calibration
from pruning.methods.options import SCOPES, check_together, pattern_of
from pruning.models import pipelines
from pruning.records.record import record_path, write_record
from pruning.records.summaries import ends_of_sensitivity

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CALIBRATED = {
    "reconstruct": ("reconstruct", {}),
    "wanda": ("wanda", {}),
    "wanda, all options": ("wanda", {"scope": "layer", "refit": True, "allocation": "guided"}),
    "wanda, global": ("wanda", {"scope": "global", "refit": True}),
    "sparsegpt": ("sparsegpt", {"step_weights": "early"}),
    "sparsegpt, guided": ("sparsegpt", {"allocation": "guided"}),
    "magnitude, re-fit": ("magnitude", {"refit": True}),
    "magnitude, guided": ("magnitude", {"scope": "row", "allocation": "guided"}),
}
EACH = pytest.mark.parametrize(("method", "options"), CALIBRATED.values(), ids=CALIBRATED)


class Chain(nn.Module):
    """A convolution and a linear, whose rows have 27 and 12 weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 6)

    def forward(self, sample):
        return (self.linear(self.conv(sample).movedim(1, -1)),)


def pruned(model, method, rate, known=None, **options):
    """The model, pruned."""
    prune(method, model, rate, calibration=known or calibration(model), **options)
    return model


def lowest(scores, count):
    """A mask of the lowest scores along the last dimension."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argsort(-1)[..., :count], True)


# ---- every method

@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rate_is_met_to_the_weight_and_the_rest_is_finite(method, options, dtype):
    for rate in (0.05, 0.777):
        model = Net().to(dtype)
        report = prune(method, model, rate, calibration=calibration(model, 3), **options)
        size = sum(layer.weight.numel() for layer in moments.prunable_layers(model).values())
        assert report.taken == report.asked == round(rate * size) == total(zeros_of(model))
        assert all(torch.isfinite(each).all() and each.dtype == dtype for each in model.parameters())
        assert report.skipped_modules == {}
        for name, mask in zeros_of(model).items():
            assert report.layers[name].rate == pytest.approx(float(mask.float().mean()))
            assert report.layers[name].error >= 0 or (method, options) == ("wanda", {})


@EACH
def test_weights_that_are_zero_already_are_part_of_the_rate(method, options):
    for rate in (0.05, 0.3, 0.9):
        model = Net()
        with torch.no_grad():
            model.first.weight[:30] = 0
            model.leave.weight[0, 0] = 0
        had = total(zeros_of(model))
        report = prune(method, model, rate, calibration=calibration(model, 3), **options)
        assert report.taken == max(report.asked, had)


@EACH
def test_rate_0_changes_nothing(method, options):
    model = Net()
    report = prune(method, model, 0.0, calibration=Calibration(lambda: pytest.fail("recorded"), 0), **options)
    assert (report.asked, report.taken) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Net().parameters()))


@EACH
def test_only_the_weights_of_linear_and_conv_change(method, options):
    model, before = pruned(Net(), method, 0.5, **options), dict(Net().named_parameters())
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert changed == set(zeros_of(model))
    assert all(each.requires_grad and each.grad is None for each in model.parameters())


@EACH
def test_a_constant_input_gives_a_finite_result(method, options):
    calls = calls_of(Net(), [torch.ones(4, 3, 8, 8)] * 3)
    model = pruned(Net(), method, 0.6, Calibration(lambda: calls, 0), **options)
    assert all(torch.isfinite(each).all() for each in model.parameters())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "reconstruct", "magnitude"])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_pruned(method):
    model, known = Net(), calibration(Net())
    options = {"refit": True} if method == "magnitude" else {}
    with torch.no_grad():
        model.leave.weight[1, 2] = float("nan")
    with pytest.raises(UserError, match="leave.weight|not finite"):
        prune(method, model, 0.5, calibration=known, **options)
    assert total(zeros_of(model)) == 0


@EACH
def test_a_method_that_calibrates_refuses_to_prune_without(method, options):
    with pytest.raises(UserError, match="give a calibration"):
        prune(method, Net(), 0.5, **options)


# ---- wanda

def wanda_scores(model, known):
    """|w| times the root mean square of its input, of each weight, (rows, d)."""
    x = torch.cat([given["sample"] for given, _ in known.calls])
    with torch.no_grad():
        patches = nn.functional.unfold(x, 3, padding=1).movedim(1, -1).flatten(0, -2)
        inputs = {"conv.weight": patches, "linear.weight": model.conv(x).movedim(1, -1).flatten(0, -2)}
    return {name: layer.weight.detach().flatten(1).abs() * inputs[name].square().mean(0).sqrt()
            for name, layer in moments.prunable_layers(model).items()}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", [{}, {"refit": True}], ids=str)
def test_wanda_zeroes_the_lowest_weight_times_input_root_mean_square_in_its_scope(scope, options):
    model, dense = Chain(), Chain()
    known = calibration(dense, 3)
    scores = wanda_scores(dense, known)
    pruned(model, "wanda", 1 / 3, known, scope=scope, **options)
    if scope == "global":
        expected = lowest(torch.cat([each.flatten() for each in scores.values()]), 132)
        expected = dict(zip(scores, expected.split([324, 72])))
    else:
        scores = scores if scope == "row" else {name: each.flatten() for name, each in scores.items()}
        expected = {name: lowest(each, each.shape[-1] // 3) for name, each in scores.items()}
    for name, mask in zeros_of(model).items():
        assert torch.equal(mask.flatten(), expected[name].flatten()), name
    others = [(~mask, getattr(model, name[:-7]).weight, getattr(dense, name[:-7]).weight)
              for name, mask in zeros_of(model).items()]
    assert all(torch.equal(one[stays], other[stays]) != bool(options) for stays, one, other in others)


def test_wanda_compares_within_each_row_unless_told_otherwise():
    known = calibration(Chain(), 3)
    default, row = (zeros_of(pruned(Chain(), "wanda", 0.4, known, **given)) for given in ({}, {"scope": "row"}))
    assert all(torch.equal(mask, row[name]) for name, mask in default.items())


def test_wanda_of_a_grouped_convolution_takes_each_groups_own_inputs():
    torch.manual_seed(0)
    model = One(nn.Conv2d(4, 6, 1, groups=2, bias=False))
    scales = torch.tensor([1.0, 50.0, 50.0, 1.0]).view(4, 1, 1)
    calls = calls_of(model, [sample * scales for sample in samples(1, 3, (4, 4, 5, 5))])
    known, x = Calibration(lambda: calls, 0), torch.cat([given["sample"] for given, _ in calls])
    rms = x.square().mean((0, 2, 3)).sqrt()
    scores = model.layer.weight.detach().flatten(1).abs() * rms.view(2, 2).repeat_interleave(3, 0)
    assert torch.equal(zeros_of(pruned(model, "wanda", 0.5, known))["layer.weight"].flatten(1), lowest(scores, 1))


def test_a_layer_that_is_called_twice_counts_both_inputs():
    model = Twice()
    known = calibration(model, 4, (5, 12))
    x = torch.cat([given["sample"] for given, _ in known.calls])
    with torch.no_grad():
        scores = model.both.weight.abs() * torch.cat([x, model.both(x).relu()]).square().mean(0).sqrt()
    assert torch.equal(zeros_of(pruned(model, "wanda", 0.5, known))["both.weight"], lowest(scores, 6))


# ---- sparsegpt

def plain_obs(dense, matrix, count, block, pattern=None):
    """Optimal brain surgery, column by column and row by row, with a fresh inverse for each column, in float64."""
    weight, matrix, zeros = dense.double().clone(), matrix.double(), torch.zeros_like(dense, dtype=torch.bool)
    d = dense.shape[1]
    inverses = [torch.linalg.inv(matrix[column:, column:]) for column in range(d)]
    diagonal = torch.stack([inverse[0, 0] for inverse in inverses])
    stay, every = pattern or (0, block)
    for column in range(d):
        if column % every == 0:
            end = min(column + every, d)
            scores = weight[:, column:end].square() / diagonal[column:end]
            if pattern:
                zeros[:, column:end] = lowest(scores, every - stay)
            else:
                share = round(count * end / d) - round(count * column / d)
                zeros[:, column:end] = lowest(scores.flatten(), share).view_as(scores)
        for row in range(len(weight)):
            if zeros[row, column]:
                error = weight[row, column].item() / inverses[column][0, 0]
                weight[row, column:] -= error * inverses[column][0]
    return weight.masked_fill(zeros, 0), zeros


def correlated(rows, d, groups=1):
    torch.manual_seed(0)
    x = torch.randn(groups, 200, d) @ torch.randn(groups, d, d)
    return torch.randn(rows, d), x.transpose(1, 2) @ x / 200


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
@pytest.mark.parametrize("block", [8, 16, 128])
def test_corrected_columns_are_those_of_plain_optimal_brain_surgery(block, pattern, monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK", block)
    dense, matrix = correlated(5, 24)
    matrix = refit.damped(matrix)[0]
    weight, zeros = sparsegpt.correct_columns(dense, matrix, 70, pattern)
    expected, mask = plain_obs(dense, matrix, 70, block, pattern and pattern_of(pattern))
    assert torch.equal(zeros, mask)
    assert int(zeros.sum()) == (60 if pattern else 70)
    assert torch.allclose(weight.double(), expected, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.Linear(24, 5), nn.Conv2d(4, 5, (3, 2)), nn.Conv2d(8, 6, (3, 2), groups=2)],
                         ids=["linear", "conv", "groups"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_layer_is_corrected_with_the_places_of_a_kernel_before_its_channels(layer, pattern, monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK", 8)
    groups, channels = getattr(layer, "groups", 1), layer.weight.shape[1]
    with torch.no_grad():
        layer.weight.copy_(correlated(len(layer.weight), 24)[0].view_as(layer.weight))
    _, matrix = correlated(1, 24, groups)
    weight, zeros = sparsegpt.solve_layer(layer, matrix, 60, pattern)
    order = [channel * (24 // channels) + place for place in range(24 // channels) for channel in range(channels)]
    rows = layer.weight.detach().view(groups, -1, 24)[..., order]
    for group in range(groups):
        damped = refit.damped(matrix)[group][order][:, order]
        expected, mask = plain_obs(rows[group], damped, 60 // groups, 8, pattern and (2, 4))
        assert torch.equal(zeros.view(groups, -1, 24)[group][:, order], mask)
        assert torch.allclose(weight.view(groups, -1, 24)[group][:, order].double(), expected, atol=1e-4)


def test_corrected_columns_lose_less_than_the_same_zeros_without_correction():
    dense, matrix = correlated(20, 48)
    weight, zeros = sparsegpt.correct_columns(dense, refit.damped(matrix)[0], 480)
    corrected, zeroed = (refit.output_error(dense[None], each[None], matrix) for each in (weight, dense * ~zeros))
    assert corrected < 0.85 * zeroed


def test_moments_that_float32_cannot_factor_are_factored_in_float64():
    vectors = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double())[0]
    matrix = (vectors * torch.logspace(0, -9, 20).double()) @ vectors.T
    factor = sparsegpt.inverse_factor(matrix)
    assert torch.isfinite(factor).all()
    with pytest.raises(UserError, match="cannot be inverted; calibrate on more images"):
        sparsegpt.inverse_factor(-torch.eye(3))


# ---- patterns

@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize(("method", "options"), [
    ("magnitude", {}), ("magnitude", {"refit": True}), ("wanda", {}), ("wanda", {"refit": True, "scope": "layer"}),
    ("sparsegpt", {}), ("reconstruct", {}), ("wanda", {"recovery_steps": 2})], ids=str)
def test_a_pattern_leaves_exactly_n_of_every_m_input_channels_at_each_place_of_a_kernel(method, options, pattern):
    model, (stay, every) = Net(), pattern_of(pattern)
    report = prune(method, model, 0.5, calibration=calibration(model), pattern=pattern, **options)
    for name, layer in moments.prunable_layers(model).items():
        if name == "enter.weight":  # of 3 input channels
            assert layer.weight.all()
        else:
            blocks = layer.weight.flatten(2) if layer.weight.dim() > 2 else layer.weight[..., None]
            blocks = blocks.unflatten(1, (-1, every))  # (rows, blocks, m, places)
            assert ((blocks != 0).sum(2) == stay).all(), name
    assert report.skipped_modules == {"enter.weight": f"3 input channels are no multiple of {every}"}
    assert report.taken == report.asked - model.enter.weight.numel() // 2
    if method != "reconstruct" and "recovery_steps" not in options:
        assert torch.equal(model.enter.weight, Net().enter.weight)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "reconstruct"])
def test_a_layer_that_cannot_have_a_pattern_keeps_the_zeros_that_it_has(method):
    model = Net().half()
    with torch.no_grad():
        model.enter.weight[3] = 0
    pruned(model, method, 0.5, pattern="2:4")
    assert torch.equal((model.enter.weight == 0).flatten(1).sum(1), 27 * (torch.arange(16) == 3))


def test_a_pattern_takes_the_lowest_scores_of_each_group():
    model, dense = pruned(Net(), "magnitude", 0.5, pattern="2:4"), Net()
    blocks = dense.middle.weight.detach().abs().view(16, 2, 4, 9)
    assert torch.equal(model.middle.weight.view(16, 2, 4, 9) == 0, lowest(blocks.movedim(2, -1), 2).movedim(-1, 2))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "reconstruct"])
def test_a_denoiser_none_of_whose_layers_can_have_a_pattern_is_refused(method):
    model = One(nn.Conv2d(6, 4, 3))
    before = model.layer.weight.detach().clone()
    with pytest.raises(UserError, match="no layer of One has input channels in multiples of 4, .* without --pattern"):
        prune(method, model, 0.5, calibration=calibration(model, 2, (2, 6, 8, 8)), pattern="2:4")
    assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize(("method", "rate", "options", "message"), [
    ("reconstruct", 0.6, {"pattern": "2:4"}, "zeroes exactly 0.5 of the weights; give that rate alone"),
    ("sparsegpt", 0.25, {"pattern": "4:8"}, "zeroes exactly 0.5 of the weights; give that rate alone"),
    ("wanda", 0.5, {"pattern": "2:4", "allocation": "guided"}, "leave out --allocation guided and --scope global"),
    ("sparsegpt", 0.5, {"pattern": "2:4", "allocation": "guided"}, "leave out --allocation guided"),
    ("magnitude", 0.5, {"pattern": "2:4", "scope": "global"}, "leave out .*--scope global"),
    ("wanda", 0.5, {"allocation": "guided", "scope": "global"}, "both decide what each layer loses"),
])
def test_options_that_exclude_each_other_or_the_rate_are_refused_before_anything_is_pruned(
        method, rate, options, message):
    model = Net()
    with pytest.raises(UserError, match=message):
        prune(method, model, rate, calibration=Calibration(lambda: pytest.fail("recorded"), 0), **options)
    assert total(zeros_of(model)) == 0


def test_a_pattern_takes_rate_0_too():
    model = pruned(Net(), "wanda", 0.0, pattern="2:4")
    assert total(zeros_of(model)) == 0
    check_together({"pattern": "2:4"}, [0.0, 0.5])


# ---- re-fit, allocation and recovery of methods that zero weights

@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_refit_keeps_the_zeros_and_brings_the_outputs_nearer(method):
    known = calibration(Net())
    plain, fitted = (pruned(Net(), method, 0.6, known, refit=on) for on in (False, True))
    for (name, mask), (_, other) in zip(zeros_of(plain).items(), zeros_of(fitted).items()):
        assert torch.equal(mask, other), name
    assert fresh_error(fitted, Net()) < 0.9 * fresh_error(plain, Net())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_guided_allocation_differs_from_a_uniform_one_and_brings_the_outputs_nearer(method):
    known = calibration(Net())
    uniform, guided = (pruned(Net(), method, 0.6, known, allocation=each) for each in ("uniform", "guided"))
    shares = [[float(mask.float().mean()) for mask in zeros_of(model).values()] for model in (uniform, guided)]
    assert max(shares[0]) - min(shares[0]) < 0.02
    assert max(shares[1]) - min(shares[1]) > 0.2
    assert fresh_error(guided, Net()) < 0.9 * fresh_error(uniform, Net())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "reconstruct"])
def test_recovery_holds_the_zeros_and_lowers_the_loss(method, monkeypatch):
    monkeypatch.setattr(recovery, "LEARNING_RATE", 2e-3)  # few steps must suffice here
    monkeypatch.setattr(recovery, "WARMUP_STEPS", 1)
    known, losses = calibration(Net()), []
    models = [pruned(Net(), method, 0.7, known, recovery_steps=steps) for steps in (0, 8)]
    for model in models:
        with torch.no_grad():
            losses.append(sum(float(recovery.distillation_loss(model, *call)) for call in known.calls))
    assert losses[1] < 0.9 * losses[0]
    for (name, mask), (_, other) in zip(*(zeros_of(model).items() for model in models)):
        assert torch.equal(mask, other), name
    assert not torch.equal(models[0].leave.bias, models[1].leave.bias)  # all parameters learn


def test_the_error_that_is_reported_is_that_of_the_layer_before_recovery():
    model, known = Net(), calibration(Net())
    report = prune("wanda", model, 0.5, calibration=known, refit=True)
    gathered = moments.gather(Net(), known)
    for name, layer in moments.prunable_layers(Net()).items():
        dense, after = moments.as_rows(layer).detach(), moments.as_rows(model.get_submodule(name[:-7])).detach()
        expected = refit.output_error(dense, after, gathered.of(name, "cpu")[0])
        assert report.layers[name].error == pytest.approx(expected, rel=1e-4)


# ---- sensitivity

def test_sensitivity_times_error_predicts_what_pruning_the_last_layer_alone_does(monkeypatch):
    monkeypatch.setattr(probes, "PROBES", 60)  # so that chance hardly matters
    model, known = Net(), calibration(Net(), 8)
    rates, survey = methods.survey("wanda", model, known)
    at = rates.index(weights.REFERENCE_RATE)
    predicted = survey.sensitivities["leave.weight"] * survey.curves["leave.weight"][1 + at]
    solve = wanda.solver(model, moments.gather(model, known), known, scope="row", refit=False)
    weight, _ = next(solve("leave.weight", model.leave, [round(0.7 * model.leave.weight.numel())]))
    with torch.no_grad():
        model.leave.weight.copy_(weight)
    calls = calls_of(model, samples(1, 8))
    change = sum((one - other).square().mean() for (_, one), (_, other) in zip(calls, known.calls))
    assert predicted == pytest.approx(float(change / sum(y.square().mean() for _, y in known.calls)), rel=0.25)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "reconstruct"])
def test_a_survey_has_an_error_for_each_layer_and_rate_that_rises_from_0(method):
    model = Idle()
    rates, survey = methods.survey(method, model, calibration(model))
    assert set(survey.curves) == set(survey.sensitivities) == set(zeros_of(model))
    for name, curve in survey.curves.items():
        assert len(curve) == 1 + len(rates)
        assert curve[0] == 0
        assert curve[1] < curve[-1] if name != "idle.weight" else not any(curve)
    assert survey.sensitivities["idle.weight"] == 0
    assert survey.sensitivities["second.weight"] < min(survey.sensitivities[n] for n in ("middle.weight",
                                                                                         "leave.weight"))
    assert total(zeros_of(model)) == 0


QUICK = ["--sensitivity", "--num_images", "2", "--steps", "2", "--device", "cpu", "--calibration_images", "1"]


def test_the_command_writes_the_sensitivity_of_each_layer_and_no_image(tmp_path, capsys):
    record = make_record("magnitude", scope="global", calibration_images=1)
    write_record(record, record_path(tmp_path, "shapes-unet", "shapes", record.variant))
    pruning_analysis.main([*QUICK, "--results_dir", str(tmp_path), "--method", "magnitude", "--scope", "global",
                           "--verbose"])
    folder, name = tmp_path / "shapes-unet" / "shapes", "magnitude+scope=global+calibration_images=1_sensitivity"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        f"{name}.json", f"{name}.png", f"{name}.svg", f"{name}.txt", f"{record.variant}.json", "report.html",
        "results.csv"}
    assert "if this layer alone is pruned" in (folder / "report.html").read_text(encoding="utf-8")
    found = json.loads((folder / f"{name}.json").read_text())
    layers = moments.prunable_layers(pipelines.load_pipeline("shapes-unet").unet)
    assert list(found["layers"]) == list(layers)
    for each in found["layers"].values():
        assert len(each["error"]) == len(each["change"]) == len(found["rates"])
        assert each["change"] == [each["sensitivity"] * error for error in each["error"]]
    assert 0.5 < sum(each["parameters"] for each in found["layers"].values()) <= 1
    Image.open(folder / f"{name}.png").verify()
    text, out = (folder / f"{name}.txt").read_text(), capsys.readouterr().out
    assert text.strip() in out
    assert "conv_in.weight" in text or "conv_out.weight" in text
    most = max(found["layers"], key=lambda layer: found["layers"][layer]["change"][found["rates"].index(0.7)])
    assert f"depends most on {most}, " in " ".join(ends_of_sensitivity(found).split())
    assert out.strip().endswith(f"{name}.json")


def test_the_sensitivity_under_a_pattern_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: pruning_analysis.main([*QUICK, "--results_dir", str(tmp_path), "--pattern", "2:4"]))
    assert stop.value.code == 2
    assert "leave out --pattern" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["structured", "iterative"])
def test_the_sensitivity_of_a_method_that_does_not_prune_layer_by_layer_is_refused(method, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: pruning_analysis.main([*QUICK[:-2], "--results_dir", str(tmp_path), "--method", method]))
    assert stop.value.code == 2
    assert "by layer: magnitude, reconstruct, wanda, sparsegpt" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

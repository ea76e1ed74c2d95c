"""Methods that remove units by loss and re-fit what is behind them, on tiny random models of the real classes."""
from __future__ import annotations

import copy
import itertools

import pytest
import torch
from test_surgery import FAMILIES, METHODS, RATES, assert_equal_outputs, build, call_of, groups, parameters

from pruning import data
from pruning.methods import greedy, prune, refit, sequential, units
from pruning.methods.calibration import Calibration, answer, keep_once
from pruning.models import generation, pipelines


def calibration(model, count=6, **settings):
    """Recorded calls of the model with different latents, texts and times."""
    calls = []
    for seed in range(count):
        arguments = call_of(model, seed=seed + 10)
        with torch.no_grad():
            calls.append((arguments, answer(model, arguments)))
    return Calibration(lambda: calls, seed=0, **settings)


def error_on(model, calls):
    """The squared error of the outputs on calls, relative to the recorded outputs."""
    with torch.no_grad():
        pairs = [(answer(model, arguments), output) for arguments, output in calls]
    return float(sum((one - other).square().sum() for one, other in pairs) / sum(o.square().sum() for _, o in pairs))


def pruned(dense, method, rate, known=None, **options):
    model = copy.deepcopy(dense)
    prune(method, model, rate, calibration=known or calibration(dense), **options)
    return model


# ---- the order

def exact_loss(layer, gone):
    """The relative loss if the units `gone` go and the rest takes over, by a solve of its own."""
    damped = layer.moments + greedy.DAMPING * layer.moments.diagonal().mean() * torch.eye(len(layer.moments))
    drop = [layer.first + unit * layer.size + place for unit in gone for place in range(layer.size)]
    keep = [place for place in range(len(damped)) if place not in drop]
    weight = torch.zeros_like(layer.weight)
    if keep:
        weight[:, keep] = torch.linalg.solve(damped[keep][:, keep], (layer.weight @ damped)[:, keep].T).T
    change = weight - layer.weight
    return float(((change @ damped) * change).sum() / ((layer.weight @ layer.moments) * layer.weight).sum())


def columns(size, units_, first=0, after=0, rows=5):
    inputs = first + units_ * size + after
    x = torch.randn(4 * inputs, inputs) * torch.rand(inputs)
    return greedy.Columns(torch.randn(rows, inputs), x.T @ x / len(x), first, size)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("pending", [1, 4, 128])
@pytest.mark.parametrize(("count", "norm_groups", "layers"), [
    (6, 1, [dict(size=1)]), (6, 2, [dict(size=1, first=2, after=3)]), (4, 1, [dict(size=3)]),
    (4, 2, [dict(size=9, first=1)]), (5, 1, [dict(size=2), dict(size=2, rows=3)])])
def test_each_time_the_unit_of_least_loss_goes_and_the_loss_is_that_of_an_exact_solve(
        double, monkeypatch, pending, count, norm_groups, layers):
    monkeypatch.setattr(greedy, "PENDING", pending)
    layers = [columns(units_=count, **each) for each in layers]
    weights = [1.0, 3.0][:len(layers)]
    taken, losses = greedy.order(layers, count, norm_groups, weights)
    gone = []
    for step in range(count):
        of_group = [sum(unit // (count // norm_groups) == group for unit in gone) for group in range(norm_groups)]
        allowed = [unit for unit in range(count) if unit not in gone
                   and of_group[unit // (count // norm_groups)] == min(of_group)]
        now = {unit: [exact_loss(each, gone + [unit]) for each in layers] for unit in allowed}
        best = min(now, key=lambda unit: sum(weight * loss for weight, loss in zip(weights, now[unit])))
        assert taken[step] == best
        assert losses[step] == pytest.approx([min(loss, 1.0) for loss in now[best]], rel=1e-6)
        gone.append(best)


def test_the_order_is_near_the_best_of_all_subsets(double):
    layer = columns(size=1, units_=8)
    taken, losses = greedy.order([layer], 8)
    for count in range(1, 8):
        best = min(exact_loss(layer, gone) for gone in itertools.combinations(range(8), count))
        assert best <= losses[count - 1][0] * (1 + 1e-9)
        assert losses[count - 1][0] <= 2 * best


# ---- every family

@FAMILIES
@METHODS
@RATES
def test_removed_equals_masked_after_the_refit_too(family, method, rate):
    dense = build(family)
    known = calibration(dense)
    total = sum(group.units for group in groups(dense, method))
    removed, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    done = prune(method, removed, rate, calibration=known)
    assert done == prune(method, masked, rate, calibration=known, mask_only=True)
    assert done.taken == done.asked == round(rate * total)
    assert_equal_outputs(removed, masked)
    assert parameters(removed) < parameters(dense) == parameters(masked)


@FAMILIES
@METHODS
def test_the_refit_lowers_the_error_of_every_family(family, method):
    dense = build(family)
    known = calibration(dense)
    for rate in (0.3, 0.6):
        refitted, plain = (error_on(pruned(dense, method, rate, known, refit=on), known.calls)
                           for on in (True, False))
        assert refitted <= plain


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_the_refit_of_columns_equals_an_exact_solve_for_each_row(gated, with_bias, double):
    places, width, rows, prior, keep = 300, 12, 5, 0.1, torch.tensor([0, 2, 3, 7, 11])
    torch.manual_seed(0)
    x, z = (torch.randn(places, width) @ torch.randn(width, width) + 2 for _ in range(2))
    dense, x = torch.randn(rows, width), x[:, keep]
    gate = torch.randn(places // 20, rows).repeat_interleave(20, 0) + 0.5
    y = torch.randn(places, rows)
    weight, bias = refit.refit_columns(dense, keep, x, y, z.T @ z / places, z.mean(0), with_bias, prior,
                                       gate if gated else None)
    damping = float(refit.add_damping(x.T @ x / places + prior * (z.T @ z / places)[keep][:, keep]))
    for row in range(rows):
        g = gate[:, row] if gated else torch.ones(places)
        size = g.square().mean().sqrt() * places ** 0.5
        one = torch.full((places, int(with_bias)), 1.0)
        near = torch.eye(len(keep), len(keep) + int(with_bias))
        left = torch.cat([torch.cat([x, one], 1) * g[:, None] / size,
                          torch.cat([z[:, keep], one], 1) * (prior / places) ** 0.5, near * damping ** 0.5])
        right = torch.cat([y[:, row] / size, z @ dense[row] * (prior / places) ** 0.5,
                           dense[row, keep] * damping ** 0.5])
        exact = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        close = 1e-4 if gated else 1e-9  # conjugate gradients end early
        assert torch.allclose(weight[row], exact[:len(keep)], rtol=0, atol=close)
        assert torch.allclose(bias[row], exact[len(keep)] if with_bias else torch.zeros(()), rtol=0, atol=close)


# ---- on the bundled models, on calls that no method has seen

def learning(model):
    """A bundled denoiser, a calibration, and calls that are not in it."""
    pipeline = pipelines.load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    captions = data.training_captions("shapes", 24, 0)
    drawn = [data.Sample(f"drawn-{i}", caption, None) for i, caption in enumerate(captions)]
    sampling = dict(seed=0, steps=8, guidance_scale=4.0, image_size=64, batch_size=8)
    calls = generation.record_calls(pipeline, drawn, keep_once(), **sampling)
    known = Calibration(lambda: calls[:16], 0, guidance_scale=4.0, first_batch=8)
    return pipelines.take_denoiser(pipeline), known, calls[16:]


@pytest.fixture(scope="module")
def unet():
    """The bundled UNet and such calls."""
    return learning("shapes-unet")


@pytest.fixture(scope="module")
def mmdit():
    """The bundled transformer and such calls, and the error on the others with half of its heads gone."""
    dense, known, fresh = learning("shapes-mmdit")
    return dense, known, fresh, error_on(pruned(dense, "attention_heads", 0.5, known), fresh)


FAULTS = {
    "order by norm": lambda patch: dict(criterion="norm"),
    "no re-fit": lambda patch: dict(refit=False),
    "dense instead of residual targets": lambda patch: patch.setattr(sequential, "RESIDUALS", {}),
}


@pytest.mark.parametrize(("method", "fault"), [
    *(("structured", fault) for fault in FAULTS), ("attention_heads", "no re-fit")])
def test_each_part_of_the_method_lowers_the_error(unet, monkeypatch, method, fault):
    dense, known, fresh = unet
    monkeypatch.setattr(units, "CALLS", 4)
    monkeypatch.setattr(units, "LATENTS", 32)
    whole = error_on(pruned(dense, method, 0.6, known), fresh)
    options = FAULTS[fault](monkeypatch) or {}
    faulty = error_on(pruned(dense, method, 0.6, known, **options), fresh)
    assert whole < 0.97 * faulty


GATED_FAULTS = {
    "dense instead of residual targets": lambda patch: patch.setattr(sequential, "RESIDUALS", {}),
    "gates ignored": lambda patch: patch.setattr(sequential, "RESIDUALS", {
        block: {path: stream._replace(gate=None) for path, stream in rows.items()}
        for block, rows in sequential.RESIDUALS.items()}),
    "other layers left as they are": lambda patch: patch.setattr(units, "gated_layers", lambda *_: {}),
}


@pytest.mark.parametrize("fault", GATED_FAULTS)
def test_gated_streams_and_layers_that_help_lower_the_error(mmdit, monkeypatch, fault):
    dense, known, fresh, whole = mmdit
    GATED_FAULTS[fault](monkeypatch)
    assert whole < 0.97 * error_on(pruned(dense, "attention_heads", 0.5, known), fresh)

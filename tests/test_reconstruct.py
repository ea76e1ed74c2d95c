"""Calibrated weights: moments are those of layer inputs, the re-fit is exact, and the allocation meets the rate."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning import UserError
from pruning.methods import moments, probes, prune, reconstruct, refit
from pruning.methods.calibration import Calibration


class Small(nn.Module):
    """A convolution and two linears; the second linear hardly matters to the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 40), nn.Linear(40, 8)
        with torch.no_grad():
            self.second.weight.mul_(0.01)

    def forward(self, sample):
        """(batch, 3, 6, 6) -> a tuple of (batch, 6, 6, 8)."""
        x = self.conv(sample).permute(0, 2, 3, 1)
        return (x + self.second(self.first(x).relu()),)


def calibration(model, batches=4):
    """Calls of the model on random samples."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(batches)]
    with torch.no_grad():
        calls = [({"sample": sample}, model(sample)[0]) for sample in samples]
    return Calibration(lambda: calls, seed=0)


def exact(dense, kept, matrix):
    """The re-fitted rows, each by a solve of its own in float64."""
    found = torch.zeros_like(dense, dtype=torch.float64)
    for group, row in torch.cartesian_prod(*map(torch.arange, dense.shape[:2])).tolist():
        stays = kept[group, row].nonzero()[:, 0]
        right = dense[group, row].double() @ matrix[group].double()
        found[group, row, stays] = torch.linalg.solve(matrix[group].double()[stays][:, stays], right[stays])
    return found


def test_the_refit_equals_an_exact_solve_for_each_row():
    torch.manual_seed(0)
    inputs = torch.randn(2, 300, 20) @ torch.randn(2, 20, 20)
    matrix, dense = inputs.transpose(1, 2) @ inputs / 300, torch.randn(2, 7, 20)
    kept = torch.rand(dense.shape) < 0.4
    weight = refit.least_squares(dense, kept, matrix, iterations=60)
    assert torch.allclose(weight.double(), exact(dense, kept, refit.damped(matrix)), atol=1e-4)
    assert (weight[~kept] == 0).all()
    few = refit.output_error(dense, refit.least_squares(dense, kept, matrix), matrix)
    assert few <= 1.01 * refit.output_error(dense, weight, matrix)
    assert few < 0.9 * refit.output_error(dense, dense * kept, matrix)  # it is better than zeroing alone


def test_a_layer_whose_inputs_never_vary_is_damped_and_no_error():
    dense, kept = torch.randn(1, 3, 5), torch.rand(1, 3, 5) < 0.5
    for matrix in (torch.zeros(1, 5, 5), torch.ones(1, 5, 5)):
        assert torch.isfinite(refit.least_squares(dense, kept, matrix)).all()


@pytest.mark.parametrize("conv", [nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3),
                                  nn.Conv2d(4, 4, (3, 1), padding="same", dilation=2, groups=4)])
def test_the_rows_of_a_convolution_times_its_weight_are_its_output(conv):
    x = torch.randn(2, conv.in_channels, 9, 7)
    rows = moments.input_rows(conv, x, torch.Generator(), rows=10 ** 6)
    expected = conv(x) - conv.bias[:, None, None]
    found = (rows @ moments.as_rows(conv).transpose(1, 2)).transpose(0, 1)
    found = found.reshape(2, *expected.shape[2:], -1).permute(0, 3, 1, 2)
    assert torch.allclose(found, expected, atol=1e-5)


def test_moments_are_the_mean_of_outer_products_of_inputs():
    model = Small()
    calls = calibration(model).calls
    found = moments.input_moments(model, calls, moments.prunable_layers(model), seed=0)
    x = torch.cat([model.conv(arguments["sample"]).permute(0, 2, 3, 1).flatten(0, -2) for arguments, _ in calls])
    assert torch.allclose(found["first.weight"][0], x.T @ x / len(x), atol=1e-4)


def test_probes_agree_with_the_change_that_they_predict():
    """For a change of the last layer, the output changes by exactly the layer's change."""
    model = Small()
    calls, layers = calibration(model, 60).calls, {"second.weight": model.second}
    change = torch.randn_like(model.second.weight)
    found = probes.sensitivities(model, calls, None, layers, {"second.weight": change}, seed=0)["second.weight"]
    deltas = [nn.functional.linear(model.first(model.conv(arguments["sample"]).permute(0, 2, 3, 1)).relu(), change)
              for arguments, _ in calls]
    expected = torch.stack([delta.square().sum() for delta in deltas]).mean().item()
    assert found == pytest.approx(expected, rel=0.3)  # 240 random probes


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8, 0.95])
def test_the_rate_is_met_to_the_weight_and_spares_the_layers_that_matter(rate):
    model = Small()
    total = sum(layer.weight.numel() for layer in (model.conv, model.first, model.second))
    pruned = prune("reconstruct", model, rate, calibration=calibration(model))
    assert pruned.taken == pruned.asked == round(rate * total)
    shares = [float((layer.weight == 0).float().mean()) for layer in (model.conv, model.second)]
    assert shares[0] < shares[1]


def test_the_outputs_are_nearer_to_the_dense_ones_than_after_magnitude_pruning():
    model = Small()
    known = calibration(model)
    errors = {}
    for method in ("magnitude", "reconstruct"):
        other = Small()
        prune(method, other, 0.5, calibration=known)
        with torch.no_grad():
            errors[method] = sum((other(**arguments)[0] - target).square().mean() for arguments, target in known.calls)
    assert errors["reconstruct"] < 0.5 * errors["magnitude"]


def test_rate_0_changes_nothing_and_asks_for_no_calls():
    model, before = Small(), Small()
    prune("reconstruct", model, 0.0, calibration=Calibration(lambda: pytest.fail("recorded"), seed=0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


def test_a_survey_is_made_once_for_all_rates(monkeypatch):
    made = []
    survey = reconstruct.survey_layers
    monkeypatch.setattr(reconstruct, "survey_layers", lambda *args: made.append(1) or survey(*args))
    known = calibration(Small())
    for rate in (0.3, 0.6):
        prune("reconstruct", Small(), rate, calibration=known)
    assert made == [1]


def test_calls_that_are_missing_or_not_finite_are_an_error():
    with pytest.raises(UserError, match="recorded calls"):
        prune("reconstruct", Small(), 0.5)
    broken = Small()
    with torch.no_grad():
        broken.conv.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        prune("reconstruct", broken, 0.5, calibration=calibration(broken))

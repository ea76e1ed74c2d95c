"""Reconstruct: the re-fit is exact, every step brings the outputs nearer, and the rate is met to the weight."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruning import UserError
from pruning.methods import allocation, moments, probes, prune, reconstruct, refit, sequential, weights, zeroing
from pruning.methods.calibration import Calibration


class Net(nn.Module):
    """Two convolutions and three linears: the first has 3 input channels, the second groups, the fourth little say."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2)
        self.first, self.second, self.leave = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.second.weight.mul_(0.05)

    def forward(self, sample):
        """(batch, 3, 8, 8) -> a tuple of (batch, 4, 4, 5)."""
        x = self.middle(self.enter(sample).relu()).movedim(1, -1)
        return (self.leave((x + self.second(self.first(x).relu())).relu()),)


class Idle(Net):
    """With a layer that is never called, and that holds half of the weights."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(64, 64)


class Twice(nn.Module):
    """A layer that is called twice, then another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.leave = nn.Linear(12, 12), nn.Linear(12, 7)

    def forward(self, sample):
        return (self.leave(self.both(self.both(sample).relu()).relu()),)


def samples(seed, count, shape=(4, 3, 8, 8)):
    """Random inputs, normally distributed and correlated over the channels (the second dimension)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(9))
    return [torch.einsum("dc,bc...->bd...", mix, torch.randn(shape, generator=generator)) for _ in range(count)]


def calls_of(model, inputs):
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return [({"sample": sample.to(dtype)}, model(sample.to(dtype))[0]) for sample in inputs]


def calibration(model, count=6, shape=(4, 3, 8, 8), **settings):
    """Calls of the model on random samples."""
    calls = calls_of(model, samples(1, count, shape))
    return Calibration(lambda: calls, seed=0, **settings)


def fresh_error(model, dense):
    """The squared error of the outputs, relative to the dense ones, on inputs that no method has seen."""
    pairs = [(one[1], other[1]) for one, other in zip(*(calls_of(m, samples(2, 4)) for m in (model, dense)))]
    return float(sum((one - other).square().sum() for one, other in pairs) / sum(o.square().sum() for _, o in pairs))


def zeros_of(model):
    return {name: layer.weight == 0 for name, layer in moments.prunable_layers(model).items()}


def total(zeros):
    return sum(int(mask.sum()) for mask in zeros.values())


# ---- the re-fit of a layer

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


def test_rows_that_are_solved_block_by_block_are_those_solved_together(monkeypatch):
    torch.manual_seed(0)
    inputs, dense = torch.randn(2, 90, 20), torch.randn(2, 7, 20)
    matrix, kept = inputs.transpose(1, 2) @ inputs / 90, torch.rand(2, 7, 20) < 0.4
    together = refit.least_squares(dense, kept, matrix)
    monkeypatch.setattr(refit, "BLOCK", 3 * 2 * 20)
    assert torch.allclose(refit.least_squares(dense, kept, matrix), together, atol=1e-6)


def test_a_layer_whose_inputs_never_vary_is_damped_and_no_error():
    dense, kept = torch.randn(1, 3, 5), torch.rand(1, 3, 5) < 0.5
    for matrix in (torch.zeros(1, 5, 5), torch.ones(1, 5, 5)):
        assert torch.isfinite(refit.least_squares(dense, kept, matrix)).all()


def test_the_error_of_an_output_is_the_share_of_its_energy_that_is_lost_and_rows_may_have_weights():
    torch.manual_seed(0)
    x, dense, weight = torch.randn(1, 200, 6), torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    matrix, rows = x.transpose(1, 2) @ x / 200, torch.tensor([[1.0, 0.0, 3.0, 2.0]])
    lost, whole = ((x @ (weight - dense).transpose(1, 2)).square(), (x @ dense.transpose(1, 2)).square())
    assert refit.output_error(dense, weight, matrix) == pytest.approx(float(lost.sum() / whole.sum()), rel=1e-4)
    weighted = float((lost * rows).sum() / (whole * rows).sum())
    assert refit.output_error(dense, weight, matrix, rows) == pytest.approx(weighted, rel=1e-4)


# ---- what the output feels

class Scaled(nn.Module):
    """A layer whose outputs are multiplied by numbers of their own."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), torch.tensor([1.0, 2.0, 0.5])

    def forward(self, sample):
        return (self.layer(sample) * self.scale,)


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_the_energy_of_a_row_is_the_squared_gradient_of_the_guided_output_at_it(guidance):
    model = Scaled()
    calls = calibration(model, 5, (6, 4)).calls
    found = probes.row_energies(model, calls, guidance, moments.prunable_layers(model), seed=0)["layer.weight"]
    halves = 1.0 if guidance is None else (1 - guidance) ** 2 + guidance ** 2
    assert torch.allclose(found, probes.PROBES * len(calls) * halves * model.scale.square() / 3)


def test_probes_agree_with_the_change_that_they_predict():
    """For a change of the last layer, the output changes by exactly the layer's change."""
    model = Net()
    calls, layers = calibration(model, 60).calls, {"leave.weight": model.leave}
    change = torch.randn_like(model.leave.weight)
    found = probes.sensitivities(model, calls, None, layers, {"leave.weight": change}, seed=0)["leave.weight"]
    inputs = []
    model.leave.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    calls_of(model, [arguments["sample"] for arguments, _ in calls])
    expected = torch.stack([nn.functional.linear(x, change).square().mean() for x in inputs]).mean().item()
    assert found == pytest.approx(expected, rel=0.3)  # 240 random probes


def test_probes_leave_gradients_and_flags_as_they_were():
    model = Net()
    model.first.weight.requires_grad_(False)
    known, layers = calibration(model), moments.prunable_layers(model)
    weights.row_energies(model, layers, known)
    probes.sensitivities(model, known.calls, None, layers, {name: layer.weight.detach() for name, layer in
                                                            layers.items()}, seed=0)
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["first.weight"]
    assert all(each.grad is None for each in model.parameters())


def test_more_of_the_probed_calls_are_from_the_first_half_of_sampling_unless_asked_otherwise():
    calls = [({"timestep": torch.tensor(time)}, torch.zeros(1)) for time in range(0, 1000, 10)]
    for lean, early in ((1.5, 5), (1.0, 4)):
        times = [moments.timestep(call) for call in probes.probed_calls(calls, lean=lean)]
        assert len(set(times)) == probes.CALLS
        assert (times[0], times[-1], sum(time >= 500 for time in times)) == (990, 0, early)
    assert [len(probes.probed_calls(calls[:few])) for few in range(1, 8)] == [1, 2, 3, 4, 5, 6, 7]


# ---- the score and the steps

def test_the_first_weights_to_go_have_the_least_w_squared_times_input_square_times_row_energy():
    model = Net()
    known = calibration(model)
    gathered, layers = moments.gather(model, known), moments.prunable_layers(model)
    energies, solve = weights.row_energies(model, layers, known), reconstruct.solver(model, gathered, known)
    for name, layer in layers.items():
        count = layer.weight.numel() // 20  # less than a step takes
        _, zeros = next(solve(name, layer, [count]))
        squares = gathered.of(name, "cpu")[0].diagonal(dim1=1, dim2=2)[:, None]
        score = moments.as_rows(layer).detach().square() * squares * energies[name].view(len(squares), -1, 1)
        expected = score.flatten().topk(count, largest=False).indices.sort().values
        assert torch.equal(zeros.flatten().nonzero()[:, 0], expected), name


def test_a_row_keeps_some_weights_unless_too_many_must_go():
    score = torch.arange(200.0).view(1, 2, 100) + 1
    for count, left in ((100, [2, 98]), (150, [2, 48]), (196, [2, 2]), (199, [0, 1])):
        mask = reconstruct.lowest(score, score, count)
        assert int(mask.sum()) == count
        assert (~mask).sum(-1).flatten().tolist() == left


def test_of_inputs_that_never_vary_the_small_weights_go_and_weights_that_are_gone_go_first():
    score, magnitude = torch.zeros(1, 1, 6), torch.tensor([[[3.0, 1.0, 2.0, 0.0, 0.5, 4.0]]])
    score[0, 0, 3:5] = torch.tensor([-1.0, 10.0])
    for count in range(6):
        mask = reconstruct.lowest(score, magnitude, count)
        assert magnitude[mask].sort().values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0][:count]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_steps_reach_each_count_and_never_turn_back(data):
    size = data.draw(st.integers(1, 5000))
    counts = sorted(data.draw(st.lists(st.integers(0, size), min_size=1, max_size=8)))
    taken = list(reconstruct.steps(counts, size, reconstruct.SHARE))
    assert [count for count, wanted in taken if wanted] == counts
    reached = [0, *(count for count, _ in taken)]
    assert reached == sorted(reached)
    for before, after in zip(reached, reached[1:]):  # one step takes a tenth of what is left, and a whole number
        assert after - before <= reconstruct.SHARE * (size - before) + 1 or after == size


def test_zeros_are_nested_and_as_many_as_asked():
    model = Net()
    known = calibration(model)
    solve = reconstruct.solver(model, moments.gather(model, known), known)
    for name, layer in moments.prunable_layers(model).items():
        counts = [round(rate * layer.weight.numel()) for rate in weights.CURVE]
        before = torch.zeros_like(layer.weight, dtype=torch.bool)
        for count, (weight, zeros) in zip(counts, solve(name, layer, counts)):
            assert int(zeros.sum()) == count
            assert (weight[zeros] == 0).all()
            assert zeros[before].all()
            before = zeros


def test_a_pattern_takes_one_weight_of_each_group_at_a_time_and_its_scores_know_the_refit():
    model = Net()
    known = calibration(model)
    energy = weights.row_energies(model, moments.prunable_layers(model), known)["first.weight"][:, None]
    gathered = moments.gather(model, known)
    matrix, _ = gathered.of("first.weight", "cpu")
    _, found = next(reconstruct.solver(model, gathered, known, pattern="2:4")("first.weight", model.first, [0]))
    dense = model.first.weight.detach()
    fitted, zeros = dense, torch.zeros_like(dense, dtype=torch.bool)
    for count in (1, 2):
        score = (fitted.square() * matrix[0].diagonal() * energy).masked_fill(zeros, -1).view(48, 4, 4)
        zeros = torch.zeros_like(score, dtype=torch.bool).scatter(2, score.argsort(2)[..., :count], True).view(48, 16)
        fitted = exact(dense[None], ~zeros[None], refit.damped(matrix))[0].float()
        if count == 1:
            at_once = torch.zeros_like(score, dtype=torch.bool).scatter(2, score.argsort(2)[..., :2], True).view(48, 16)
    assert float((found != zeros).float().mean()) < 0.005  # a few conjugate gradients stop before the exact solution
    assert float((at_once != zeros).float().mean()) > 0.02


# ---- the allocation

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_allocation_is_exact_in_sum_and_keeps_zeros_whatever_the_curves(data):
    names = "abcd"[:data.draw(st.integers(1, 4))]
    sizes = {name: data.draw(st.integers(1, 5000)) for name in names}
    zeros = {name: data.draw(st.one_of(st.just(0), st.integers(0, sizes[name]))) for name in names}
    curves = {name: data.draw(st.lists(st.floats(0, 2), min_size=3, max_size=3)) for name in names}
    sensitivities = {name: data.draw(st.one_of(st.just(0.0), st.floats(0, 1e6))) for name in names}
    rate = data.draw(st.floats(0, 0.999))
    counts = allocation.least_change(sizes, (0.0, 0.5, 0.9), curves, sensitivities, rate, zeros)
    assert sum(counts.values()) == max(round(rate * sum(sizes.values())), sum(zeros.values()))
    assert all(zeros[name] <= counts[name] <= sizes[name] for name in names)


def test_an_allocation_has_the_least_sum_of_sensitivity_and_error():
    sizes, knots = {"a": 1000, "b": 1000, "c": 500}, (0.0, 0.25, 0.5, 0.75)
    curves = {"a": [0, 0.01, 0.1, 0.4], "b": [0, 0.02, 0.2, 0.6], "c": [0, 0.001, 0.01, 0.1]}
    sensitivities = {"a": 1.0, "b": 0.2, "c": 3.0}

    def cost(rates):
        errors = []
        for name, rate in zip(sizes, rates):
            at, known = [*knots, 1.0], [math.log(max(error, 1e-9)) for error in [*curves[name], 1.0]]
            place = min(int(4 * rate), 3)
            share = 4 * (rate - at[place])
            errors.append(sensitivities[name] * math.exp(known[place] + share * (known[place + 1] - known[place])))
        return sum(errors)

    counts = allocation.least_change(sizes, knots, curves, sensitivities, 0.5, dict.fromkeys(sizes, 0))
    found = cost([counts[name] / sizes[name] for name in sizes])
    shares = [step / 50 for step in range(41)]  # at most the 0.8 that one layer may lose
    others = [cost((a, b, (1250 - 1000 * a - 1000 * b) / 500)) for a in shares for b in shares
              if 0 <= 1250 - 1000 * a - 1000 * b <= 400]
    assert len(others) > 100
    assert found <= 1.001 * min(others)


def test_layers_that_matter_less_lose_more_and_what_the_output_never_feels_no_more_than_asked():
    model = Net()
    shares = {name: float(mask.float().mean()) for name, mask in pruned(model, 0.5).items()}
    assert shares["second.weight"] > max(shares["enter.weight"], shares["middle.weight"], shares["leave.weight"]) + 0.1
    model = Idle()
    size = sum(mask.numel() for mask in zeros_of(model).values())
    for rate in (0.05, 0.4, 0.9):
        assert total(pruned(Idle(), rate)) == round(rate * size)


def pruned(model, rate):
    """The zeros of each layer after reconstruct."""
    prune("reconstruct", model, rate, calibration=calibration(model))
    return zeros_of(model)


# ---- every step counts

STEPS = {
    "score": lambda patch: patch.setattr(reconstruct, "lowest", at_random),
    "re-fit": lambda patch: patch.setattr(refit, "solve_rows", lambda start, kept, *others: start * kept),
    "allocation": lambda patch: patch.setattr(weights, "guided_counts", lambda denoiser, rate, *others:
                                              weights.uniform_counts(zeroing.prunable_weights(denoiser), rate)),
    "order": lambda patch: patch.setattr(sequential, "refit_in_order", lambda *args: None)}


def at_random(score, magnitude, count):
    order = torch.rand(score.shape, generator=torch.Generator().manual_seed(0)).masked_fill(score < 0, -1)
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order.flatten().topk(count, largest=False).indices] = True
    return mask.view(score.shape)


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_each_step_brings_the_outputs_on_fresh_inputs_nearer_to_the_dense_ones(rate, monkeypatch):
    names, errors = list(STEPS), []
    for done in range(len(names) + 1):
        with monkeypatch.context() as patch:
            for name in names[done:]:
                STEPS[name](patch)
            model = Net()
            prune("reconstruct", model, rate, calibration=calibration(model, 12, (16, 3, 8, 8)))
        errors.append(fresh_error(model, Net()))
    assert all(after < 0.95 * before for before, after in zip(errors, errors[1:])), dict(zip(["", *names], errors))


def test_the_outputs_are_nearer_to_the_dense_ones_than_after_magnitude_pruning():
    known, errors = calibration(Net()), {}
    for method in ("magnitude", "reconstruct"):
        model = Net()
        prune(method, model, 0.5, calibration=known)
        errors[method] = fresh_error(model, Net())
    assert errors["reconstruct"] < 0.2 * errors["magnitude"]


# ---- the re-fit in order

def in_order(model, known):
    layers = moments.prunable_layers(model)
    return layers, sequential.dense_outputs(model, layers, known), moments.gather(model, known)


def test_a_dense_denoiser_is_refitted_to_itself():
    model = Net()
    known = calibration(model)
    sequential.refit_in_order(model, *in_order(model, known), known)
    for one, other in zip(model.parameters(), Net().parameters()):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_layer_makes_up_for_what_the_layers_before_it_have_lost():
    model = Net()
    known = calibration(model)
    layers, aims, gathered = in_order(model, known)
    with torch.no_grad():
        model.enter.weight.mul_(0.5)
    spoiled = model.enter.weight.clone()
    del layers["enter.weight"]
    before = fresh_error(model, Net())
    sequential.refit_in_order(model, layers, aims, gathered, known)
    assert fresh_error(model, Net()) < 0.1 * before
    assert torch.equal(model.enter.weight, spoiled)


def test_zeros_stay_the_only_zeros_while_layers_are_refitted_in_order():
    model = Net().half()
    with torch.no_grad():
        model.second.weight.mul_(1e-4)  # so that some of the new values are zero in half precision
    known = calibration(model)
    parts = in_order(model, known)
    prune("magnitude", model, 0.4)
    before = zeros_of(model)
    sequential.refit_in_order(model, *parts, known)
    assert all(torch.equal(mask, before[name]) for name, mask in zeros_of(model).items())


def test_a_layer_that_is_called_twice_is_refitted_once_to_its_first_outputs():
    model = Twice()
    known = calibration(model, 4, (5, 12))
    layers, aims, _ = in_order(model, known)
    x = torch.cat([arguments["sample"] for arguments, _ in known.calls])
    with torch.no_grad():
        expected = x @ model.both.weight.T
    assert torch.allclose(aims.outputs["both.weight"][0], expected, atol=1e-4)
    pruned = prune("reconstruct", model, 0.5, calibration=known)
    assert pruned.taken == pruned.asked == round(0.5 * (144 + 84))


@pytest.mark.parametrize("memory", [5_000, 20_000, 10 ** 9])
def test_the_outputs_of_all_layers_together_fit_the_memory_of_the_calibration(memory):
    model = Net()
    aims = sequential.dense_outputs(model, moments.prunable_layers(model), calibration(model, memory=memory))
    sizes = [4 * output.numel() for output in aims.outputs.values()]
    assert len(sizes) == 5
    assert 0.5 * min(memory, 4 * 24 * (64 * 16 + 16 * 85)) < sum(sizes) <= memory


def call(size, time=3.0, **others):
    """A call for some latents, with a time for all of them and text states for each."""
    arguments = {"sample": torch.randn(size, 3, 2), "timestep": torch.tensor(time), "flag": True}
    return {**arguments, "kwargs": {"text": torch.randn(size, 4)}, **others}, torch.zeros(size, 3, 2)


def test_calls_of_another_batch_size_or_with_other_arguments_are_left_out():
    calls = [call(4), call(2), call(4), call(4, flag=False), call(4, extra=torch.ones(4)), call(4, 7.0)]
    arguments, count = sequential.one_batch(calls)
    chosen = [calls[0][0], calls[2][0], calls[5][0]]
    assert count == 12
    assert torch.equal(arguments["sample"], torch.cat([each["sample"] for each in chosen]))
    assert torch.equal(arguments["kwargs"]["text"], torch.cat([each["kwargs"]["text"] for each in chosen]))
    assert arguments["flag"] is True


def test_a_time_that_holds_for_a_call_becomes_one_a_latent():
    calls = [call(3, 5.0), call(3, 4.0), ({**call(3)[0], "timestep": torch.tensor([1.0])}, torch.zeros(3, 3, 2))]
    assert sequential.one_batch(calls[:2])[0]["timestep"].tolist() == [5, 5, 5, 4, 4, 4]
    arguments, count = sequential.one_batch(calls[2:])
    assert (arguments["timestep"].tolist(), count) == ([1, 1, 1], 3)


def test_tensors_without_a_row_a_latent_are_kept_as_they_are():
    places = torch.arange(10.0).view(5, 2)  # as the image ids of Flux
    calls = [call(4, ids=places), call(4, ids=places.clone()), call(4, ids=places + 1)]
    arguments, count = sequential.one_batch(calls)
    assert count == 8  # the call with other ids is left out
    assert torch.equal(arguments["ids"], places)


@pytest.mark.parametrize("others", [1, 4])
def test_a_table_with_as_many_rows_as_latents_is_told_by_a_call_for_another_number_of_latents(others):
    """As HunyuanDiT passes for few tokens. A call for as many latents tells nothing."""
    table = (torch.arange(8.0).view(4, 2), [torch.ones(4)])
    calls = [call(4, float(time), table=table) for time in range(2)]
    known = Calibration(lambda: calls, 0, first_batch=4, other=lambda: call(others, table=table)[0])
    arguments, count = sequential.one_batch(calls, rows=known.rows)
    assert (count, arguments["sample"].shape, arguments["kwargs"]["text"].shape) == (8, (8, 3, 2), (8, 4))
    assert torch.equal(arguments["table"][0], table[0]) == (others == 1)
    assert len(arguments["table"][1][0]) == (4 if others == 1 else 8)


def test_few_latents_are_taken_evenly_of_each_call_and_of_both_halves_of_a_guided_one():
    calls = [call(8, float(time)) for time in range(4)]
    arguments, count = sequential.one_batch(calls, 8)
    assert count == 8
    assert torch.equal(arguments["sample"], torch.cat([each["sample"][::4] for each, _ in calls]))
    assert arguments["timestep"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sequential.one_batch(calls, 1)[1] == 1


# ---- the whole method

@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_weights_that_are_zero_already_count_and_stay(rate):
    model = Net()
    with torch.no_grad():
        model.first.weight[:20] = 0  # whole rows, as masked neurons have
        for layer in moments.prunable_layers(model).values():
            layer.weight.view(-1)[7] = 0
    before = zeros_of(model)
    pruned = prune("reconstruct", model, rate, calibration=calibration(model))
    assert pruned.taken == max(pruned.asked, total(before))
    assert all(mask[before[name]].all() for name, mask in zeros_of(model).items())


def test_inputs_that_never_vary_give_a_finite_result():
    model = Net()
    calls = calls_of(model, [torch.ones(4, 3, 8, 8)] * 3)
    pruned = prune("reconstruct", model, 0.6, calibration=Calibration(lambda: calls, seed=0))
    assert pruned.taken == pruned.asked
    assert all(torch.isfinite(each).all() for each in model.parameters())
    assert all(math.isfinite(layer.error) for layer in pruned.layers.values())


def test_rate_0_changes_nothing_and_asks_for_no_calls():
    model, before = Net(), Net()
    pruned = prune("reconstruct", model, 0.0, calibration=Calibration(lambda: pytest.fail("recorded"), seed=0))
    assert (pruned.asked, pruned.taken) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


def test_a_survey_is_made_once_for_all_rates_and_for_all_runs_with_the_same_folder(monkeypatch, tmp_path):
    made, measure = [], probes.sensitivities
    monkeypatch.setattr(probes, "sensitivities", lambda *args: made.append(1) or measure(*args))
    for _ in range(2):
        known = calibration(Net(), folder=tmp_path)
        for rate in (0.3, 0.6):
            prune("reconstruct", Net(), rate, calibration=known)
    assert made == [1]


def test_the_same_calibration_gives_the_same_bits():
    one, other = Net(), Net()
    for model in (one, other):
        prune("reconstruct", model, 0.6, calibration=calibration(model))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_calls_that_are_missing_or_not_finite_are_an_error_and_nothing_is_pruned():
    model, broken = Net(), Net()
    with pytest.raises(UserError, match="recorded calls"):
        prune("reconstruct", model, 0.5)
    assert total(zeros_of(model)) == 0
    with torch.no_grad():
        broken.enter.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="gives NaN or infinity on the calibration captions; use --dtype float32"):
        prune("reconstruct", broken, 0.5, calibration=calibration(broken))

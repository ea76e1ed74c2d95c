"""Muon makes steps of matrices orthogonal, and trains all else as Adam does."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning.methods import muon


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (24, 24), (1, 7)])
def test_the_singular_values_of_a_step_are_near_one_and_its_directions_those_of_the_matrix(shape):
    torch.manual_seed(0)
    matrix = 1e-4 * torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ muon.orthogonal(matrix) @ right.T
    assert 0.6 < found.diagonal().min() <= found.diagonal().max() < 1.3
    assert (found - found.diagonal().diag()).abs().max() < 1e-4
    rounded = left.T @ muon.orthogonal(matrix.bfloat16()).float() @ right.T
    assert (rounded - found).abs().max() < 0.2


def test_no_gradient_gives_no_step():
    assert torch.equal(muon.orthogonal(torch.zeros(3, 8)), torch.zeros(3, 8))


def test_a_step_changes_outputs_as_much_whatever_the_sizes_of_a_layer_are():
    torch.manual_seed(0)
    for layer in (nn.Linear(16, 16), nn.Linear(256, 64), nn.Linear(64, 256), nn.Conv2d(32, 48, 3)):
        before = layer.weight.detach().clone()
        x = torch.randn(1000, before[0].numel())
        (layer.weight * torch.randn_like(before)).sum().backward()
        optimizer = muon.Muon([layer.weight])
        optimizer.step()
        change = x @ (layer.weight - before).detach().flatten(1).T
        most = muon.MATRIX_RATE * (min(before.flatten(1).shape) / len(before)) ** 0.5
        expected = most * max(1, len(before) / before[0].numel()) ** 0.5
        assert change.square().mean().sqrt() == pytest.approx(expected, rel=0.2)


def test_vectors_are_trained_as_by_adam():
    torch.manual_seed(0)
    own = nn.Parameter(torch.randn(9))
    other = nn.Parameter(own.detach().clone())
    optimizers = [muon.Muon([own]), torch.optim.Adam([other], muon.VECTOR_RATE, muon.BETAS, muon.EPSILON)]
    for _ in range(5):
        gradient = torch.randn(9)
        for vector, optimizer in zip((own, other), optimizers):
            vector.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(own, other, atol=1e-7)


def test_what_is_held_is_what_is_reckoned():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(5, 4))
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer = muon.Muon(model.parameters())
    optimizer.step()
    held = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    assert muon.held_bytes(model) == sum(each.numel() * each.element_size() for each in held)

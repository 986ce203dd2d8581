"""The invertible linear layer: what its weight can be, and what it refuses."""

import pytest
import torch
from torch import nn

from recollect.invertible import Linear


@pytest.mark.parametrize(("sizes", "found"), [((4, 3), "in_features=4, out_features=3"), ((0, 2), "in_features=0")])
def test_fewer_outputs_than_inputs(sizes, found):
    with pytest.raises(ValueError, match=rf"at least as many outputs as inputs \(got {found}"):
        Linear(*sizes)


def test_the_log_determinant_needs_a_batch():
    layer = Linear(3, 3)
    x = torch.randn(3)
    torch.testing.assert_close(layer.inverse(layer(x)), x)
    with pytest.raises(ValueError, match=r"needs a batch dimension: .* \(got \[3\]\)"):
        layer.forward_and_log_det(x)


def test_parameters_are_those_that_the_parametrisation_needs():
    def names(**options):
        return {name: tuple(p.shape) for name, p in Linear(3, 3, **options).named_parameters()}

    assert names() == {"bias": (3,), "matrices.skew": (1, 3, 3)}
    assert names(scaled=True) == {"bias": (3,), "matrices.log_scale": (1, 3), "matrices.skew": (1, 3, 3)}
    assert names(parametrization="lu", bias=False) == {"matrices.packed": (1, 3, 3)}
    assert names(parametrization=None) == {"weight": (3, 3), "bias": (3,)}


def test_without_parametrisation_it_takes_torchs_weights():
    plain, layer = nn.Linear(3, 3), Linear(3, 3, parametrization=None)
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["_extra_state"]
    assert missing.unexpected_keys == []
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_an_orthogonal_weight_keeps_lengths_and_its_determinant(size):
    torch.manual_seed(0)
    signs = set()
    for _ in range(12):
        layer = Linear(size, size, bias=False, dtype=torch.float64)
        sign = torch.linalg.det(layer.weight).sign().item()
        with torch.no_grad():
            layer.matrices.skew.normal_(std=3)
        x = torch.randn(5, size, dtype=torch.float64)
        torch.testing.assert_close(layer(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
        assert torch.linalg.det(layer.weight).sign().item() == sign
        signs.add(sign)
    assert signs == {-1.0, 1.0}  # rotations and reflections alike


def test_the_cayley_transform_against_its_definition():
    torch.manual_seed(0)
    layer = Linear(5, 5, dtype=torch.float64)
    base = layer.weight.detach()
    with torch.no_grad():
        layer.matrices.skew.normal_()
    lower = layer.matrices.skew[0].detach().tril(-1)
    A, identity = (lower - lower.T) / 2, torch.eye(5, dtype=torch.float64)
    expected = base @ (identity + A) @ torch.linalg.inv(identity - A)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_scales_belong_to_inputs():
    torch.manual_seed(0)
    layer = Linear(3, 5, scaled=True, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.matrices.log_scale.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
    lengths = layer.weight.detach().norm(dim=0)
    torch.testing.assert_close(lengths, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).exp())


def test_the_lu_factors_against_their_definition():
    torch.manual_seed(0)
    layer = Linear(5, 5, parametrization="lu", dtype=torch.float64)
    with torch.no_grad():
        layer.matrices.packed.normal_()
    packed, sign = layer.matrices.packed[0].detach(), layer.matrices.sign[0]
    L = packed.tril(-1) + torch.eye(5)
    U = packed.triu(1) + torch.diag(sign * packed.diag().exp())
    P = torch.zeros(5, 5, dtype=torch.float64)
    for row, place in enumerate(layer.matrices.permutation[0].tolist()):
        P[row, place] = 1
    assert not torch.equal(P, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(layer.weight.detach(), P @ L @ U, rtol=1e-12, atol=1e-12)
    _, log_det = layer.forward_and_log_det(torch.randn(2, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(log_det, (3 * packed.diag().sum()).expand(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parametrization", ["orthogonal", "lu"])
def test_frozen_and_shared_weights(parametrization):
    torch.manual_seed(0)
    layer = Linear(4, 4, parametrization=parametrization, dtype=torch.float64)
    layer.matrices.requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run():
        loss = layer(layer(layer(x * 1).tanh() * 1)).sin().sum()
        return torch.autograd.grad(loss, [x, layer.bias])

    found = run()
    with layer.temp_mode(checkpoint=False):
        for f, e in zip(found, run(), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


def test_a_singular_free_weight_says_so():
    layer = Linear(2, 2, parametrization=None)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    with pytest.raises(RuntimeError, match="singular"):
        layer.inverse(torch.ones(1, 2))

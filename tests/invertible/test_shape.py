"""Modules that move values: where the batch is, what their inverses refuse, and that they cost no memory."""

import pytest
import torch
from torch import nn

from recollect.invertible import (
    ConstantPad,
    Flatten,
    Linear,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Sequential,
    Unflatten,
)

# module, shape of an input whose dimension 0 it takes apart, joins, or moves
MOVE_THE_BATCH = {
    "flatten from the end": (lambda: Flatten(-2), (3, 2)),
    "flatten with sizes": (lambda: Flatten(-2, dims=(3, 2)), (3, 2)),
    "flatten nothing": (lambda: Flatten(0), ()),
    "unflatten from the end": (lambda: Unflatten(-1, (2, 3)), (6,)),
    "permute": (lambda: Permute(-1, 0), (3, 2)),
    "shuffle an image alone": (lambda: PixelShuffle(2), (8, 2, 2)),
    "unshuffle an image alone": (lambda: PixelUnshuffle(2), (2, 4, 4)),
}


@pytest.mark.parametrize("name", MOVE_THE_BATCH)
def test_no_log_determinant_where_the_batch_moves(name):
    module, shape = MOVE_THE_BATCH[name][0](), MOVE_THE_BATCH[name][1]
    x = torch.randn(shape)
    outputs = module.function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert torch.equal(module.inverse(*outputs), x)
    with pytest.raises(NotImplementedError, match="moves the batch"):
        module.forward_and_log_det(x)
    with pytest.raises(NotImplementedError, match="moves the batch"):
        module.inverse_and_log_det(*outputs)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Flatten(-2), (3, 2, 4)),
        (Flatten(0, 0), (3, 2)),
        (Flatten(1, 1), (3, 2)),
        (Unflatten(-1, (2, 3)), (5, 6)),
        (PixelShuffle(2), (2, 3, 8, 2, 2)),
    ],
    ids=str,
)
def test_zeros_where_the_batch_stays(module, shape):
    x = torch.randn(shape)
    y, log_det = module.forward_and_log_det(x)
    assert torch.equal(log_det, torch.zeros(shape[0]))
    assert torch.equal(y, module(x))
    assert module.check(x)


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_pixels_go_where_torchs_do(factor, batch):
    x = torch.arange(float(torch.Size((*batch, 2 * factor**2, 2, 5)).numel())).view(*batch, 2 * factor**2, 2, 5)
    y = PixelShuffle(factor)(x)
    assert torch.equal(y, nn.PixelShuffle(factor)(x))
    assert torch.equal(PixelUnshuffle(factor)(y), nn.PixelUnshuffle(factor)(y))
    assert torch.equal(PixelUnshuffle(factor)(y), x)


@pytest.mark.parametrize("kind", [PixelShuffle, PixelUnshuffle])
def test_what_is_no_image(kind):
    with pytest.raises(ValueError, match=r"channels, height, width\] \(got shape \[4, 4\]\)"):
        kind(2)(torch.randn(4, 4))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3), (2, 5, 4)], ids=str)
def test_unflatten_refuses_other_sizes_in_its_inverse(shape):
    with pytest.raises(ValueError, match=r"joins sizes \(3, 4\) from dimension 1 \(got shape"):
        Unflatten(1, (3, 4)).inverse(torch.randn(shape))


def test_a_size_that_was_left_open():
    module = Unflatten(1, (3, -1))
    for width in (2, 4):
        x = torch.randn(5, 3 * width)
        assert torch.equal(module.inverse(module(x)), x)


def test_flatten_follows_the_sizes_of_each_input():
    model = Sequential(Flatten(), Flatten(0, 0))
    for shape in ((2, 3, 4), (0, 3, 4), (2, 5), (2, 0, 4)):
        x = torch.randn(shape)
        assert torch.equal(model.inverse(*model.function(x)), x)


def test_views_in_a_chain_give_plain_gradients():
    torch.manual_seed(0)
    model = Sequential(
        PixelUnshuffle(2),
        Flatten(dims=(8, 2, 3)),
        Linear(48, 48),
        Unflatten(1, (8, 2, 3)),
        Permute(0, 2, 3, 1),
        ConstantPad((1, 1, 0, 2), value=0.5),
        Permute(0, 3, 1, 2),
        PixelShuffle(1),
    ).double()
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()

    def gradients():
        return torch.autograd.grad(model(x * 1).sin().sum(), [x, *model.parameters()])

    found = gradients()
    assert torch.equal(model(x), model.process(model.function(x)))
    with model.temp_mode(checkpoint=False):
        for f, e in zip(found, gradients(), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


def test_padding_holds_the_constant_and_the_gradient_ignores_it():
    x = torch.randn(2, 3, requires_grad=True)
    y = ConstantPad((1, 2), value=7.0)(x * 1)
    assert torch.equal(y[:, [0, 4, 5]], torch.full((2, 3), 7.0))
    weights = torch.randn(2, 6)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights[:, 1:4])


def test_padding_is_not_reversible():
    with pytest.raises(RuntimeError, match="not reversible"):
        ConstantPad((1, 1)).reverse()

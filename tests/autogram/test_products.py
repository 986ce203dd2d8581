"""Products by either library against plain ones in float64, and which library takes them."""

import platform

import pytest
import torch

from recollect.autogram import _products
from recollect.autogram._contract import gramian
from recollect.autogram._factors import Outer
from recollect.autogram._products import batched_gain, batched_product, has_onednn, is_by_onednn, product

asked = _products.is_at_full_speed
needs_onednn = pytest.mark.skipif(not _products._has_operation(), reason="torch has no oneDNN here")


@pytest.fixture(autouse=True)
def _processor(monkeypatch):
    """Have products divided among both libraries whoever made the processor."""
    monkeypatch.setattr(_products, "is_at_full_speed", lambda: False)


def close(found, expected):
    """Compare with a product in float64, relative to the sides' norms."""
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sizes", [(3, 5, 7), (96, 80, 300), (1, 9, 4), (64, 0, 8)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_product(sizes, strided):
    m, n, k = sizes
    left, right, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    if strided:
        left, right = left.mT.contiguous().mT, right.mT.contiguous().mT
    expected = left.double() @ right.double().mT
    if n:
        close(product(left, right), expected)
        close(product(left, right, bias), expected + bias)
    assert product(left, right).shape == (m, n)


@pytest.mark.parametrize("sizes", [(4, 3, 5, 7), (3, 128, 96, 256), (0, 64, 64, 512)])
def test_products_of_many_pairs(sizes):
    b, m, n, k = sizes
    left, right, out = torch.randn(b, m, k), torch.randn(b, k, n).mT, torch.empty(b, m, n)
    assert batched_product(left, right, out) is out
    if b:
        close(out, left.double() @ right.double().mT)


@needs_onednn
def test_which_products_are_by_onednn(monkeypatch):
    large, small = torch.randn(256, 256), torch.randn(8, 8)
    assert is_by_onednn(large, large)
    assert is_by_onednn(large, large.mT)
    assert not is_by_onednn(small, small)  # a call takes longer than the product
    assert not is_by_onednn(large.double(), large.double())
    assert not is_by_onednn(large, torch.randn(256, 300)[:, :256])  # no side of which is in one piece
    assert not is_by_onednn(large.clone().requires_grad_(), large)  # the operation has no derivative
    many = large.expand(4, -1, -1)
    assert batched_gain(many, many) > 0
    assert not batched_gain(many[:, :2], many)
    monkeypatch.setattr(_products, "is_at_full_speed", lambda: True)
    assert not is_by_onednn(large, large)
    assert not has_onednn(large)
    monkeypatch.setattr(_products, "is_at_full_speed", lambda: False)
    monkeypatch.setattr(_products, "_has_operation", lambda: False)
    assert not is_by_onednn(large, large)


@pytest.mark.parametrize(("word", "expected"), [("GenuineIntel", True), ("AuthenticAMD", False), ("", False)])
def test_whose_processor_it_is(monkeypatch, tmp_path, word, expected):
    expected &= torch.backends.mkl.is_available()
    monkeypatch.setattr(platform, "processor", lambda: f"Family 6, {word}")
    for known in (tmp_path / "none", tmp_path / "cpuinfo"):
        if known.name == "cpuinfo":
            known.write_text(f"vendor_id\t: {word}\n")
        monkeypatch.setattr(_products, "Path", lambda _, known=known: known)
        assert asked.__wrapped__() is expected


@needs_onednn
@pytest.mark.parametrize("last", [False, True])
def test_sides_in_parts(last):
    """Outer products whose sides have their positions first or last, in several pieces."""
    left, right = torch.randn(6, 128, 1, 1024), torch.randn(6, 128, 1, 700)
    if last:
        left = left.squeeze(2).mT.contiguous().mT.unsqueeze(2)
    factor = Outer(left, right, torch.Size((1024, 700)))
    rows = torch.einsum("itga,itgb->iab", left.double(), right.double()).flatten(1)
    close(gramian([factor]), rows @ rows.T)
    turned = Outer(right, left, torch.Size((700, 1024)))
    close(gramian([turned]), rows @ rows.T)

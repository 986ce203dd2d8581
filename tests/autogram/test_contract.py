"""The Gramian of factors against the Jacobian written out."""

import dataclasses
import math

import pytest
import torch
from factor_oracle import dense
from forms import set_form
from torch.utils._python_dispatch import TorchDispatchMode

from recollect.autogram import _contract, _pieces, _square, _sums
from recollect.autogram._contract import add_gramian, gramian
from recollect.autogram._factors import Blocks, Lookups, Outer, Picked, Rows, join, merge
from recollect.autogram._lookups import padded
from recollect.autogram._square import SquareSum
from recollect.autogram._sums import WholeSum


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def written_out(factor):
    """The Jacobian [m, n]."""
    return dense(factor).reshape(factor.num_rows, -1).double()


def outer(m, T, G, a, b, shared="", dtype=torch.float64):
    left = draw(1 if shared == "left" else m, T, G, a, dtype=dtype)
    return Outer(left, draw(1 if shared == "right" else m, T, G, b, dtype=dtype), torch.Size((G, a, b)))


def picked(m, T, d, entries, shared=False):
    index = torch.randint(entries, (1 if shared else m, T), generator=torch.Generator().manual_seed(m))
    return Picked(draw(m, T, d), index, entries)


def lookups(m, K, d, entries):
    generator = torch.Generator().manual_seed(m)
    index, owner = (torch.randint(high, (K,), generator=generator) for high in (entries, m))
    return Lookups(draw(K, d), index, owner, m, entries)


def blocks(m, *shape, axis=0, turned=False):
    values = draw(m, *shape)

    def form(rows, part):
        piece = values[rows].narrow(axis + 1, part.start, part.stop - part.start)
        return piece.transpose(1, -1).contiguous().transpose(1, -1) if turned else piece

    return Blocks(m, torch.Size(shape), form, 2 * torch.Size(shape).numel(), axis)


FACTORS = {
    "rows": Rows(draw(5, 3, 4)),
    "rows of a scalar": Rows(draw(5)),
    "no position": outer(3, 0, 1, 4, 5),
    "no elements": outer(3, 4, 1, 0, 5),
    "few positions": outer(5, 1, 1, 20, 30),
    "two positions": outer(4, 2, 1, 40, 50),
    "many positions": outer(5, 40, 1, 3, 4),
    "many rows": outer(150, 9, 1, 3, 4),
    "groups, few positions": outer(3, 1, 4, 9, 9),
    "groups, many positions": outer(3, 30, 4, 2, 3),
    "shared right, few positions": outer(5, 2, 1, 30, 40, "right"),
    "shared right, many positions": outer(5, 40, 1, 3, 4, "right"),
    "shared left, few positions": outer(5, 2, 1, 30, 40, "left"),
    "shared left, many positions": outer(5, 40, 1, 3, 4, "left"),
    "shared right, groups": outer(3, 30, 4, 2, 3, "right"),
    "picked": picked(5, 7, 3, 11),
    "picked, with one index for all": picked(5, 7, 3, 11, shared=True),
    "picked from a large table": picked(3, 4, 2, 10_000),
    "lookups in different numbers": lookups(5, 17, 3, 11),
    "lookups of a large table": lookups(3, 6, 2, 10_000),
    "no lookups": lookups(3, 0, 2, 4),
    "blocks": blocks(7, 3, 4),
    "blocks of another axis": blocks(7, 3, 6, 2, axis=1),
    "blocks whose first axis is the last in memory": blocks(7, 3, 6, 2, axis=1, turned=True),
    "pairs of positions, many objectives": outer(70, 3, 2, 60, 61),
    "one position, many objectives": outer(150, 1, 2, 60, 61),
    "one position, scaled": outer(40, 1, 1, 50, 1),
    "one row": outer(1, 3, 1, 4, 5),
}


@pytest.mark.parametrize("small", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", FACTORS)
def test_the_gramian_of_a_factor(name, small, monkeypatch):
    if small:
        set_form(monkeypatch, row_bytes=200)
        monkeypatch.setattr(_contract, "_WHOLE", 400)
        set_form(monkeypatch, dense_bytes=(2**22, 400))
    factor = FACTORS[name]
    rows = written_out(factor)
    torch.testing.assert_close(gramian([factor]), rows @ rows.T, rtol=1e-12, atol=1e-12)


SUMS = {
    "outer products": [outer(4, 2, 1, 6, 5), outer(4, 3, 1, 6, 5), outer(4, 1, 1, 6, 5, "right")],
    "outer products of other layouts": [outer(4, 2, 1, 6, 5), outer(4, 2, 5, 3, 2)],
    "rows": [Rows(draw(4, 6)), Rows(draw(4, 6) + 1)],
    "lookups": [picked(4, 3, 5, 6), picked(4, 2, 5, 6, shared=True)],
    "lookups in different numbers": [lookups(4, 9, 5, 6), picked(4, 2, 5, 6, shared=True), lookups(4, 3, 5, 6)],
    "lookups and an outer product": [lookups(4, 9, 5, 6), outer(4, 2, 1, 6, 5)],
    "a lookup and an outer product": [picked(4, 3, 5, 6), outer(4, 2, 1, 6, 5)],
    "all kinds": [picked(4, 3, 5, 6), outer(4, 2, 1, 6, 5), Rows(draw(4, 6, 5)), blocks(4, 6, 5)],
}


@pytest.mark.parametrize("small", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", SUMS)
def test_several_uses_of_a_parameter(name, small, monkeypatch):
    if small:
        set_form(monkeypatch, row_bytes=200)
        monkeypatch.setattr(_contract, "_WHOLE", 400)
        set_form(monkeypatch, dense_bytes=(2**22, 400))
    rows = sum(written_out(factor) for factor in SUMS[name])
    torch.testing.assert_close(gramian(SUMS[name]), rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_blocks_are_formed_once_and_a_piece_at_a_time(monkeypatch):
    set_form(monkeypatch, dense_bytes=(2**22, 900))
    factor, formed = blocks(5, 6, 8, axis=1), []

    def form(rows, part):
        formed.append((rows.stop - rows.start) * (part.stop - part.start) * 6)
        return factor.form(rows, part)

    gramian_of_this = SquareSum(5, torch.float64, torch.device("cpu"))
    add_gramian(gramian_of_this, [dataclasses.replace(factor, form=form)])
    assert sum(formed) == 5 * 8 * 6
    assert len(formed) > 2
    assert max(formed) * 8 <= 900


@pytest.mark.parametrize(
    ("asked", "given"), [(0.2, 1), (5.3, 5), (6.0, 8), (10.0, 8), (11.0, 16), (30.0, 32), (70.0, 64)]
)
def test_parts_are_multiples_of_a_vector(asked, given):
    assert _pieces.even(asked) == given


@pytest.mark.parametrize(("a", "b", "elements"), [(1024, 256, 81_920), (768, 256, 32_768), (999, 10, 500), (7, 5, 1)])
def test_tiles_are_alike_and_do_not_fall_on_one_another(a, b, elements):
    height, width = _pieces.tile(a, b, elements)
    assert -a % height <= math.ceil(a / height)  # which is what the last one has less
    assert -b % width <= math.ceil(b / width)
    assert height == a or height * width % 1024


def test_merging_leaves_one_factor_of_a_kind():
    assert len(merge(SUMS["outer products"])) == 1
    assert len(merge(SUMS["all kinds"])) == 4


@pytest.mark.parametrize("name", FACTORS)
def test_joining_objectives(name):
    factor = FACTORS[name]
    joined = join([factor, factor])
    if isinstance(factor, Blocks):
        assert joined is None
    else:
        rows = torch.cat([written_out(factor)] * 2)
        torch.testing.assert_close(gramian([joined]), rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_joining_lookups_of_different_numbers():
    parts = [picked(3, 4, 5, 6), lookups(4, 9, 5, 6), picked(2, 7, 5, 6, shared=True)]
    for some in (parts, [parts[0], parts[2]]):
        rows = torch.cat([written_out(part) for part in some])
        torch.testing.assert_close(gramian([join(some)]), rows @ rows.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [lookups(5, 17, 3, 11), lookups(3, 0, 2, 4)])
def test_padding_lookups_of_different_numbers(factor):
    assert torch.equal(written_out(padded(factor)), written_out(factor))


def test_joining_does_not_repeat_what_is_shared():
    one = outer(1, 8, 1, 3, 4)
    joined = join([one, Outer(one.left * 2, one.right, one.shape)])
    assert joined.left.shape[0] == 2
    assert joined.right.shape[0] == 1
    assert join([FACTORS["rows"], FACTORS["picked"]]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [outer(3, 300, 1, 2, 3), outer(3, 1, 1, 300, 300), outer(3, 9, 2, 2, 2)])
def test_half_precision_is_summed_in_float32(factor, dtype):
    half = Outer(factor.left.to(dtype), factor.right.to(dtype), factor.shape)
    found = gramian([half])
    assert found.dtype == torch.float32
    rows = written_out(half)
    torch.testing.assert_close(found.double(), rows @ rows.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("columns", [8, _square._SHORT + 1])
@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 130, 257])
def test_only_lower_blocks(num_rows, columns):
    rows = draw(num_rows, columns)
    total = SquareSum(num_rows, torch.float64, rows.device)
    total.add_product(rows)
    total.add_block(torch.ones(1, 1), slice(num_rows - 1, num_rows), slice(0, 1))
    expected = rows @ rows.T
    expected[0, -1] += 1
    expected[-1, 0] = expected[0, -1]
    torch.testing.assert_close(total.total(), expected)


@pytest.mark.parametrize("columns", [_square._LONG, _square._LONG + 3])
@pytest.mark.parametrize("num_rows", [1, 20, 65, _square._FEW, _square._FEW + 1])
def test_long_rows_in_parts(num_rows, columns):
    total = SquareSum(num_rows, torch.float64, torch.device("cpu"))
    rows = draw(num_rows, columns)
    total.add_product(rows)
    total.add_product(rows[:1].expand(num_rows, -1))
    torch.testing.assert_close(total.total(), rows @ rows.T + rows[0] @ rows[0])


class _Products(TorchDispatchMode):
    """Counts matrix products that are added in place, which torch's own counter of operations leaves out."""

    def __init__(self):
        super().__init__()
        self.multiplications = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm_.default:
            self.multiplications.append(args[0].numel() * args[1].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("columns", "part", "calls"), [(_square._SHORT + 1, 0.57, 8), (_square._SHORT, 0.76, 2)])
def test_a_square_does_less_than_a_product(columns, part, calls):
    rows = draw(256, columns)
    with _Products() as products:
        SquareSum(256, torch.float64, torch.device("cpu")).add_product(rows)
    assert len(products.multiplications) == calls
    assert 0.5 * 256 * 256 * columns < sum(products.multiplications) <= part * 256 * 256 * columns


def whole_sum(m, **shapes):
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return WholeSum(parameters, 1, m, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("m", [5, 300])
def test_a_bias_is_squared_with_its_weight(m):
    from torch.utils.flop_counter import FlopCounterMode

    weight = outer(m, 1, 1, 60, 40)
    bias = Rows(weight.left[:, 0, 0])
    total = whole_sum(m, bias=60, weight=(60, 40))
    with FlopCounterMode(display=False) as counter:
        total.take("bias", 0, [bias])
        total.take("weight", 0, [weight])
        found = total.total()
    rows = torch.cat([written_out(factor) for factor in (bias, weight)], 1)
    torch.testing.assert_close(found, rows @ rows.T)
    alone = m * m * (60 + 40) + m * 128 * (60 + 41)  # the lower half, and what is above the diagonal in its blocks
    assert counter.get_total_flops() <= alone if m == 300 else 2 * alone


@pytest.mark.parametrize("case", ["another's gradient", "last", "alone", "two in a row", "several positions"])
def test_rows_that_are_no_bias_of_what_follows_are_squared_apart(case):
    first, second = outer(5, 1 + (case == "several positions"), 1, 20, 30), Rows(draw(5, 20))
    third = Rows(draw(5, 20) + 1)
    order = {
        "another's gradient": [second, first],
        "last": [first, second],
        "alone": [second],
        "two in a row": [second, third, first],
        "several positions": [Rows(first.left[:, 0, 0]), first],
    }[case]
    total = whole_sum(5, **{str(k): factor.shape for k, factor in enumerate(order)})
    for k, factor in enumerate(order):
        total.take(str(k), 0, [factor])
    rows = torch.cat([written_out(factor) for factor in order], 1)
    torch.testing.assert_close(total.total(), rows @ rows.T)


def test_small_rows_are_squared_many_at_once(monkeypatch):
    sizes = []
    square = SquareSum.add_product
    monkeypatch.setattr(SquareSum, "add_product", lambda own, rows: sizes.append(rows.shape[1]) or square(own, rows))
    monkeypatch.setattr(_sums, "_TOGETHER", 10)
    weight = outer(5, 3, 1, 20, 30)  # formed from 5 x 150 elements, of which 5 x 15 may wait
    factors = [weight, *(Rows(draw(5, size) + size) for size in (3, 4, 6, 9, 30, 1))]
    total = whole_sum(5, **{str(k): factor.shape for k, factor in enumerate(factors)})
    for k, factor in enumerate(factors):
        total.take(str(k), 0, [factor])
    rows = torch.cat([written_out(factor) for factor in factors], 1)
    torch.testing.assert_close(total.total(), rows @ rows.T)
    assert [size for size in sizes if size < 40] == [3 + 4 + 6, 9, 30, 1]


@pytest.mark.parametrize("num_rows", [1, 255, 256, 257, 600])
def test_the_upper_half_is_the_lower_one_s(num_rows):
    total = SquareSum(num_rows, torch.float64, torch.device("cpu"))
    lower = draw(num_rows, num_rows).tril()
    total.add_block(lower, slice(0, num_rows), slice(0, num_rows))
    for _ in range(2):
        torch.testing.assert_close(total.total(), lower + lower.tril(-1).T)


@pytest.mark.parametrize(("T", "shared"), [(1, ""), (3, ""), (1, "left"), (2, "right")])
def test_pairs_of_positions_of_many_rows(T, shared):
    factor = outer(300, T, 2, 40, 50, shared)
    rows = written_out(factor)
    torch.testing.assert_close(gramian([factor]), rows @ rows.T, rtol=1e-12, atol=1e-10)


def test_pieces_are_formed_in_the_same_memory():
    total = SquareSum(3, torch.float64, torch.device("cpu"))
    first, smaller = total.space(2000), total.space(50)
    assert first.shape == (3, 2000)
    assert smaller.shape == (3, 50)
    assert smaller.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()

"""Fingerprints against sums that are written out, on tensors of all layouts and types."""

import math
import warnings

import pytest
import torch

from recollect.frames import _bits, _fingerprint, _reading
from recollect.frames._bits import bits_of
from recollect.frames._certificate import tolerance_of
from recollect.frames._fingerprint import difference, difference_of_few, error_between, few_bytes_of, fingerprint
from recollect.memory import peak_memory

SHAPES = [
    (3, 5),
    (1021,),
    (1022,),
    (4096,),
    (4097,),
    (4096 * 1024 + 5000,),
    (3000, 64),
    (1, 200_000),
    (2, 70_000, 4),
    (1019 * 1021,),
    (7, 1021, 100),
    (1 << 19,),
]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.int16, torch.bool]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def values(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return (10 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def gapped(tensor):
    """The same values as every second column of another tensor, and as its first columns."""
    wide = tensor.new_zeros(*tensor.shape, 2)
    wide[..., 0] = tensor
    long = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.size(-1))
    long[..., : tensor.size(-1)] = tensor
    return wide[..., 0], long[..., : tensor.size(-1)]


def sums(flat):
    """The elements themselves, or where there are many, the weighted sum of the rows in which they are laid out."""
    if len(flat) <= 4096:
        return flat
    weights = _fingerprint._weights_of_rows()[0]
    columns = flat.new_zeros(1024)
    for row, elements in enumerate(flat.split(1024)):
        columns[: len(elements)] += weights[row % 4096] * elements
    return columns


@each_shape
def test_projections_are_those_of_the_sums_over_rows(shape):
    x = values(shape)
    columns = sums(x.flatten())
    directions = _fingerprint._direction(torch.float64, x.device)[:, : len(columns)]
    expected = directions @ columns
    for one in (x, *gapped(x)):
        found = torch.tensor(fingerprint(one).projections, dtype=torch.float64)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * x.norm())


def test_no_row_is_hidden_by_its_weight_and_none_has_that_of_another():
    weights = _fingerprint._weights_of_rows()[0]
    assert weights.abs().min() > 0.4
    assert len(weights.unique()) == 4096
    assert math.isclose(weights.square().mean(), 1.0, rel_tol=0.05)


@pytest.mark.parametrize("shape", [(64, 1024), (300, 1021), (5000, 1024), (8, 4096)], ids=str)
def test_rows_that_trade_places_are_seen(shape):
    x = values(shape, torch.float32)
    for i, j in ((0, 1), (0, shape[0] - 1), (shape[0] // 2, 3)):
        y = x.clone()
        y[i], y[j] = x[j], x[i]
        assert difference(fingerprint(x), y) > tolerance_of(torch.float32)


@each_shape
def test_the_norm_is_taken_where_there_is_an_error(shape):
    x = values(shape)
    then = fingerprint(x)
    assert len(fingerprint(x, like=then).projections) == 4
    now = fingerprint(2 * x, like=then).projections
    assert len(now) == (5 if x.numel() > 4096 else 4)
    if x.numel() > 4096:
        assert math.isclose(now[4], 2 * x.norm(), rel_tol=1e-12)


@each_shape
@each_type
def test_bits_are_weighted_by_their_position(shape, dtype):
    x = values(shape, dtype)
    flat = (torch.view_as_real(x) if x.is_complex() else x).flatten().view(torch.uint8)
    wide = dtype in (torch.float64, torch.int64)
    words = torch.cat([flat, flat.new_zeros(-len(flat) % 4)]).view(torch.int64 if wide else torch.int32)
    period = 4 * next(p for p in (1021, 1019, 1013) if len(words) % p)
    number = min(len(words), period)
    columns = words.new_zeros(number).index_add_(0, torch.arange(len(words)) % period, words).tolist()
    if wide:
        columns = [column ^ ((column % 2**64) >> 29) for column in columns]
    weights = _bits.bit_weights_on(x.device).tolist()
    assert all(weight % 2 for weight in weights)
    assert len(set(weights)) == 4 * 1021
    expected = sum(weight * column for weight, column in zip(weights, columns, strict=False))
    assert bits_of(x) == (expected + 2**63) % 2**64 - 2**63
    assert all(bits_of(one) == bits_of(x) for one in gapped(x))
    assert bits_of(torch.cat([x.flatten()[:1], x.flatten()])[1:].view(shape)) == bits_of(x)  # between two words


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 64, 1021, 1019, 2042, 2038, 4084])
def test_bits_see_columns_that_change_their_sign(rows, dtype):
    x = values((rows, 16), dtype)
    for column in range(16):
        y = x.clone()
        y[:, column] *= -1
        assert bits_of(x) != bits_of(y)


@each_shape
@each_type
@pytest.mark.parametrize("sample", [False, True])
def test_gaps_in_memory_change_nothing(shape, dtype, sample):
    x = values(shape, dtype)
    allowed = 1e-13 if dtype is torch.float64 else 1e-6
    for one in gapped(x):
        assert difference(fingerprint(x, sample=sample), one, sample=sample) <= allowed
        assert difference(fingerprint(x, exact=True), one, exact=True) == 0.0


@pytest.mark.parametrize("size", [5, 70, 100])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.int16], ids=str)
def test_a_square_and_its_transpose_differ_although_they_have_the_same_memory(size, dtype, exact):
    square = values((size, size), dtype)
    for then, now in ((square, square.t()), (square.t(), square)):
        mark = fingerprint(then, exact=exact)
        assert difference(mark, now, exact=exact) > 0.1
        assert difference(mark, now.t(), exact=exact) == difference(mark, now.t().clone(), exact=exact) == 0.0


@each_shape
@each_type
def test_the_last_element_counts(shape, dtype):
    x = values(shape, dtype)
    y = x.clone()
    y.view(-1)[-1] = not x.view(-1)[-1] if dtype is torch.bool else x.view(-1)[-1] + 1
    for one in (y, *gapped(y)):
        assert difference(fingerprint(x), one) > 0.0
        assert difference(fingerprint(x, exact=True), one, exact=True) == math.inf


@each_shape
def test_the_error_is_about_that_of_the_tensors(shape):
    x = values(shape)
    noise = torch.randn(shape, dtype=x.dtype, generator=torch.Generator().manual_seed(8))
    y = x + 1e-3 * noise * x.norm() / x.numel() ** 0.5
    assert 1e-4 < difference(fingerprint(x), y) < 1e-2


@pytest.mark.parametrize("groups", [2049, 1 << 13, 32 * 20_000, 1021 * 1024])
def test_a_sample_meets_every_row_and_every_column(groups):
    step = _reading.step_of(groups)
    assert math.gcd(step, groups) == 1
    assert 50 < groups // step <= 63


LAYOUTS = [lambda x: x, lambda x: x.movedim(0, 2), lambda x: x[:, 1::2], lambda x: x[..., 3:9]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_is_made_of_groups_at_equal_distances(layout):
    x, _ = _reading.values_of(layout(values((40, 60, 51))))
    groups = x.numel() // 2
    expected = x.flatten()[: 2 * groups].view(groups, 2)[:: _reading.step_of(groups)]
    assert torch.equal(_reading.sample_of(x), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*TYPES, torch.float16], ids=str)
def test_samples_are_those_elements_wherever_they_lie(layout, dtype):
    x = layout(values((40, 60, 51), dtype))
    mark, real = fingerprint(x, sample=True), torch.view_as_real(x) if dtype.is_complex else x
    read, order = _reading.values_of(x)
    assert mark.order == order
    expected = _reading.sample_of(read).flatten().to(torch.float64)
    found = torch.tensor(_fingerprint._elements_of(mark.sample), dtype=torch.float64)
    assert torch.equal(found, expected)
    for again in (x.clone(), x.contiguous(), torch.stack([x, x])[1], layout(values((40, 60, 51), dtype))):
        assert difference(mark, again, sample=True) == 0.0
    if real.is_floating_point():
        assert difference(mark, 1.001 * x, sample=True) == pytest.approx(1e-3, rel=1.0)
        norm = math.dist(expected.tolist(), [0.0] * len(expected))
        change = values(read.shape, read.dtype)
        other = read + change
        distance = _reading.sample_of(change).double().norm().item()
        assert error_between(mark, fingerprint(other, sample=True)) == pytest.approx(distance / norm, rel=0.05)


@pytest.mark.parametrize(
    ("then", "now", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([3.0, 4.0], [3.0, 4.5], 0.1),
        ([0.0, 0.0], [0.0, 1.0], math.inf),
        ([1.0, math.nan], [1.0, 5.0], 0.0),  # an overflow in the forward pass: there is nothing to prove
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, 2.0], [1.0, math.inf], math.inf),
    ],
)
def test_errors_of_samples(then, now, error):
    def mark(elements):
        return fingerprint(torch.tensor(elements).repeat(5000), sample=True)

    assert error_between(mark(then), mark(now)) == pytest.approx(error)


def test_of_a_sample_bits_may_decide_too():
    x = values((100, 100))
    mark = fingerprint(x, sample=True, exact=True)
    change = torch.zeros_like(x)
    assert difference(mark, x.clone(), sample=True, exact=True) == 0.0
    change.view(-1)[2] = 1e-12  # between the first two pairs
    assert difference(mark, x + change, sample=True, exact=True) == 0.0
    change.view(-1)[1] = 1e-12
    assert difference(mark, x + change, sample=True, exact=True) == math.inf


def test_memory_that_somebody_has_taken_away_has_no_sample():
    x = values((100, 100))
    x.untyped_storage().resize_(0)
    assert fingerprint(x, sample=True) is None


@each_type
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_no_tensor_is_made_that_is_as_large(dtype, exact, sample):
    x = values((1 << 21,), dtype)
    for one in (x, gapped(x)[0], gapped(x.view(1 << 10, 1 << 11))[1]):
        with peak_memory() as memory:
            fingerprint(one, exact=exact, sample=sample)
        assert memory.peak_bytes <= 13 * 2**18


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [64, 5000, 300_000])
@pytest.mark.parametrize("fill", [-1e9, -1e30, "min"])
def test_numbers_of_a_mask_hide_no_others(fill, size, dtype):
    x = values((size,), torch.float64)
    hidden = torch.arange(size) % 3 == 0
    fill = torch.finfo(dtype).min if fill == "min" else fill
    one, other, rounded = (
        each.masked_fill(hidden, fill).to(dtype) for each in (x, -2 * x, x * (1 + 1e-3 * torch.finfo(dtype).eps))
    )
    then = fingerprint(one, apart=True)
    assert difference(then, one, apart=True) == 0.0
    assert difference(then, rounded, apart=True) <= tolerance_of(dtype)
    assert difference(then, other, apart=True) > tolerance_of(dtype)
    moved = torch.where(hidden, one, 0).roll(1) + torch.where(hidden, 0, one)
    assert difference(then, moved, apart=True) > tolerance_of(dtype)


@pytest.mark.parametrize("size", [100, 10_000])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(size, kind):
    x = values((size,), torch.float32)
    expected = fingerprint(x)
    with torch.autocast("cpu", kind):
        assert fingerprint(x) == expected
        assert 1e-5 < difference(expected, 1.0001 * x) < 1e-3


FEW = [(), (3,), (8, 8), (4, 0), (2, 3, 5), (16, 16)]


@pytest.mark.parametrize("shape", FEW, ids=str)
@pytest.mark.parametrize("dtype", [t for t in TYPES if not t.is_complex], ids=str)
def test_few_bytes_are_those_of_the_elements_in_the_order_of_dimensions(shape, dtype):
    x = values(shape, dtype)
    expected = bytes(x.reshape(-1).view(torch.uint8).tolist())
    found = few_bytes_of(x)
    if len(expected) > 1024:
        assert found is None
        return
    assert found == expected or not expected
    if shape:
        assert all(few_bytes_of(one) == found for one in gapped(x))
        assert few_bytes_of(x.transpose(0, -1).contiguous().transpose(0, -1)) == found


def test_what_is_no_small_plain_tensor_on_the_cpu_has_no_few_bytes():
    x = torch.randn(4, 4)
    released = torch.randn(4)
    released.untyped_storage().resize_(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    others = [
        torch.randn(257),
        x.to("meta"),
        torch.nn.Parameter(x),
        x.to_sparse(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        released,
        nested,
        quantized,
        torch._efficientzerotensor((4,)),
    ]
    assert all(few_bytes_of(one) is None for one in others)
    seen = []
    torch.func.vmap(lambda row: (seen.append(few_bytes_of(row)), row)[1])(x)
    assert seen == [None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_errors_of_few_bytes_are_those_of_fingerprints(dtype):
    x = values((6, 9), dtype)
    then = few_bytes_of(x)
    assert difference_of_few(then, x.clone(), exact=True) == 0.0
    with_nan = x.clone()
    with_nan[2, 3] = math.nan
    large = x.clone()
    large[0, 0] = 1e30
    for y in (x * (1 + 1e-2), x.flip(0), with_nan, large, torch.zeros_like(x)):
        y = y.to(dtype)
        assert difference_of_few(then, y) == difference(fingerprint(x, apart=True), y, apart=True) > 0.0
        assert difference_of_few(then, y, exact=True) == math.inf
        assert difference_of_few(few_bytes_of(y), y.mT.contiguous().mT, exact=True) == 0.0
    assert difference_of_few(then, x[1:]) == math.inf


def test_signs_of_zeros_are_no_error_of_few_bytes_but_other_bits():
    zeros = torch.zeros(5)
    assert difference_of_few(few_bytes_of(zeros), -zeros) == 0.0
    assert difference_of_few(few_bytes_of(zeros), -zeros, exact=True) == math.inf
    assert difference_of_few(few_bytes_of(torch.tensor([1, 2])), torch.tensor([1, 3])) == math.inf

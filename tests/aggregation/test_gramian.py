"""What is refused as a Gramian, in which words, and the forms of what is taken."""

import math

import pytest
import torch
from weight_inputs import DEGENERATE, gram, normal, square

from recollect.aggregation._gramian import checked, cholesky, correlations, flattened, normalized, regularized


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (torch.eye(3)[:2], r"square matrix.*found \[2, 3\]"),
        (torch.ones(4), r"square matrix.*found \[4\].*Flattening"),
        (torch.ones(2, 3, 3, 2), r"found \[2, 3, 3, 2\].*Flattening"),
        (torch.eye(2, dtype=torch.int64), r"floating-point numbers.*torch.int64: give gramian.to\(torch.float\)"),
        (torch.eye(2, dtype=torch.complex64), "floating-point numbers.*torch.complex64"),
        (torch.ones(0, 0), "is empty.*at least one objective"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), r"symmetric; found 0.5 at \[0, 1\] and 0 at \[1, 0\]"),
        (torch.tensor([[1.0, 0.0], [0.0, -2.0]]), "squared norms; it is negative at objective 1$"),
        (torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), "symmetric"),
    ],
)
def test_what_is_no_gramian(gramian, message):
    with pytest.raises(ValueError, match=message):
        checked(gramian)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_named(value, dtype):
    jacobian = normal(5, 3)
    jacobian[3, 1] = value
    gramian = gram(jacobian).to(dtype)
    assert not gramian[:, 3].isfinite().any()
    with pytest.raises(ValueError, match=r"not finite.*losses and gradients of objective 3 \("):
        checked(gramian)


def test_many_names_are_counted():
    jacobian = normal(20, 3)
    jacobian[5:] = math.inf
    with pytest.raises(ValueError, match=r"objectives 5, 6, 7, 8, 9, 10, 11, 12 and 7 more"):
        checked(gram(jacobian))


def test_names_are_places_for_losses_of_another_shape():
    gramian = torch.eye(6).double()
    gramian[4, 4] = math.nan
    with pytest.raises(ValueError, match=r"of objective \(1, 1\)"):
        checked(gramian, [2, 3])


def test_an_entry_off_the_diagonal_alone_names_both():
    gramian = torch.eye(4).double()
    gramian[1, 3] = gramian[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"of objectives 1, 3"):
        checked(gramian)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_what_has_no_norm_left_is_no_asymmetry(dtype):
    """The square of a tiny norm is zero, but not its products with others."""
    gramian = torch.diag(torch.tensor([1.0, 0.0, 0.0])).to(dtype)
    gramian[0, 1] = gramian[1, 0] = 0.01
    gramian[0, 1] *= 1 + 4 * torch.finfo(dtype).eps
    assert not gramian.equal(gramian.T)
    assert checked(gramian).equal(checked(gramian).T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_asymmetry(dtype):
    gramian = gram(square(8)).to(dtype)
    crooked = gramian + torch.finfo(dtype).eps * gramian * normal(8, 8).sign().to(dtype)
    assert not crooked.equal(crooked.T)
    found = checked(crooked)
    assert found.dtype == dtype
    assert found.equal(found.T)
    torch.testing.assert_close(found, gramian, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_gramians_are_taken_and_made_comparable(name):
    gramian = gram(DEGENERATE[name])
    unit = normalized(checked(gramian))
    assert unit.isfinite().all()
    trace = float(unit.trace())
    assert trace == pytest.approx(1) or (trace == 0 and not gramian.any())
    cosines, norms = correlations(gramian)
    torch.testing.assert_close(norms, DEGENERATE[name].norm(dim=1), rtol=1e-12, atol=0)
    expected = torch.nn.functional.normalize(DEGENERATE[name] * 1e20, eps=0) if norms.all() else None
    if expected is not None and norms.amax() < 1e100:
        torch.testing.assert_close(cosines, expected @ expected.T, rtol=1e-10, atol=1e-12)
    assert not cosines[norms == 0].any()


def test_a_symmetric_gramian_is_copied_as_it_is():
    gramian = torch.tensor([[5e-324, 0.0], [0.0, 1e308]], dtype=torch.float64)  # half of the least number is zero
    found = checked(gramian)
    assert torch.equal(found, gramian)
    assert found.data_ptr() != gramian.data_ptr()
    large = gramian.new_full((2, 2), 1e308)  # whose sum is beyond the range
    assert torch.equal(checked(large), large)


def test_a_generalised_gramian_as_a_matrix():
    jacobian = normal(2, 3, 4, 7)
    gramian = torch.einsum("abcp,xyzp->abczyx", jacobian, jacobian)
    matrix, shape = flattened(gramian)
    assert shape == (2, 3, 4)
    torch.testing.assert_close(matrix, gram(jacobian.reshape(24, 7)))
    matrix, shape = flattened(torch.tensor(3.0))
    assert (matrix.tolist(), shape) == ([[3.0]], ())


@pytest.mark.parametrize("shape", [[2], [2, 3], [2, 3, 2], [2, 3, 2, 3]])
def test_shapes_that_do_not_mirror_are_refused(shape):
    with pytest.raises(ValueError, match="second half mirroring the first"):
        flattened(torch.ones(shape))


def test_regularizing_adds_to_the_diagonal_alone():
    gramian = gram(square(5))
    found, factor = regularized(gramian, 0.5)
    torch.testing.assert_close(found, gramian + 0.5 * torch.eye(5).double())
    torch.testing.assert_close(factor @ factor.T, found)


def test_what_rounding_left_indefinite_is_mended():
    vectors = torch.linalg.qr(normal(4, 4)).Q
    gramian = vectors @ torch.diag(torch.tensor([1.0, 0.5, 0.0, -1e-3]).double()) @ vectors.T
    wanted = vectors @ torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0]).double()) @ vectors.T
    found, factor = regularized(gramian, 1e-6)
    torch.testing.assert_close(found, wanted + 1e-6 * torch.eye(4).double())
    torch.testing.assert_close(factor @ factor.T, found)


@pytest.mark.parametrize("m", [1, 7, 64, 128, 192, 200])
def test_a_cholesky_factor_is_that_of_the_matrix_alone(m):
    matrix = gram(normal(m, 2 * m)).float()
    factor, failed = cholesky(matrix, 3.0, torch.tensor(0.5), torch.float64)
    assert not failed
    assert (factor.shape, factor.dtype) == ((m, m), torch.float64)
    expected = matrix.double() / 3 + 0.5 * torch.eye(m).double()
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-12, atol=1e-12)
    assert not factor.triu(1).any()
    assert cholesky(-matrix)[1]


@pytest.mark.parametrize("place", [(0, 1), (1, 0), (299, 0), (0, 299), (127, 128), (255, 130), (298, 299)])
def test_asymmetry_is_seen_wherever_it_is(place):
    gramian = torch.full((300, 300), 2.0)
    assert torch.equal(checked(gramian), gramian)
    gramian[place] = -1.0
    with pytest.raises(ValueError, match=r"symmetric; found"):
        checked(gramian)

"""Complementarity problems: against every set of active constraints, by their conditions, and when guesses fail."""

import pytest
import torch
from weight_asserts import counting
from weight_inputs import KINDS, centred, gram, normal, tall, wide
from weight_oracles import complementary

from recollect.aggregation import _complementarity
from recollect.aggregation._active_set import descend
from recollect.aggregation._complementarity import solve as solve_factored
from recollect.aggregation._modulus import modulus
from recollect.aggregation._subsets import solve_on


def solve(matrix, offset):
    return solve_factored(matrix, torch.linalg.cholesky(matrix), offset)


def problem(kind, m, ridge=1e-4):
    """A matrix with ones on its diagonal, and as many problems as it has rows."""
    matrix = gram(kind(m))
    matrix = matrix / matrix.diagonal().sum() + ridge * torch.eye(m).double()
    scale = matrix.diagonal().rsqrt()
    matrix = matrix * scale[:, None] * scale
    return matrix, matrix.clone()


def violation(matrix, offset, z):
    return float(torch.minimum(z, z @ matrix + offset).abs().amax() / (1 + z.amax()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_equals_the_best_of_all_sets(kind, m):
    matrix, offset = problem(kind, m)
    found, residual = solve(matrix, offset)
    expected = torch.stack([complementary(matrix, q) for q in offset])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert residual < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [17, 40, 80])
@pytest.mark.parametrize("ridge", [1e-4, 1e-8, 1e-12])
def test_the_conditions_hold(kind, m, ridge):
    matrix, offset = problem(kind, m, ridge)
    found, residual = solve(matrix, offset)
    assert (found >= 0).all()
    assert residual < 1e-9
    assert violation(matrix, offset, found) <= residual + 1e-14


def test_offsets_may_be_anything():
    matrix = gram(wide(12))
    matrix = matrix / matrix.diagonal().mean()
    offset = torch.cat([normal(30, 12), torch.zeros(1, 12).double(), torch.ones(1, 12).double()])
    found, _ = solve(matrix, offset)
    expected = torch.stack([complementary(matrix[:4, :4], q[:4]) for q in offset])
    torch.testing.assert_close(solve(matrix[:4, :4], offset[:, :4])[0], expected, rtol=1e-9, atol=1e-11)
    assert violation(matrix, offset, found) < 1e-11
    assert not found[-2:].any()


def test_without_conflict_there_is_nothing_to_solve(monkeypatch):
    monkeypatch.setattr(_complementarity, "modulus", None)
    found, residual = solve(torch.eye(9).double(), torch.ones(2, 9).double())
    assert residual == 0
    assert not found.any()


def test_a_bad_guess_is_mended(monkeypatch):
    matrix, offset = problem(wide, 40)
    expected, _ = solve(matrix, offset)
    monkeypatch.setattr(_complementarity, "modulus", lambda h, q, *_, **__: torch.ones_like(q))
    torch.testing.assert_close(solve(matrix, offset)[0], expected, rtol=1e-9, atol=1e-11)


def test_rows_that_are_given_up_go_downhill(monkeypatch):
    matrix, offset = problem(tall, 40)
    expected, _ = solve(matrix, offset)
    rows = []
    monkeypatch.setattr(
        _complementarity, "descend", lambda h, q, z, **limits: rows.append(len(q)) or descend(h, q, z, **limits)
    )
    monkeypatch.setattr(_complementarity, "_PATIENCE", 0)
    torch.testing.assert_close(solve(matrix, offset)[0], expected, rtol=1e-8, atol=1e-10)
    assert 0 < rows.pop() < 40


def test_what_is_not_solved_is_told(monkeypatch):
    matrix, offset = problem(tall, 40)
    monkeypatch.setattr(_complementarity, "_pivot", lambda h, q, guess: (0 * q, torch.arange(len(q))))
    monkeypatch.setattr(_complementarity, "descend", lambda h, q, z, **_: 0.9 * z)
    with pytest.warns(RuntimeWarning, match="optimal only up to .*reg_eps"):
        found, residual = solve(matrix, offset)
    assert (found >= 0).all()
    assert residual == pytest.approx(
        float((torch.minimum(found, found @ matrix + offset).abs().amax(1) / (1 + found.amax(1))).amax())
    )


def test_what_solves_another_system_is_not_taken_for_done(monkeypatch):
    matrix, offset = problem(centred, 40)
    monkeypatch.setattr(_complementarity, "solve_on", lambda h, a, b: solve_on(h, a, b) * (1 + 1e-6))
    found, left = _complementarity._pivot(matrix, offset, offset < 0)
    done = torch.ones(40, dtype=torch.bool)
    done[left] = False
    assert len(left)
    assert done.sum() == 0 or violation(matrix, offset[done], found[done]) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_few_rounds_are_needed(kind, monkeypatch):
    monkeypatch.setattr(_complementarity, "descend", None)
    rounds = []
    monkeypatch.setattr(_complementarity, "solve_on", lambda h, a, b: rounds.append(len(a)) or solve_on(h, a, b))
    solve(*problem(kind, 64))
    assert len(rounds) <= 4
    assert sum(rounds) <= 1.5 * 64


def test_work_is_shared_by_all_rows():
    counts = {}
    for m in (24, 96):
        matrix, offset = problem(wide, m)
        with counting() as count:
            solve(matrix, offset)
        counts[m] = count
    assert counts[96].total < 2 * counts[24].total < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_the_guess_converges_for_every_matrix(kind):
    matrix, offset = problem(kind, 20, ridge=1e-2)
    expected, _ = solve(matrix, offset)
    guess = modulus(matrix, offset, torch.tensor(0.1).double(), most=4000, unsettled=-1.0)
    torch.testing.assert_close(guess.clamp(min=0), expected, rtol=1e-6, atol=1e-8)


def test_the_guess_stops_when_it_has_settled():
    matrix, offset = problem(wide, 20)
    with counting() as count:
        modulus(matrix, offset, torch.tensor(1.0).double())
    assert count.calls["addmm"] <= 15

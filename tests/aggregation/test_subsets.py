"""Many systems at once equal one system after the other."""

import pytest
import torch
from weight_inputs import gram, normal, wide

from recollect.aggregation import _subsets
from recollect.aggregation._subsets import solve_on


def one_by_one(matrix, members, target):
    found = torch.zeros_like(target)
    for x, chosen, b in zip(found, members, target, strict=True):
        places = chosen.nonzero()[:, 0]
        x[places] = torch.linalg.solve(matrix[places][:, places], b[places])
    return found


SETS = {
    "none": lambda r, m: torch.zeros(r, m, dtype=torch.bool),
    "all": lambda r, m: torch.ones(r, m, dtype=torch.bool),
    "few": lambda r, m: normal(r, m) > 1.0,
    "many": lambda r, m: normal(r, m) > -1.0,
    "some rows none, some rows all": lambda r, m: (torch.arange(r) % 2 == 0)[:, None].expand(r, m),
    "of every size": lambda r, m: torch.arange(m) < torch.arange(r)[:, None] % (m + 1),
}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 3), (40, 30), (1, 40)])
@pytest.mark.parametrize("exchanged", [True, False])
def test_equals_one_system_after_the_other(kind, rows, size, exchanged, monkeypatch):
    monkeypatch.setattr(_subsets, "_SMALL", 0)
    if not exchanged:
        monkeypatch.setattr(_subsets, "_EXACT", 0.0)
    matrix = gram(wide(size))
    members, target = SETS[kind](rows, size), normal(rows, size, seed=3)
    expected = one_by_one(matrix, members, target)
    torch.testing.assert_close(solve_on(matrix, members, target), expected, rtol=1e-10, atol=1e-12)


def test_chunks_of_any_size_give_the_same(monkeypatch):
    monkeypatch.setattr(_subsets, "_SMALL", 0)
    matrix, members, target = gram(wide(30)), normal(30, 30) > 0, normal(30, 30, seed=1)
    expected = solve_on(matrix, members, target)
    monkeypatch.setattr(_subsets, "_CHUNK", 1)
    torch.testing.assert_close(solve_on(matrix, members, target), expected, rtol=1e-12, atol=1e-14)


def test_few_rows_equal_one_system_after_the_other():
    matrix, members, target = gram(wide(6)), normal(4, 6) > 0, normal(4, 6, seed=3)
    torch.testing.assert_close(solve_on(matrix, members, target), one_by_one(matrix, members, target))


def test_a_system_has_only_what_is_unlike_most_rows(monkeypatch):
    monkeypatch.setattr(_subsets, "_SMALL", 0)
    sizes = []
    solve = _subsets._solve_any
    monkeypatch.setattr(_subsets, "_solve_any", lambda a, b: sizes.append(a.shape[-1]) or solve(a, b))
    members = (torch.arange(30) < 15).repeat(30, 1) ^ torch.eye(30, dtype=torch.bool)
    matrix, target = gram(wide(30)), normal(30, 30)
    torch.testing.assert_close(solve_on(matrix, members, target), one_by_one(matrix, members, target))
    assert max(sizes) == 1


def test_where_rounding_would_show_nothing_is_exchanged():
    close = torch.full((20, 20), 1.0).double() + 1e-12 * torch.eye(20).double()
    chosen = torch.arange(20) < 10
    assert _subsets._exchange(gram(wide(20)), chosen) is not None
    assert _subsets._exchange(close, chosen) is None


def test_a_chunk_is_bounded(monkeypatch):
    monkeypatch.setattr(_subsets, "_SMALL", 0)
    shapes = []
    for name in ("_solve", "_solve_any"):
        solve = getattr(_subsets, name)
        monkeypatch.setattr(_subsets, name, lambda a, b, solve=solve: shapes.append(a.shape) or solve(a, b))
    monkeypatch.setattr(_subsets, "_CHUNK", 2000)
    solve_on(gram(wide(30)), normal(30, 30) > 0, normal(30, 30))
    assert len(shapes) > 3
    assert all(shape.numel() <= 2000 for shape in shapes)


@pytest.mark.parametrize("size", [2, 40])
def test_a_matrix_that_is_not_positive_gives_no_numbers(size, monkeypatch):
    monkeypatch.setattr(_subsets, "_EXACT", 0.0)
    matrix = torch.eye(size).double()
    matrix[0, 0] = -1
    members = torch.ones(size, size, dtype=torch.bool)
    members[0, 0] = False
    found = solve_on(matrix, members, torch.ones(size, size).double())
    assert found[0].isfinite().all()
    assert not found[1:].isfinite().any(1).any()

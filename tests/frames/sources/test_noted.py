"""Computations that are repeated outside of frames: rounding passes, and another computation does not."""

import pytest
import torch

from recollect.frames import RebuildError, check_noted, noted


def test_a_note_is_of_fixed_size():
    assert noted(torch.randn(3, 4), torch.randn(5000, 2)).shape == (8,)


def test_rounding_passes_as_far_as_the_function_amplifies_it():
    x = torch.randn(40, 40, dtype=torch.float64)
    moved = x * (1 + 1e-8)
    for function in (torch.sin, lambda value: (1e3 * value).sin()):
        note = noted(x, function(x))
        check_noted("it", note, x, function(x), function)
        check_noted("it", note, moved, function(moved), function)


def test_another_computation_is_named():
    x = torch.randn(40, 40, dtype=torch.float64)
    with pytest.raises(RebuildError, match=r"^it: "):
        check_noted("it", noted(x, x.sin()), x, (1.001 * x).sin(), torch.sin)
    calls = []

    def counting(value):
        calls.append(value)
        return value.sin() * (1 + 1e-3 * len(calls))

    with pytest.raises(RebuildError, match=r"^it: "):
        check_noted("it", noted(x, counting(x)), x, counting(x), counting)

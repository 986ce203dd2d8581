"""Runs all tests on one thread: for tensors as small as theirs a second one costs time."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for forks.py


def pytest_collection_finish() -> None:
    """Leave to themselves the modules and tests that stand now: each ``gc.collect()`` would go through them all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_bits(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Tensors have the same values, and zeros the same signs."""
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None), f"tensor {index} of {len(expected)}"
        if one is not None and other is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            differs = (one != other) | (one.signbit() != other.signbit())
            assert not differs.any(), f"{int(differs.sum())} of {one.numel()} elements differ in tensor {index}"


@pytest.fixture(scope="session")
def same_bits() -> Callable[..., None]:
    return assert_same_bits

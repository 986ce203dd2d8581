"""Where rows begin, against sorting and counting."""

import pytest
import torch

from recollect.messages import row_pointers


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("entries", [0, 1, 60])
def test_row_pointers(dtype, entries):
    row = torch.randint(20, (entries,), dtype=dtype, generator=torch.Generator().manual_seed(0))
    found = row_pointers(row, 25, dtype)
    assert found.dtype == dtype
    assert found.tolist() == [int((row < k).sum()) for k in range(26)]


def test_rows_out_of_range_are_refused():
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        row_pointers(torch.tensor([0, 3]), 3, torch.int64)

"""Gramians of groups of rows, pair by pair."""

import pytest
import torch

from recollect.autogram._groups import in_groups


@pytest.mark.parametrize(("count", "fit"), [(5, 9), (5, 2), (5, 1), (7, 4), (6, 3), (2, 1), (1, 0)])
def test_groups_fill_every_pair(count, fit):
    rows = torch.randn(count, 3, 4, dtype=torch.float64)
    seen = []

    def gramian(chosen):
        seen.append(len(chosen))
        flat = rows[list(chosen)].flatten(0, 1)
        return flat @ flat.T

    found = in_groups(count, fit, rows.device, rows.dtype, gramian, 3)
    flat = rows.flatten(0, 1)
    torch.testing.assert_close(found, flat @ flat.T)
    assert max(seen) <= max(fit, 2)

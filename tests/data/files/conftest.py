"""Real graphs, where there are such."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REAL = os.environ.get("RECOLLECT_DATA")  # read before a fixture hides it


@pytest.fixture
def real_files() -> Path:
    """The folder that RECOLLECT_DATA names."""
    if not REAL or not (Path(REAL) / "multilabel").is_dir():
        pytest.skip("RECOLLECT_DATA names no folder with multilabel/pcg and multilabel/blogcatalog.npz")
    return Path(REAL)

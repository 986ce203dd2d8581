"""Numbers of bytes as they are written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from recollect._util._sizes import Size, as_size


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (500, 500),
        (1.5e9, 1_500_000_000),
        ("8000", 8000),
        ("500MB", 500_000_000),
        (" 1.5 gb ", 1_500_000_000),
        ("1.5 GiB", 3 * 2**29),
        (".5k", 500),
        ("2TiB", 2**41),
    ],
)
def test_bytes(said: str | float, meant: float) -> None:
    assert as_size(said) == Size(meant)


def test_a_share() -> None:
    assert as_size("60%") == Size(0.6, share=True)


@pytest.mark.parametrize("said", ["500 XB", "GB", "", "1e9", "-3", "0", 0, -5.0, float("nan"), "1 2 GB", "0%", "101%"])
def test_what_cannot_be_read_is_refused_by_name(said: str | float) -> None:
    with pytest.raises(ValueError, match="memory_budget"):
        as_size(said, "memory_budget")


@pytest.mark.parametrize("said", [None, True, [1]])
def test_other_types_are_refused(said: object) -> None:
    with pytest.raises(TypeError, match="must be a number of bytes"):
        as_size(said)


def test_it_needs_no_torch() -> None:
    program = "import sys, recollect._util._sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

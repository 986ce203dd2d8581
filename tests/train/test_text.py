from __future__ import annotations

import pytest

from recollect.train._text import bytes_text, seconds_text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "not measured"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5,120.00 GiB"),
    ],
)
def test_bytes(number, text):
    assert bytes_text(number) == text


@pytest.mark.parametrize(("number", "text"), [(None, "not measured"), (0.01234, "0.0123 s"), (1234.5, "1,234 s")])
def test_seconds(number, text):
    assert seconds_text(number) == text

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from recollect.train._progress import training_bar

ROW = {"epoch": 7.0, "loss": 0.123456, "val_accuracy": 0.7123, "conflict": 0.256}
ROW |= {f"age_{k}": k / 3 for k in range(1, 5)} | {f"error_{k}": k / 100 for k in range(1, 5)}


@pytest.mark.parametrize("width", [80, 50])
def test_a_narrow_terminal_shows_the_time_left_and_all_that_is_known_of_an_epoch(width):
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True)
    with training_bar(console, 1000, 0, "micro_f1") as bar:
        bar.advance(ROW)
    text = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).split())
    assert re.search(r"7/1000 \d:\d\d:\d\d left [-\d]", text)
    for words in ("loss 0.1235", "validation micro-F1 71.23 %", "0.33/0.67/1.00/1.33", "conflict 25.6 %"):
        assert words in text


def test_without_a_terminal_some_epochs_have_a_line():
    written = io.StringIO()
    with training_bar(Console(file=written, width=80), 20, 0, "accuracy") as bar:
        for epoch in range(1, 5):
            bar.advance({**ROW, "epoch": float(epoch)})
    assert [line.partition("  ")[0] for line in written.getvalue().splitlines()] == ["epoch 2/20", "epoch 4/20"]

from __future__ import annotations

import pytest

from recollect.train._text import bytes_text, compared_text, per_layer, percent_text, range_text, seconds_text


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


def test_scores_of_several_runs_have_a_deviation():
    summary = {"test_accuracy": 0.81234, "val_accuracy": 0.5, "val_accuracy_std": 0.0123}
    assert percent_text(summary, "test_accuracy") == "81.23 %"
    assert percent_text(summary, "val_accuracy") == "50.00 ± 1.23 %"


def test_layers_are_found_by_their_names():
    row = {"age_1": 1.0, "age_2": 2.0, "age_10": 3.0, "val_loss": 4.0, "error_1": 5.0}
    assert per_layer(row, "age") == [1.0, 2.0, 3.0]
    assert per_layer(row, "val") == []
    assert per_layer(row, "drift") == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        ([float("nan")] * 3, ""),
        ([1.5], "1.50"),
        ([1.5, 1.501, 1.499], "1.50"),
        ([1.5, 2.0], "1.50/2.00"),
        ([1.0, 2.0, 3.0, 4.0, 0.5], "0.50 to 4.00"),
    ],
)
def test_a_few_layers_are_listed_and_many_have_a_range(values, text):
    assert range_text(values) == text


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (1.0, 3.1, "3.1x less"),
        (1.25, 1.0, "1.25x more"),
        (1.0, 1.001, "the same"),
        (0, 1.0, ""),
        (None, 1.0, ""),
        (1.0, None, ""),
    ],
)
def test_two_numbers_are_compared_by_a_factor_above_one(first, second, text):
    assert compared_text(first, second, "less", "more") == text

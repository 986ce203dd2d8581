"""The figures of UPGrad's weights are there and are right, at sizes that say nothing of speed."""

import pytest
import torch
from bench import _objectives_weights
from bench._harness import settings
from bench._objectives_weights import HEADLINE, KINDS, weight_rows
from bench._step import UnavailableError

CPU = torch.device("cpu")


def rows(*sizes, repeats=2):
    with settings(threads=None):
        return weight_rows(sizes, repeats, 5.0, CPU)


def test_a_row_for_each_size():
    found = rows(1, 5)
    assert [row["objectives"] for row in found] == [1, 5]
    for row in found:
        assert set(row["kinds"]) == set(KINDS)
        assert row["seconds"] == row["kinds"][HEADLINE]["seconds"]
        assert row["residual"] < 1e-10
        assert row["seconds"]["recollect"] > 0


def test_values_equal_the_peers():
    pytest.importorskip("torchjd")
    (row,) = rows(9)
    for kind in row["kinds"].values():
        assert abs(kind["objective_difference"]) < 1e-6
        assert kind["ratio"] == pytest.approx(kind["seconds"]["torchjd"] / kind["seconds"]["recollect"])


def test_a_worse_answer_has_a_worse_value(monkeypatch):
    pytest.importorskip("torchjd")
    value = _objectives_weights._value
    monkeypatch.setattr(_objectives_weights, "_value", lambda *arguments: 1.01 * value(*arguments))
    (row,) = rows(6)
    assert row["objective_difference"] == pytest.approx(0.01, rel=1e-3)


def test_without_the_peer_there_is_a_reason(monkeypatch):
    def missing(matrix):
        raise UnavailableError("torchjd cannot be imported")

    monkeypatch.setattr(_objectives_weights, "_peer", missing)
    (row,) = rows(4)
    assert row["objective_difference"] is None
    assert "cannot be imported" in row["why_not_measured"]
    assert set(row["seconds"]) == {"recollect"}
    assert row["ratio"] is None


def test_with_many_objectives_only_the_headline(monkeypatch):
    monkeypatch.setattr(_objectives_weights, "MANY", 3)
    (row,) = rows(4)
    assert set(row["kinds"]) == {HEADLINE}

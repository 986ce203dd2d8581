from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from recollect.train._figures import fit_axis, learning_curves, spread_curves


def row(epoch: int, loss: float, val_loss: float = 1.0) -> dict[str, float]:
    return {"epoch": epoch, "loss": loss, "val_loss": val_loss, "train_accuracy": 0.5, "val_accuracy": 0.25}


def fitted(values):
    axes = Figure().subplots()
    axes.plot(values)
    fit_axis(axes, values)
    return axes


@pytest.mark.parametrize("values", [[1.31, 1.29, 1.33], [0.9, 0.2, 0.5], [-1.0, 3.0], [0.0, 1e-5], [5.0, 5.0]])
def test_a_linear_axis_shows_the_values_and_little_else(values):
    axes = fitted(values)
    low, high = axes.get_ylim()
    spread = max(values) - min(values) or abs(max(values))
    assert axes.get_yscale() == "linear"
    assert low < min(values) <= max(values) < high
    assert high - low <= 1.11 * spread


@pytest.mark.parametrize("values", [[2.0, 0.11], [1.0, 1e-6], [3e4, 7.0, 0.5]])
def test_values_over_powers_of_ten_have_a_logarithmic_axis_of_their_range(values):
    axes = fitted(values)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log"
    assert low < min(values) <= max(values) < high
    assert math.log(high / low) <= 1.11 * math.log(max(values) / min(values))


def test_values_that_are_not_finite_do_not_count():
    assert fitted([1.0, math.inf, 2.0, math.nan]).get_ylim() == fitted([1.0, 2.0]).get_ylim()
    fitted([math.nan])


def test_the_loss_of_a_run_fills_its_panel():
    history = [row(epoch, 1.4 - 0.01 * epoch, 1.35) for epoch in range(1, 11)]
    (axes,) = learning_curves(history, 3, "accuracy")[0].axes
    assert axes.get_ylim() == pytest.approx((1.3 - 0.0045, 1.39 + 0.0045))


def test_several_runs_have_their_mean_and_their_band():
    histories = [[row(1, 1.0), row(2, 0.5)], [row(1, 3.0), row(2, 1.5), row(3, 4.0)]]
    loss, score = (figure.axes[0] for figure in spread_curves(histories, "accuracy"))
    assert loss.lines[0].get_ydata().tolist() == [2.0, 1.0, 4.0]
    band = loss.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(1.0, 1.0), (1.0, 3.0), (2.0, 0.5), (2.0, 1.5), (3.0, 4.0)}
    assert score.lines[1].get_ydata().tolist() == [25.0, 25.0, 25.0]

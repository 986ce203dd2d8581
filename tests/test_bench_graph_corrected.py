"""The benchmark of corrected histories at sizes that say nothing: what it measures, and holds against targets."""

import warnings

import pytest
import torch
from torch_geometric.data import Data

with warnings.catch_warnings():  # torch_geometric warns on its own import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    from bench import _graph_corrected as corrected
    from bench import _graph_corrected_accuracy as scores

    from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader

SMALL = corrected.Course("sbm", 3, 2, nodes=200, channels=4, parts=8, parts_in_batch=2)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


def test_bias_is_none_after_a_refresh():
    data, ptr = SMALL.permuted(None)
    model = SMALL.model(data, 0, compensate=True, history_dtype=torch.float64).double()
    data.x, data.adj_t = data.x.double(), data.adj_t.double()
    batches = list(SubgraphLoader(data, ptr, 2, log=False, outward=True))
    total = int(data.train_mask.sum())
    everything = EvalSubgraphLoader(data, ptr, 2, log=False)
    model.refresh(everything, lambda out, batch: corrected.loss_of(out, batch.data, total))
    assert corrected.bias(model, data, batches, True) < 1e-12
    assert corrected.bias(model, data, batches, False) > 1e-3


def test_biases_and_steps_and_their_targets():
    row = corrected.measure_bias(SMALL, None, (1, 2))
    assert {len(row[name]) for name in corrected.COLUMNS} == {2}
    assert "combined" in corrected.bias_table(SMALL, row)
    step = corrected.measure_step(SMALL, None, 1, torch.device("cpu"))
    assert 0 < step["outward_edges"] < step["edges"]
    assert "ratio" in corrected.step_table([SMALL], [step])
    worst, ratio = corrected.corrected_targets([row], [step])
    assert worst.value == max(a / b for a, b in zip(row["corrected"], row["corrected_off"], strict=True))
    assert ratio.value == step["cpu_ratio"] > 0


def test_bias_by_learning_rates():
    (row,) = corrected.measure_rates(SMALL, None, 1, [1e-3])
    assert row["ratio"] == row["off"] / row["on"] > 0
    assert row["steps"] == 4
    assert "learning rate" in corrected.rates_table([row])


def test_scores_of_every_mode():
    row = scores.measure_scores(SMALL, None, 2)
    assert {len(found) for found in row["test"].values()} == {2}
    assert list(row["mean"]) == list(scores.MODES)
    assert "parts alone" in scores.scores_table([SMALL], [row])


def test_average_precision_of_several_labels():
    data = {
        "test_mask": torch.tensor([True, True, True, False]),
        "y": torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    }
    out = torch.tensor([[0.3, 0.0], [0.2, 0.0], [0.1, 0.0], [9.0, 0.0]])
    # Ranks of the first label's nodes: 1 and 3. Nobody in the part has the second.
    assert scores.score(out, Data(**data), "test") == pytest.approx((1 / 1 + 2 / 3) / 2)

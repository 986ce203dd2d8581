from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from recollect.train import UsageError, train
from recollect.train._embedding import learn_features


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x, scale):
        return self.linear(x) * scale


def test_learnt_features_are_parameters_in_the_place_of_the_argument():
    network, x = Plain(), torch.randn(5, 3, dtype=torch.float64)
    expected = network(x, 2.0)
    learn_features(network, x)
    assert torch.equal(network(torch.zeros(5, 3), 2.0), expected)
    network(torch.zeros(5, 3), 2.0).sum().backward()
    row = 2 * network.linear.weight.sum(0)
    assert torch.allclose(network.node_features.grad, row.expand(5, 3))
    assert "node_features" in network.state_dict()


@pytest.mark.parametrize("model", ["revgnn", "gcn"])
def test_a_graph_without_features_is_trained_on_vectors_that_are_learnt(model, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "g.npz", edge_index=rng.integers(30, size=(2, 90)), y=np.arange(30) % 3)
    words = ["dataset=file", f"dataset.path={tmp_path / 'g.npz'}", "dataset.features=embedding", f"model={model}"]
    words += ["model.num_layers=2", "epochs=2", "threads=1", "measure.enabled=false"]
    summary = train([*words, f"run_dir={tmp_path / 'run'}"])
    state = torch.load(tmp_path / "run" / "checkpoint.ckpt", weights_only=True)["model"]
    start = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    assert state["node_features"].shape == (30, 64)
    assert not torch.equal(state["node_features"], start)
    assert summary["parameters"] > 30 * 64
    with pytest.raises(UsageError, match=r"dataset\.features=embedding needs"):
        train([*words, "data.features=columns", f"run_dir={tmp_path / 'other'}"])
    assert not (tmp_path / "other").exists()

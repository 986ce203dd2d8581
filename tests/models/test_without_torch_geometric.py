"""The models work without torch_geometric, for convolutions that are given as functions."""

from __future__ import annotations

import subprocess
import sys
import textwrap

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch_geometric":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    program = BLOCKER + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)


def test_factories_work_and_names_say_what_to_install():
    result = run(
        """
        import torch
        from torch import nn
        from recollect.models import RevGNN
        from recollect.reversible import GroupAddRev, GroupRevRes, InvertibleModule

        class Mean(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.linear = nn.Linear(channels, channels)

            def forward(self, x, edge_index):
                return torch.zeros_like(x).index_add(0, edge_index[1], self.linear(x)[edge_index[0]])

        model = RevGNN(3, 8, 2, 4, conv=Mean, dropout=0.5)
        edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        model.loss(model(torch.randn(3, 3), edge_index), torch.tensor([0, 1, 1])).backward()
        assert all(p.grad is not None for p in model.parameters())
        assert not any(name.startswith("torch_geometric") for name in sys.modules)
        try:
            RevGNN(3, 8, 2, 4, conv="sage")
        except ImportError as error:
            print(error)
        try:
            RevGNN(3, 8, 2, 4, conv="sagge")
        except ValueError as error:
            print(error)
        """
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "conv='sage' needs torch_geometric: pip install 'torch-recollect[graph]'"
    assert second.startswith("conv='sagge' is unknown; choose from gat, gcn")


def test_networks_on_histories_but_gat_need_none():
    result = run(
        """
        import torch
        from recollect.autoscale import History, ScalableGNN
        from recollect.models import APPNP, GAT, GCN, GCN2, GIN, PNA

        dense = torch.eye(4)[[1, 2, 3, 0]]
        with torch.sparse.check_sparse_tensor_invariants():
            import warnings
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch: sparse CSR is in beta
                adj_t, part = dense.to_sparse_csr(), dense[:2, [0, 1, 2]].to_sparse_csr()
        x = torch.randn(4, 3)
        batch = 2, torch.tensor([0, 1, 2]), torch.tensor([0]), torch.tensor([2])
        for model in (
            APPNP(4, 3, 5, 2, 3), GCN(4, 3, 5, 2, 3), GCN2(4, 3, 5, 2, 3), GIN(4, 3, 5, 2, 3),
            PNA(4, 3, 5, 2, 3, ["max", "mean"], ["identity"], torch.ones(4)),
        ):
            model.eval()
            whole = model(x, adj_t)
            torch.testing.assert_close(model(x[:3], part, *batch), whole[:2])
        assert not any(name.startswith("torch_geometric") for name in sys.modules)
        try:
            GAT(4, 3, 5, 2, 2, 1, 3)
        except ImportError as error:
            print(error)
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["GAT needs torch_geometric: pip install 'torch-recollect[graph]'"]

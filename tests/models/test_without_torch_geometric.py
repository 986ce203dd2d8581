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
    assert first == "conv='sage' needs torch_geometric: pip install 'recollect[graph]'"
    assert second.startswith("conv='sagge' is unknown; choose from gat, gcn")

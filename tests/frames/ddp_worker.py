"""One process of the distributed test: trains each case on its share of the batch and saves the gradients.

Run as ``python ddp_worker.py RANK WORLD_SIZE STORE OUTPUT``.
"""

import sys

import torch
from frames_zoo import make
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# source of the frames, whether some parameters are unused, and whether DDP is told that every step is alike
CASES = [
    ("coupling", False, False),
    ("coupling", True, False),
    ("coupling", True, True),
    ("inverse", False, False),
    ("checkpoint", True, False),
    ("checkpoint", False, True),
]


class Model(nn.Module):
    """A network of frames, with a part that no loss reaches if ``unused``."""

    def __init__(self, source: str, unused: bool) -> None:
        super().__init__()
        self.net, _ = make(source, depth=3)
        self.spare = nn.Linear(3, 3).double() if unused else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x)
        return y


def gradients(model: nn.Module, x: torch.Tensor, steps: int = 2) -> dict[str, torch.Tensor | None]:
    for _ in range(steps):
        model.zero_grad()
        model(x).sin().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def batch() -> torch.Tensor:
    return torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


if __name__ == "__main__":
    rank, world, store, output = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    share = batch().chunk(int(world))[int(rank)]
    results = []
    for source, unused, static in CASES:
        model = DistributedDataParallel(
            Model(source, unused), find_unused_parameters=unused and not static, static_graph=static
        )
        results.append(gradients(model, share))
    torch.save(results, output)
    dist.destroy_process_group()

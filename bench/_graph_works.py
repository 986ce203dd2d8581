"""The graphs and the network that `bench.graph` trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.autoscale import SubData, history_bytes, normalize, partition, permute, to_adj_t
from recollect.data import load
from recollect.models import GCN

FEATURES, CLASSES = 64, 10


@dataclass(frozen=True)
class Work:
    """A GCN on a generated graph of many small blocks, most of whose edges stay inside: there is something to cut.

    Attributes:
        nodes: N.
        block: nodes of a block, whatever N is.
        part: nodes of a part, on average.
        method: of the partition; ``blocks``: whole blocks, without a search.
    """

    nodes: int
    degree: float = 10.0
    homophily: float = 0.8
    block: int = 100
    layers: int = 4
    channels: int = 256
    part: int = 1000
    parts_in_batch: int = 1
    method: Literal["blocks", "metis", "random"] = "blocks"

    def __str__(self) -> str:
        return (
            f"{self.layers} layers x {self.channels} channels, {self.nodes:,} nodes of degree {self.degree:g} in "
            f"blocks of {self.block}, {self.part * self.parts_in_batch:,} nodes in a batch ({self.method})"
        )

    def data(self) -> Any:
        """The graph, normalised, with few classes."""
        data = load(
            "sbm",
            "",
            num_nodes=self.nodes,
            num_classes=self.nodes // self.block,
            average_degree=self.degree,
            homophily=self.homophily,
            num_features=FEATURES,
        ).data
        data = to_adj_t(data)
        data.adj_t = normalize(data.adj_t)
        return data

    def permuted(self, data: Any) -> tuple[Any, Tensor]:
        """The graph in the order of its parts, and where these begin."""
        parts = self.nodes // self.part
        if self.method == "blocks":
            perm = data.y.argsort(stable=True)
            ptr = torch.arange(parts + 1) * self.nodes // parts
        else:
            perm, ptr = partition(data.adj_t, parts, self.method, log=False)[:2]
        data = permute(data, perm, log=False)
        data.y = data.y % CLASSES
        return data, ptr

    def history_bytes(self) -> int:
        return (self.layers - 1) * history_bytes(self.nodes, self.channels)


class Trainer:
    """A model and its optimizer; steps on mini-batches, or on the whole graph."""

    def __init__(self, work: Work, device: torch.device, /, **options: Any) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = GCN(work.nodes, FEATURES, work.channels, CLASSES, work.layers, **options).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batch(self, batch: SubData) -> Tensor:
        """Train on a mini-batch, and return its loss."""
        batch = batch.to(self.device)
        data = batch.data
        out = self.model(data.x, data.adj_t, batch.batch_size, batch.n_id, batch.offset, batch.count)
        return self._learn(out, data.y[: batch.batch_size])

    def whole(self, data: Any) -> Tensor:
        """Train on the whole graph, and return its loss."""
        return self._learn(self.model(data.x, data.adj_t), data.y)

    def fill(self, rows: int = 2000) -> None:
        """Push every row once, so many at a time, as training does before its first step."""
        generator = torch.Generator().manual_seed(0)
        for history in self.model.tables:
            for start in range(0, history.num_embeddings, rows):
                count = min(rows, history.num_embeddings - start)
                history.push(
                    torch.randn(count, history.embedding_dim, generator=generator), offset=[start], count=[count]
                )

    def _learn(self, out: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(out, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

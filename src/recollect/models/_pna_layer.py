"""Principal neighbourhood aggregation as one layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from recollect._parameters import reset_parameters
from recollect.models._aggregate import AGGREGATORS, Messages

__all__ = ["SCALERS", "PNALayer"]

# From a target's in-degree d and the means of d and of log(d + 1) over the graph, to a factor.
SCALERS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "identity": lambda degree, mean, mean_log: torch.ones_like(degree),
    "amplification": lambda degree, mean, mean_log: (degree + 1).log() / mean_log,
    "attenuation": lambda degree, mean, mean_log: mean_log / (degree.clamp(min=1) + 1).log(),
    "linear": lambda degree, mean, mean_log: degree / mean,
    "inverse_linear": lambda degree, mean, mean_log: mean / degree.clamp(min=1),
}


class PNALayer(nn.Module):
    """Principal neighbourhood aggregation (Corso et al., arXiv 2004.05718), in GNNAutoScale's form.

    W X + b + the sum over pairs of an aggregator and a scaler of scale_k(V_k aggregate_k(ReLU(U_k X)) + c_k), each pair
    with its own U_k and V_k. The maps are applied to nodes and not to edges, so their cost does not grow with the
    degree. With edge features, E_k e is added before the ReLU, which then is applied to each edge.

    Args:
        in_channels: of X.
        out_channels: of the result, and between the maps.
        aggregators: of ``max``, ``mean``, ``min``, ``std``, ``sum``, ``var``.
        scalers: of ``identity``, ``amplification``, ``attenuation``, ``linear``, ``inverse_linear``.
        deg: the in-degree of every node of the training graph [num_nodes].
        edge_dim: features of each edge.

    Raises:
        ValueError: an unknown name, none at all, or degrees that are not those of nodes with edges.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        aggregators: Sequence[str],
        scalers: Sequence[str],
        deg: Tensor,
        edge_dim: int | None = None,
    ) -> None:
        super().__init__()
        _check_names("aggregators", aggregators, AGGREGATORS)
        _check_names("scalers", scalers, SCALERS)
        self.pairs = list(product(aggregators, scalers))
        degree = deg.detach().to(torch.float64)
        if degree.numel() == 0 or not bool((degree >= 0).all()) or not bool((degree > 0).any()):
            raise ValueError("deg must hold the in-degree of every node, some of them above 0")
        self.mean = float(degree.mean())
        self.mean_log = float((degree + 1).log().mean())
        self.lin = nn.Linear(in_channels, out_channels)
        self.pre_lins = nn.ModuleList(nn.Linear(in_channels, out_channels) for _ in self.pairs)
        self.post_lins = nn.ModuleList(nn.Linear(out_channels, out_channels) for _ in self.pairs)
        edge_lins = [] if edge_dim is None else [nn.Linear(edge_dim, out_channels, bias=False) for _ in self.pairs]
        self.edge_lins = nn.ModuleList(edge_lins)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in self.children():
            reset_parameters(module)

    def forward(self, x: Tensor, adj_t: Tensor, edge_attr: Tensor | None = None) -> Tensor:
        """Return [num_targets, out_channels].

        Args:
            x: [num_sources, in_channels]; the targets come first.
            adj_t: sparse CSR [num_targets, num_sources].
            edge_attr: [num_edges, edge_dim], in the adjacency's order, if there is an ``edge_dim``.

        Raises:
            ValueError: edge features are missing, or given without an ``edge_dim``.
        """
        if (edge_attr is None) == bool(self.edge_lins):
            found = "none were given" if edge_attr is None else f"{list(edge_attr.shape)} were given without"
            raise ValueError(f"edge_attr goes with edge_dim: {found}")
        degree = adj_t.crow_indices().diff().to(x.dtype).unsqueeze(-1)
        out: Tensor = self.lin(x[: adj_t.size(0)])
        for index, (aggregator, scaler) in enumerate(self.pairs):
            messages = self._messages(index, x, adj_t, edge_attr)
            scale = SCALERS[scaler](degree, self.mean, self.mean_log)
            out = out + self.post_lins[index](AGGREGATORS[aggregator](messages)) * scale
        return out

    def _messages(self, index: int, x: Tensor, adj_t: Tensor, edge_attr: Tensor | None) -> Messages:
        rows = self.pre_lins[index](x)
        if edge_attr is None:
            return Messages(rows.relu(), adj_t)
        return Messages(rows, adj_t, self.edge_lins[index](edge_attr), torch.relu)


def _check_names(argument: str, names: Sequence[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names or isinstance(names, str):
        raise ValueError(f"{argument}={names!r}: choose one or more of {', '.join(known)}, as a list")

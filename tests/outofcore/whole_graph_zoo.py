"""Small graphs, and networks for them."""

import torch
from torch.nn import functional as F
from torch_geometric.data import Data

N = 90


def a_graph(num_nodes: int = N, edges: int = 360, dtype: torch.dtype = torch.float64, labels: int = 0) -> Data:
    """Random edges, some of them twice, self-loops, and the last nodes without edges."""
    edge_index = torch.randint(num_nodes - 3, (2, edges))
    edge_index = torch.cat([edge_index, edge_index[:, :9], torch.arange(4).repeat(2, 1)], 1)
    y = torch.randint(2, (num_nodes, labels)).to(dtype) if labels else torch.randint(4, (num_nodes,))
    return Data(
        x=torch.randn(num_nodes, 7, dtype=dtype),
        edge_index=edge_index,
        y=y,
        train_mask=torch.rand(num_nodes) < 0.5,
    )


def sum_of_losses(data: Data):
    """The mean cross entropy of the training nodes, as a sum over parts."""
    number = int(data.train_mask.sum())

    def criterion(logits, y):
        if y.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / (number * y.size(1))
        return F.cross_entropy(logits, y, reduction="sum") / number

    return criterion


def plain_step(model, data, *args, seed=5):
    """Loss, gradients by name, and the next random number, with everything kept."""
    model.zero_grad()
    model.disable = True
    torch.manual_seed(seed)
    logits = model(data.x, data.edge_index, *args)
    loss = sum_of_losses(data)(logits[data.train_mask], data.y[data.train_mask])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.disable = False
    return loss.detach(), gradients, torch.rand(1)


def whole_step(whole, data, seed=5):
    whole.model.zero_grad()
    torch.manual_seed(seed)
    loss = whole.step(sum_of_losses(data))
    return loss, {name: p.grad for name, p in whole.model.named_parameters() if p.grad is not None}, torch.rand(1)

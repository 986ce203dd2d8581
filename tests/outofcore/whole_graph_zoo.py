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


def losses_by_label(data: Data):
    """A loss for each label, or the sum of each class' cross entropies, as sums over parts."""
    number = int(data.train_mask.sum())

    def criterion(logits, y):
        if y.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(0) / number
        each = F.cross_entropy(logits, y, reduction="none")
        return torch.stack([each[y == c].sum() for c in range(4)]) / number

    return criterion


def plain_jacobian(model, data, *args, seed=5):
    """Losses [m], the Jacobian [m, P] and its columns by parameter, and the next number, with everything kept."""
    model.disable = True
    torch.manual_seed(seed)
    logits = model(data.x, data.edge_index, *args)
    losses = losses_by_label(data)(logits[data.train_mask], data.y[data.train_mask])
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True) for loss in losses
    ]
    model.disable = False
    by_name = {
        name: torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows])
        for k, (name, p) in enumerate(parameters.items())
    }
    jacobian = torch.cat([each.flatten(1) for each in by_name.values()], 1)
    return losses.detach(), jacobian, by_name, torch.rand(1)

"""More pieces of random networks (see gramian_blocks): what moves elements, mixes them, or leaves some out."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from gramian_blocks import BLOCKS, Call, Net, Run, block
from torch import Tensor

import recollect

# Elements in another order, or some of them.


@block
def shuffled_and_back(net, r):
    layer, dim = net.linear(), r.randrange(2)

    def run(h, call):
        order = call.permutation(h.shape[dim])
        z = layer(h.index_select(dim, order)).tanh()
        return z.index_select(dim, order.argsort())

    return run


@block
def reordered(net, r):
    way, layer = r.randrange(8), net.linear()

    def run(h, call):
        dim, order = call.r.randrange(-3, 2), call.permutation(len(h))
        if way == 0:
            return layer(h).roll(call.r.randint(-2, 2), dim)
        if way == 1:
            return layer(h.flip(dim))
        if way == 2:
            return layer(h)[order]
        if way == 3:
            return layer(h[torch.arange(len(h))])
        if way == 4:
            return layer(h).gather(0, order.view(-1, 1, 1).expand_as(h))
        if way == 5:
            return layer(h)[order, :, torch.arange(1)].unsqueeze(2) + h
        if way == 6:
            return layer(h).sort(dim)[0]
        return torch.zeros_like(h).index_copy(0, order, layer(h))

    return run


@block
def chosen(net, r):
    way, layer = r.randrange(8), net.linear()

    def run(h, call):
        z, n, t = layer(h), *h.shape[:2]
        if way == 0:
            return z[call.numbers(n, n)]
        if way == 1:
            return h + z[torch.arange(n), call.numbers(t, n)].unsqueeze(1)
        if way == 2:
            return z.gather(1, call.numbers(t, n, t, 1).expand_as(h))
        if way == 3:
            return h + z[call.numbers(1, 1), call.numbers(t, t)]
        if way == 4:
            return h + torch.take_along_dim(z, call.numbers(t, n, 1, 1), 1)
        if way == 5:
            return h + z.topk(1, 1)[0]
        if way == 6:
            return h + torch.ops.aten.index(z, [torch.ones(n, dtype=torch.bool), torch.tensor(0)]).unsqueeze(1)
        return h + z[:1] if call.r.random() < 0.5 else h + z[-1]

    return run


@block
def a_part_of_the_batch(net, r):
    layer, way = net.linear(), r.randrange(6)

    def run(h, call):
        if way == 0:
            return torch.cat([layer(h[:1]).tanh(), h[1:]])
        if way == 1:
            return torch.cat([layer(part).tanh() for part in h.chunk(2)])
        if way == 2:
            parts = [h[::2], h[1::2]]
            return torch.cat([layer(parts[0]), parts[1]]) if len(h) > 1 else layer(h)
        if way == 3:
            return torch.cat([layer(part) for part in h.split(1, 1)], 1)
        if way == 4:
            mask = call.mask(len(h))
            z = h.clone()
            z[mask] = layer(h[mask]).tanh()
            return z
        return torch.where(call.mask(len(h), 1, 1), layer(h), h)

    return run


@block
def experts(net, r):
    layers, way, gate = [net.linear(), net.linear()], r.randrange(6), net.linear(net.width, 2)

    def run(h, call):
        gates = gate(h).softmax(-1)
        chosen, y = gates.argmax(-1), h
        for k, layer in enumerate(layers):
            if way == 0:
                index = (chosen[:, 0] == k).nonzero().flatten()
                y = y.index_add(0, index, layer(h[index]).tanh() * gates[index, :, k : k + 1])
            elif way == 1:
                mask = chosen == k
                y = y.masked_scatter(mask.unsqueeze(2), layer(h[mask]).tanh())
            elif way == 2:
                index = (chosen[:, 0] == k).nonzero().flatten()
                y = y.index_copy(0, index, layer(h.index_select(0, index)).tanh())
            elif way == 3:
                index = call.numbers(len(h), len(h)).view(-1, 1, 1).expand_as(h)
                y = y.scatter_add(0, index, layer(h).tanh())
            elif way == 4:
                y = y + layer(h) * (chosen == k).unsqueeze(2)
            else:
                index = (chosen == k).nonzero(as_tuple=True)
                y = y.index_put(index, layer(h[index]), accumulate=True)
        return y

    return run


# One operation, along any axis.

ALONG = {
    "softmax": lambda z, dim, call: z.softmax(dim),
    "log_softmax": lambda z, dim, call: z.log_softmax(dim),
    "cumsum": lambda z, dim, call: z.cumsum(dim),
    "roll": lambda z, dim, call: z.roll(call.r.choice((0, 1, -1)), dim),
    "flip": lambda z, dim, call: z.flip(dim),
    "sort": lambda z, dim, call: z.sort(dim)[0],
    "sum": lambda z, dim, call: z.sum(dim, keepdim=True) * z,
    "amax": lambda z, dim, call: z - z.amax(dim).unsqueeze(dim),
    "norm": lambda z, dim, call: z / (1 + z.norm(dim=dim, keepdim=True)),
    "logsumexp": lambda z, dim, call: z - z.logsumexp(dim, keepdim=True),
    "cat": lambda z, dim, call: torch.cat([z.narrow(dim, 0, 1), z], dim).narrow(dim, 0, z.shape[dim]),
    "cat of pieces": lambda z, dim, call: torch.cat(z.split(call.r.choice((1, 2, 9)), dim)[::-1], dim),
    "stack": lambda z, dim, call: torch.stack([z, z.sin()], dim).prod(dim),
    "unbind": lambda z, dim, call: torch.stack(z.unbind(dim)[::-1], dim),
    "select": lambda z, dim, call: z + z.select(dim, -1).unsqueeze(dim),
    "slice": lambda z, dim, call: F.pad(z.transpose(dim, -1)[..., 1:], (0, 1)).transpose(dim, -1),
    "gather": lambda z, dim, call: z.gather(dim, call.numbers(z.shape[dim], *z.shape)),
    "index_select": lambda z, dim, call: z.index_select(dim, call.numbers(z.shape[dim], z.shape[dim])),
    "index": lambda z, dim, call: z.movedim(dim, 0)[call.numbers(z.shape[dim], z.shape[dim])].movedim(0, dim),
    "scatter": lambda z, dim, call: z.scatter_add(dim, call.numbers(z.shape[dim], *z.shape), z.sin()),
    "index_add": lambda z, dim, call: z.index_add(dim, call.numbers(z.shape[dim], z.shape[dim]), z.sin()),
    "index_fill": lambda z, dim, call: z.index_fill(dim, call.numbers(z.shape[dim], 1), 0.5),
    "repeat": lambda z, dim, call: z.repeat([2 if d == dim else 1 for d in range(3)]).unflatten(dim, (2, -1)).prod(dim),
    "batch_norm": lambda z, dim, call: z if z.numel() == z.shape[dim] else
    F.batch_norm(z.movedim(dim, 1), None, None, training=True, eps=0.1).movedim(1, dim),
    "layer_norm": lambda z, dim, call:
    F.layer_norm(z.movedim(dim, -1), z.shape[dim : dim + 1], eps=0.1).movedim(-1, dim),
    "attention": lambda z, dim, call: F.scaled_dot_product_attention(*[z.movedim(dim, 0)] * 3).movedim(0, dim),
    "fft": lambda z, dim, call: torch.fft.fft(z, dim=dim).abs(),
    "windows": lambda z, dim, call: z.unfold(dim, 1, 1).squeeze(-1),
    "glu": lambda z, dim, call: F.glu(torch.cat([z, z.cos()], dim), dim),
    "product": lambda z, dim, call: z.movedim(dim, 0) @ z.movedim(dim, 0).mT @ z.movedim(dim, 0)
    if dim == 0 else z @ z.mT.softmax(-1) @ z,
    "where": lambda z, dim, call: torch.where(call.mask(*(n if d == dim else 1 for d, n in enumerate(z.shape))), z, 2),
    "view": lambda z, dim, call: z.movedim(dim, 0).reshape(-1, z.shape[0]).t().reshape(z.shape),
    "merge": lambda z, dim, call:
    z.movedim(dim, 0).flatten(0, 1).sin().unflatten(0, (z.shape[dim], -1)).movedim(0, dim),
}  # fmt: skip


def _along(name: str) -> None:
    def make(net: Net, r: random.Random) -> Run:
        layer, dim = net.linear(), r.choices((0, 1, 2), (1, 2, 2))[0]
        return lambda h, call: ALONG[name](layer(h), dim, call).tanh()

    BLOCKS[f"along an axis: {name}"] = make


for _name in ALONG:
    _along(_name)


# Views.


@block
def merged_and_split(net, r):
    layer, way = net.linear(), r.randrange(8)

    def run(h, call):
        n, t, d = h.shape
        if way == 0:
            return layer(h.reshape(n * t, d)).reshape(t, n, d).transpose(0, 1)
        if way == 1:
            return layer(h.reshape(t, n, d)).reshape(n, t, d)
        if way == 2:
            return layer(h.permute(1, 0, 2).reshape(t * n, 1, d)).view(t, n, d).permute(1, 0, 2)
        if way == 3 and n % 2 == 0:
            return layer(h.reshape(2, n // 2 * t, d)).reshape(n // 2, 2, t, d).flatten(0, 1)
        if way == 4 and n % 2 == 0:
            z = layer(h.view(2, n // 2, t, d)).transpose(0, 1).reshape(n, t, d)
            return z.tanh()
        if way == 5 and t % 2 == 0:
            return (
                layer(h.view(n, 2, t // 2, d).flatten(0, 1))
                .view(n, 2, t // 2, d)
                .sum(1, keepdim=True)
                .flatten(1, 2)[:, :1]
                + h
            )
        if way == 6:
            return layer(h.unfold(1, 1, 1).squeeze(-1))
        return layer(h.reshape(-1).view(n, t, d)).unsqueeze(0).squeeze(0)

    return run


@block
def repeated(net, r):
    layer, way = net.linear(), r.randrange(5)

    def run(h, call):
        n = len(h)
        if way == 0:
            return layer(h.repeat(2, 1, 1)).view(2, *h.shape).mean(0).tanh()
        if way == 1:
            return layer(h.repeat_interleave(2, 0)).view(n, 2, *h.shape[1:]).prod(1)
        if way == 2:
            z = layer(torch.cat([h, h.sin()]))
            return z[:n] * z[n:]
        if way == 3:
            first, second = layer(torch.stack([h, h.cos()])).unbind(0)
            return first * second
        return layer(h.unsqueeze(1).expand(-1, 2, -1, -1)).amax(1)

    return run


@block
def spread_over_positions(net, r):
    way = r.randrange(8)
    layer = net.linear()

    def run(h, call):
        t = h.shape[1]
        if way == 0:
            return layer(F.pad(h, (0, 0, 1, 1)))[:, 1:-1]
        if way == 1:
            return layer(h).cumsum(1).tanh()
        if way == 2:
            return F.interpolate(layer(h).transpose(1, 2), scale_factor=2)[..., :t].transpose(1, 2)
        if way == 3:
            return torch.fft.irfft(torch.fft.rfft(layer(h), dim=1), n=t, dim=1)
        if way == 4:
            return h + torch.cdist(layer(h), h).square().mean(2, keepdim=True).tanh() if t > 1 else h
        if way == 5:
            return F.max_pool1d(layer(h).transpose(1, 2), 3, 1, 1).transpose(1, 2)
        if way == 6:
            return layer(h) / (1 + torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True))
        return torch.diagonal(layer(h).unsqueeze(1) * h.unsqueeze(2), 0, 1, 2).transpose(1, 2)

    return run


# What mixes elements.


@block
def contrast(net, r):
    layer, way = net.linear(), r.randrange(7)

    def run(h, call):
        z = layer(h).tanh()
        if way == 0:
            weights = (z.flatten(1) @ h.flatten(1).t()).softmax(1)
            return (weights @ h.flatten(1)).view(h.shape)
        if way == 1:
            return z - z.mean(0)
        if way == 2:
            return z.softmax(0)
        if way == 3:
            return z.cumsum(0)
        if way == 4:
            return h + torch.einsum("atd,btd->at", z, h).unsqueeze(2).tanh()
        if way == 5:
            return h * z.square().mean()
        return h + z.amax(0, keepdim=True)

    return run


@block
def graph_convolution(net, r):
    layer, way = net.linear(), r.randrange(3)

    def run(h, call):
        n = len(h)
        adjacency = torch.rand(n, n) * call.mask(n, n)
        z = layer(h).flatten(1)
        if way == 0:
            return torch.sparse.mm(adjacency.to_sparse(), z).view(h.shape).tanh()
        if way == 1:
            return (adjacency @ z).view(h.shape).tanh()
        edges = adjacency.nonzero().t()
        out = torch.zeros_like(z).index_add(0, edges[0], z[edges[1]] * adjacency[edges[0], edges[1]].unsqueeze(1))
        return h + out.view(h.shape)

    return run


@block
def graph_of_positions(net, r):
    layer = net.linear()

    def run(h, call):
        t = h.shape[1]
        adjacency = (torch.rand(t, t) * call.mask(t, t)).to_sparse()
        z = layer(h).permute(1, 0, 2).flatten(1)
        return torch.sparse.mm(adjacency, z).view(t, len(h), -1).permute(1, 0, 2).tanh()

    return run


# In place, and where gradients are zero.


@block
def in_place(net, r):
    layer, p, way = net.linear(), net.parameter(net.width), r.randrange(9)

    def run(h, call):
        z = layer(h)
        if way == 0:
            return z.add_(p).relu_()
        if way == 1:
            z[:, 0] = p
        elif way == 2:
            z[call.permutation(len(z))] = p
        elif way == 3:
            z[:, call.r.randrange(z.shape[1])] *= p
        elif way == 4:
            z[0] = h[0] * p
        elif way == 5:
            z.masked_fill_(call.mask(*z.shape), 0.5)
        elif way == 6:
            z.index_put_((call.permutation(len(z)), call.numbers(z.shape[1], len(z))), p)
        elif way == 7:
            z.t_() if z.dim() == 2 else z.transpose_(0, 1)
            return z.add_(p).transpose(0, 1)
        else:
            z.unsqueeze_(1).squeeze_(1).mul_(p)
        return z

    return run


@block
def zeros(net, r):
    layer, other, way = net.linear(), net.linear(), r.randrange(7)

    def run(h, call):
        z = layer(h)
        if way == 0:
            return h + (z - 1).relu() * other(h)
        if way == 1:
            return h + z * call.mask(len(h), 1, 1)
        if way == 2:
            return h + torch.cat([z[:1].detach(), z[1:]])
        if way == 3:
            return h.detach() + z if call.r.random() < 0.5 else h + z.detach()
        if way == 4:
            return h + z * 0
        if way == 5:
            return F.dropout(z, 0.5, net.training) + h
        return h + z.masked_fill(call.mask(*h.shape[:2], 1), 0)

    return run


# Functions in Python.


class Unknown(torch.autograd.Function):
    """Nothing is known of it; it mixes elements, or not."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, p: Tensor, mixes: bool) -> Tensor:
        y = (h + p).softmax(0) if mixes else (h + p).tanh()
        ctx.mixes = mixes
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        grad = y * (grad - (grad * y).sum(0)) if ctx.mixes else grad * (1 - y * y)
        return grad, grad, None  # autograd sums it for the second one


class Entries(torch.autograd.Function):
    """Works entry by entry, and says so."""

    independent_axes = "all"

    @staticmethod
    def forward(ctx: Any, h: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(h, p)
        return h * p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, p = ctx.saved_tensors
        return grad * p, (grad * h).sum_to_size(p.shape)


class Turned(torch.autograd.Function):
    """[n, t, d] and a matrix to [t, n, d]: their product, the first two axes turned round."""

    independent_axes: tuple = ({0: 1, 1: 0}, {})

    @staticmethod
    def forward(ctx: Any, h: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(h, p)
        return (h @ p).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, p = ctx.saved_tensors
        grad = grad.transpose(0, 1)
        return grad @ p.t(), torch.einsum("btd,bte->de", h, grad)


@block
def functions_in_python(net, r):
    layer, p, square, way = net.linear(), net.parameter(net.width), net.parameter(net.width, net.width), r.randrange(5)

    def run(h, call):
        if way < 2:
            return Unknown.apply(layer(h), p, way == 0)
        if way == 2:
            return Entries.apply(layer(h), p)
        if way == 3:
            return Turned.apply(layer(h), square).transpose(0, 1).tanh()
        return Entries.apply(Unknown.apply(h, p, call.r.random() < 0.5), p.detach()) + layer(h)

    return run


# Parts that are not kept.


@block
def checkpointed(net, r):
    names = [name for name in BLOCKS if name != "checkpointed"]
    runs = [BLOCKS[r.choice(names)](net, r) for _ in range(r.randint(1, 2))]

    def run(h: Tensor, call: Call) -> Tensor:
        seed = call.r.random()

        def inside(z: Tensor) -> Tensor:
            own = Call(random.Random(seed), call.data)
            for part in runs:
                z = part(z, own)
            return z

        return recollect.checkpoint(inside, h)

    return run

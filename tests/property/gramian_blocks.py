"""The pieces of random networks whose losses' Gramian is computed: each takes [B, T, D] and gives [B, T, D].

``BLOCKS`` has for each name a function that is given the network under construction and random numbers, makes its
modules and parameters, and returns what runs them. What a piece draws when it runs, indices, masks, orders, it draws
from the call: the next call of the same network draws others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH = 6  # tables of positions have so many rows, and tables of elements


@dataclass
class Call:
    """One call: what is drawn while it runs."""

    r: random.Random
    data: Tensor

    def permutation(self, n: int) -> Tensor:
        return torch.tensor(self.r.sample(range(n), n), dtype=torch.long)

    def numbers(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape) < self.r.choice((0.3, 0.5, 0.9))


Run = Callable[[Tensor, Call], Tensor]


class Net(nn.Module):
    """A network under construction."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.parts, self.own = nn.ModuleList(), nn.ParameterList()
        self.tied = nn.Embedding(5, width)

    def add(self, module: nn.Module) -> Any:
        self.parts.append(module)
        return module

    def linear(self, *sizes: int) -> Any:
        into, out = sizes or (self.width, self.width)
        return self.add(nn.Linear(into, out))

    def parameter(self, *shape: int) -> nn.Parameter:
        self.own.append(nn.Parameter(torch.randn(shape) * 0.6))
        return self.own[-1]


BLOCKS: dict[str, Callable[[Net, random.Random], Run]] = {}


def block(make: Callable[[Net, random.Random], Run]) -> Callable[[Net, random.Random], Run]:
    BLOCKS[make.__name__] = make
    return make


# Layers that have rules.


@block
def linear(net, r):
    layer = net.linear()
    return lambda h, call: layer(h).tanh()


@block
def linear_of_merged_axes(net, r):
    layer = net.linear()
    return lambda h, call: layer(h.reshape(-1, net.width)).view(h.shape).tanh()


@block
def linear_of_time_first(net, r):
    layer = net.linear()
    return lambda h, call: layer(h.transpose(0, 1).flatten(0, 1)).view(h.shape[1], h.shape[0], -1).transpose(0, 1).sin()


@block
def linear_of_two_halves_of_the_batch(net, r):
    first, second = net.linear(), net.linear()
    return lambda h, call: torch.cat([first(h[: len(h) // 2]), second(h[len(h) // 2 :])]).tanh()


@block
def convolution_over_time(net, r):
    conv = net.add(nn.Conv1d(net.width, net.width, 3, padding=1, padding_mode=r.choice(("zeros", "replicate"))))
    return lambda h, call: conv(h.transpose(1, 2)).transpose(1, 2).tanh()


@block
def convolution_of_pixels(net, r):
    conv = net.add(nn.Conv2d(1, 1, 3, padding=1))
    return lambda h, call: h + conv(h.unsqueeze(1)).squeeze(1)


@block
def convolution_over_the_batch(net, r):
    conv = net.add(nn.Conv1d(net.width, net.width, 3, padding=1))
    return lambda h, call: conv(h.permute(1, 2, 0)).permute(2, 0, 1).tanh()


@block
def norm(net, r):
    own = net.add(r.choice((nn.LayerNorm, nn.RMSNorm))(net.width, eps=0.1))
    return lambda h, call: own(h)


@block
def group_norm(net, r):
    own = net.add(nn.GroupNorm(1, net.width, eps=0.1))
    return lambda h, call: own(h.transpose(1, 2)).transpose(1, 2)


@block
def instance_norm(net, r):
    own = net.add(nn.InstanceNorm1d(net.width, eps=0.1, affine=True))
    return lambda h, call: own(h.transpose(1, 2)).transpose(1, 2) if h.shape[1] > 1 else h


@block
def batch_norm(net, r):
    own, first = net.add(nn.BatchNorm1d(net.width, eps=0.1, momentum=0.0)), net.linear()
    merged = r.random() < 0.5

    def run(h, call):
        if h.shape[0] * h.shape[1] == 1:
            return h
        z = first(h)
        return own(z.flatten(0, 1)).view(h.shape) if merged else own(z.transpose(1, 2)).transpose(1, 2)

    return run


@block
def recurrent(net, r):
    kind, first = r.choice((nn.LSTM, nn.GRU, nn.RNN)), r.random() < 0.7
    own = net.add(kind(net.width, net.width, batch_first=first, num_layers=r.choice((1, 1, 2))))
    return lambda h, call: own(h)[0]


@block
def recurrent_on_sequences_of_any_length(net, r):
    own = net.add(nn.GRU(net.width, net.width, batch_first=True))

    def run(h, call):
        lengths = [call.r.randint(1, h.shape[1]) for _ in h]
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        out = nn.utils.rnn.pad_packed_sequence(own(packed)[0], batch_first=True, total_length=h.shape[1])
        return h + out[0]

    return run


@block
def recurrent_cell(net, r):
    cell = net.add(nn.GRUCell(net.width, net.width))

    def run(h, call):
        state, states = torch.zeros_like(h[:, 0]), []
        for step in h.unbind(1):
            state = cell(step, state)
            states.append(state)
        return torch.stack(states, 1)

    return run


@block
def attention_module(net, r):
    own = net.add(nn.MultiheadAttention(net.width, 1, batch_first=r.random() < 0.8))
    weights = r.random() < 0.5
    return lambda h, call: h + own(h, h, h, need_weights=weights)[0]


@block
def attention(net, r):
    q, k, v = net.linear(), net.linear(), net.linear()
    causal = r.random() < 0.5

    def run(h, call):
        heads = [layer(h).unsqueeze(1) for layer in (q, k, v)]
        return h + F.scaled_dot_product_attention(*heads, is_causal=causal).squeeze(1)

    return run


@block
def attention_by_products(net, r):
    qkv = net.linear(net.width, 3 * net.width)

    def run(h, call):
        q, k, v = qkv(h).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v

    return run


@block
def embedding(net, r):
    table = net.add(nn.Embedding(5, net.width)) if r.random() < 0.5 else net.tied
    return lambda h, call: h + table(call.numbers(5, *h.shape[:2]))


@block
def bilinear(net, r):
    own = net.add(nn.Bilinear(net.width, net.width, net.width))
    return lambda h, call: own(h, h.flip(1)).tanh()


@block
def one_after_another(net, r):
    layer = net.linear()
    return lambda h, call: torch.stack([layer(element) for element in h]).tanh()


@block
def called_twice(net, r):
    layer = net.linear()
    if r.random() < 0.5:
        return lambda h, call: layer(layer(h).sin()).tanh()
    return lambda h, call: layer(h).sin() + layer(h.roll(1, 0)).cos()


@block
def a_layer_of_another(net, r):
    layers = [part for part in net.parts if type(part) is nn.Linear and part.weight.shape[0] == part.weight.shape[1]]
    layer = r.choice(layers) if layers else net.linear()
    way = r.randrange(3)
    if way == 0:
        return lambda h, call: layer(h.mean(1, keepdim=True)).tanh() + h
    if way == 1:
        return lambda h, call: h @ layer.weight + layer.bias
    return lambda h, call: F.linear(h, layer.weight.t()).sin()


# Parameters that functions use.


@block
def functions(net, r):
    weight, bias = net.parameter(net.width, net.width), net.parameter(net.width)
    way = r.choice(("linear", "einsum", "matmul", "mm", "addmm", "norm", "conv", "baddbmm", "scale"))

    def run(h, call):
        flat = h.flatten(0, 1)
        if way == "linear":
            return F.linear(h, weight, bias).tanh()
        if way == "einsum":
            return torch.einsum("btd,de->bte", h, weight).tanh()
        if way == "matmul":
            return (h @ weight + bias).sin()
        if way == "mm":
            return (flat @ weight.t()).view(h.shape).sin()
        if way == "addmm":
            return torch.addmm(bias, flat, weight, alpha=call.r.choice((1, 2)), beta=call.r.choice((1, 3))).view(
                h.shape
            )
        if way == "norm":
            return F.layer_norm(h, (net.width,), weight[0], bias, 0.1)
        if way == "conv":
            return F.conv1d(h.transpose(1, 2), weight.unsqueeze(2), bias).transpose(1, 2).tanh()
        if way == "baddbmm":
            return torch.baddbmm(bias.expand(1, 1, -1), h, weight.expand(len(h), -1, -1)).tanh()
        return h * bias + weight[0]

    return run


@block
def computed_weights(net, r):
    first, second = net.parameter(net.width, 2), net.parameter(2, net.width)
    square = net.parameter(net.width, net.width)
    way = r.randrange(4)

    def run(h, call):
        if way == 0:
            return h @ (first @ second).tanh()
        if way == 1:
            return h @ (square.tril() + square.t())
        if way == 2:
            return F.linear(h, square * (first[:, :1] / square.norm(dim=1, keepdim=True)))
        return h @ square.softmax(0) + first.sum(1)

    return run


@block
def hypernetwork(net, r):
    code, layer = net.parameter(2), net.linear(2, net.width * net.width)
    return lambda h, call: (h @ layer(code).view(net.width, net.width)).tanh()


@block
def hypernetwork_of_data(net, r):
    layer = net.linear(net.width, net.width * net.width)
    return lambda h, call: torch.bmm(h, layer(h.mean(1)).view(-1, net.width, net.width)).tanh()


@block
def parameters_of_elements(net, r):
    table, way = net.parameter(LENGTH, net.width), r.randrange(4)

    def run(h, call):
        rows = call.numbers(LENGTH, len(h))
        if way == 0:
            return h + table[rows].unsqueeze(1)
        if way == 1:
            return h * table[: len(h), None]
        if way == 2:
            return h + table.index_select(0, rows).unsqueeze(1).sin()
        return h + F.embedding(rows, table)[:, None]

    return run


@block
def positions(net, r):
    table, layer, way = net.parameter(LENGTH, net.width), net.linear(), r.randrange(4)

    def run(h, call):
        if way == 0:
            return h + table[: h.shape[1]]
        if way == 1:
            return layer(h + table[: h.shape[1]].expand(len(h), -1, -1)).tanh()
        if way == 2:
            return h + layer(table)[call.numbers(LENGTH, h.shape[1])]
        return h + table[torch.arange(h.shape[1])]

    return run


@block
def class_token(net, r):
    token, layer, back = net.parameter(1, 1, net.width), net.linear(), r.random() < 0.5

    def run(h, call):
        z = torch.cat([token.expand(len(h), -1, -1), h], 1)
        z = layer(z * z.mean(1, keepdim=True)).tanh()
        return z[:, 1:] if back else z[:, :1] + h

    return run


@block
def queries(net, r):
    own, layer = net.parameter(2, net.width), net.linear()
    return lambda h, call: h + ((layer(own) @ h.mT).softmax(-1) @ h).mean(1, keepdim=True)


@block
def mixing_of_positions(net, r):
    weight = net.parameter(LENGTH, LENGTH)
    return lambda h, call: torch.einsum("st,btd->bsd", weight[: h.shape[1], : h.shape[1]], h)


@block
def layer_scale(net, r):
    scale, layer = net.parameter(net.width if r.random() < 0.5 else 1), net.linear()
    return lambda h, call: h + scale * layer(h).tanh()


@block
def squeeze_and_excitation(net, r):
    layer = net.linear()
    return lambda h, call: h * layer(h.mean(1)).sigmoid().unsqueeze(1)


@block
def sparse_features(net, r):
    weight = net.parameter(LENGTH, net.width)

    def run(h, call):
        features = (torch.rand(len(h), LENGTH) * call.mask(len(h), LENGTH)).to_sparse()
        return h + torch.sparse.mm(features, weight).unsqueeze(1)

    return run

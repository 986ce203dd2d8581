"""What a step costs: block evaluations, memory, and nothing of the caller's."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.memory import peak_memory
from recollect.reversible import GroupAddRev

_CALLS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class Counting(nn.Module):
    """A block that counts its evaluations: not in an attribute, which a rebuild puts back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, graph: Any) -> Tensor:
        _CALLS[self] = _CALLS.get(self, 0) + 1
        return self.dropout(self.linear(x).tanh())


def chain(depth: int, groups: int, **options: Any) -> nn.ModuleList:
    return nn.ModuleList(GroupAddRev(Counting(4), num_groups=groups, **options) for _ in range(depth)).double()


def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, None)
    return x


def calls(layers: nn.ModuleList) -> list[int]:
    return [_CALLS.pop(block, 0) for layer in layers for block in layer.convs]


class TestEvaluations:
    @pytest.mark.parametrize("groups", [2, 3, 4])
    @pytest.mark.parametrize("depth", [1, 2, 7])
    @pytest.mark.parametrize("anchor_every", [None, 2])
    def test_each_block_twice_a_step(self, depth, groups, anchor_every, features):
        layers, x = chain(depth, groups, anchor_every=anchor_every), features(4 * groups)
        for _ in range(2):
            run(layers, x).sum().backward()
            assert calls(layers) == [2] * (depth * groups)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_once_without_grad(self, mode, features):
        layers = chain(3, 2)
        with mode():
            run(layers, features(8))
        assert calls(layers) == [1] * 6

    def test_once_when_disabled(self, features):
        layers = chain(3, 2, disable=True)
        run(layers, features(8)).sum().backward()
        assert calls(layers) == [1] * 6

    def test_once_when_never_backward(self, features):
        layers = chain(3, 2)
        loss = run(layers, features(8)).sum()
        del loss
        assert calls(layers) == [1] * 6

    def test_frozen_layers_below_are_not_rebuilt(self, features):
        layers = chain(4, 2)
        layers[0].requires_grad_(False)
        layers[1].requires_grad_(False)
        run(layers, features(8, grad=False)).sum().backward()
        assert calls(layers) == [1] * 4 + [2] * 4

    def test_gradients_of_the_last_layer_rebuild_that_alone(self, features):
        layers = chain(4, 2)
        torch.autograd.grad(run(layers, features(8)).sum(), list(layers[3].parameters()))
        assert calls(layers) == [1] * 6 + [2] * 2

    def test_inverse_without_grad(self, features):
        layers = chain(1, 3)
        with torch.no_grad():
            layers[0].inverse(features(12), None)
        assert calls(layers) == [1] * 3


class TestInputsOfTheCaller:
    @pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
    @pytest.mark.parametrize("kind", ["leaf", "computed", "slice"])
    def test_bit_identical(self, mode, kind, features):
        layers = chain(3, 2).train(mode == "train")
        base = features(16)
        base = base if kind == "leaf" else base * 1
        x = base[:, 4:12] if kind == "slice" else base.detach()[:, :8].contiguous().requires_grad_()
        before, before_base = x.detach().clone(), base.detach().clone()
        context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
        with context():
            y = run(layers, x)
        assert torch.equal(x, before)
        assert torch.equal(base, before_base)
        if y.requires_grad:
            y.sum().backward()
            assert torch.equal(x, before)
            assert torch.equal(base, before_base)

    def test_every_activation_stays_readable(self, features):
        layers, h = chain(4, 2).eval(), features(8)
        held = [h]
        for layer in layers:
            held.append(layer(held[-1], None))
        copies = [h.detach().clone() for h in held]
        held[-1].sum().backward()
        assert all(torch.equal(h, c) for h, c in zip(held, copies, strict=True))

    def test_a_chain_holds_one_activation(self):
        layers, x = chain(16, 2).eval(), torch.randn(1000, 8, dtype=torch.float64)
        activation = 1000 * 8 * 8
        with peak_memory("cpu") as memory:
            y = run(layers, x)
            assert activation <= memory.current_bytes < 1.5 * activation
            loss = y.sum()
            del y
            assert memory.current_bytes < 1.5 * activation
            loss.backward()

    def test_input_changed_in_place_afterwards(self, naive, same_training, features):
        layers, x = chain(2, 2), features(8)

        def changed() -> Tensor:
            h = x * 1
            y = run(layers, h)
            with torch.no_grad():
                h.zero_()
            return y

        same_training(changed, lambda: naive(layers[1].convs, naive(layers[0].convs, x, None), None), [x])


class TestMemory:
    @staticmethod
    def peak(depth: int, groups: int = 2, **options: Any) -> int:
        layers = chain(depth, groups, **options)
        x = torch.randn(1000, 4 * groups, dtype=torch.float64)
        for parameter in layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with peak_memory("cpu") as memory:
            run(layers, x).sum().backward()
        return memory.peak_bytes

    @pytest.mark.parametrize("groups", [2, 4])
    def test_flat_in_depth(self, groups):
        assert self.peak(64, groups) <= 1.05 * self.peak(8, groups)

    def test_the_measure_sees_growth(self):
        assert self.peak(32, disable=True) > 3 * self.peak(8, disable=True)

    def test_an_anchor_costs_one_activation(self):
        activation = 1000 * 8 * 8
        growth = self.peak(32, anchor_every=8) - self.peak(32)
        assert activation <= growth <= 4 * activation

    def test_nothing_stays_after_a_step(self, features):
        layers = chain(8, 2)
        for parameter in layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x = features(8)
        x.grad = torch.zeros_like(x)
        with peak_memory("cpu") as memory:
            run(layers, x).sum().backward()
            run(layers, x)  # and without backward
        assert memory.current_bytes == 0

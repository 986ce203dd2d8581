"""Random losses of random networks, and their Gramian by an engine and by plain autograd.

``run(seed)`` gives a :class:`Verdict`; ``python gramian_programs.py SEED`` prints one program's.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gramian_moves  # noqa: F401 - adds its blocks to the table
import torch
import torch.nn.functional as F
from gramian_blocks import BLOCKS, Call, Net
from torch import Tensor, nn

from recollect.autogram import Engine

LIMIT = 1e-9
Loss = Callable[[Tensor, Call], Tensor]

# From what a network gives, [B, T, D], to losses.
LOSSES: dict[str, Callable[[Net, random.Random], Loss]] = {}
# What becomes of the losses then.
ENDS: dict[str, Callable[[Tensor, Call], Tensor]] = {
    "as they are": lambda losses, call: losses,
    "sines": lambda losses, call: losses.sin(),
    "in double": lambda losses, call: losses.double(),
    "transposed": lambda losses, call: losses.t() if losses.dim() == 2 else losses,
    "flattened": lambda losses, call: losses.flatten(),
    "in a column": lambda losses, call: losses.unsqueeze(-1),
    "two of each": lambda losses, call: torch.stack([losses, losses.sin() + losses], -1),
    "two of each in front": lambda losses, call: torch.stack([losses, losses.square()]),
    "behind one another": lambda losses, call: torch.cat([losses.flatten(), losses.flatten().cos()]),
    "rolled": lambda losses, call: losses.flatten().roll(call.r.randint(0, 3)),
    "shuffled": lambda losses, call: losses.flatten()[call.permutation(losses.numel())],
    "chosen": lambda losses, call: losses[losses.detach() > losses.detach().mean()] if losses.numel() > 1 else losses,
    "some twice": lambda losses, call: losses.flatten()[call.numbers(losses.numel(), 4)] if losses.numel() else losses,
    "without the first": lambda losses, call: losses[1:] if losses.dim() and len(losses) > 1 else losses,
    "masked": lambda losses, call: losses * call.mask(*losses.shape),
    "weighted": lambda losses, call: losses / (1 + losses.square().mean()),
    "compared": lambda losses, call: losses - losses.mean(0) if losses.dim() else losses,
    "the mean": lambda losses, call: losses.mean(),
    "of groups": lambda losses, call: torch.stack([part.mean() for part in losses.flatten().split(2)]),
}


# Pieces and ends behind which an axis of the losses is mostly gone: most programs have none of them.
MIXING = {
    "linear_of_two_halves_of_the_batch", "convolution_over_the_batch", "batch_norm", "one_after_another", "bilinear",
    "recurrent_on_sequences_of_any_length", "contrast", "graph_convolution", "of_pairs", "behind one another", "rolled",
    "shuffled", "chosen", "some twice", "weighted", "of groups", "the mean",
}  # fmt: skip


def loss(make: Callable[[Net, random.Random], Loss]) -> Callable[[Net, random.Random], Loss]:
    LOSSES[make.__name__] = make
    return make


@loss
def of_elements(net, r):
    return lambda h, call: (h - call.data).square().sum((1, 2))


@loss
def of_tokens(net, r):
    return lambda h, call: h.sin().sum(2)


@loss
def of_merged_tokens(net, r):
    return lambda h, call: h.sin().sum(2).flatten()


@loss
def of_classes(net, r):
    layer, tied, merged = net.linear(net.width, 5), r.random() < 0.5, r.random() < 0.5

    def run(h, call):
        logits = h @ net.tied.weight.t() if tied else layer(h)
        targets = call.numbers(5, *h.shape[:2])
        targets[call.mask(*h.shape[:2]) & (call.r.random() < 0.3)] = -100
        if merged:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    return run


@loss
def of_tasks(net, r):
    heads = [net.linear(net.width, 1) for _ in range(r.choice((2, 3)))]
    dim, mean = r.choice((0, 1)), r.random() < 0.4

    def run(h, call):
        losses = [head(h.mean(1)).squeeze(1).square() for head in heads]
        return torch.stack([one.mean() for one in losses]) if mean else torch.stack(losses, dim)

    return run


@loss
def of_pairs(net, r):
    layer, way = net.linear(), r.randrange(3)

    def run(h, call):
        first, second = layer(h.mean(1)), h[:, 0]
        logits = first @ second.t()
        if way == 0:
            return F.cross_entropy(logits, torch.arange(len(h)), reduction="none")
        return logits.diagonal() if way == 1 else logits

    return run


@loss
def of_outputs(net, r):
    layer, way = net.linear(net.width, 2), r.randrange(4)

    def run(h, call):
        if way == 0:
            return layer(h).square().sum(1)
        if way == 1:
            return F.mse_loss(layer(h)[:, 0], call.data[:, 0, :2], reduction="none")
        if way == 2:
            return h.square().sum((0, 2))
        return h[:, 0].square().sum(0)

    return run


@loss
def of_parameters_too(net, r):
    weight, layer = net.parameter(net.width), net.linear()

    def run(h, call):
        losses = layer(h).square().mean((1, 2))
        if call.r.random() < 0.5:
            return torch.cat([losses, weight.square().sum()[None], layer.weight.norm()[None]])
        return losses + weight.square().sum() + (layer.weight**2).mean()

    return run


class Program(nn.Module):
    """A random network and its losses."""

    def __init__(self, seed: int, names: Sequence[str] = ()) -> None:
        super().__init__()
        r = random.Random(seed)
        torch.default_generator.manual_seed(seed)
        self.net = Net(r.choice((2, 3, 4)))
        kind = r.choices(("apart", "one mixes", "any"), (55, 30, 15))[0]

        def choose(table: Any) -> str:
            return r.choice([name for name in table if kind == "any" or name not in MIXING])

        self.names = [*names, *(choose(BLOCKS) for _ in range(r.choice((1, 2, 2, 3, 4)) - len(names)))]
        if kind == "one mixes" and not names:
            self.names[r.randrange(len(self.names))] = r.choice(list(BLOCKS))
        self.runs = [BLOCKS[name](self.net, r) for name in self.names]
        self.names += [choose(LOSSES), *(choose(ENDS) for _ in range(r.choice((1, 1, 2))))]
        self.loss = LOSSES[self.names[len(self.runs)]](self.net, r)
        self.double()

    def forward(self, seed: int, sizes: tuple[int, int]) -> Tensor:
        torch.default_generator.manual_seed(seed)
        data = torch.randn(*sizes, self.net.width)
        call = Call(random.Random(seed), data)
        h = data.clone()
        for part in self.runs:
            h = part(h, call)
        losses = self.loss(h, call)
        for name in self.names[len(self.runs) + 1 :]:
            losses = ENDS[name](losses, call)
        return losses


@dataclass
class Draw:
    """One call's data, and the Gramian of its losses by plain autograd; None: there is nothing to be compared."""

    seed: int
    sizes: tuple[int, int]
    training: bool
    truth: Tensor | None = None
    shape: tuple[int, ...] = ()


@dataclass
class Verdict:
    """What became of a program.

    Attributes:
        seed: its.
        names: of its pieces.
        compared: how many Gramians were compared.
        apart: how many had several losses in one pass.
        refused: how many were refused with an integer for the batch dimension, as they may be.
        faults: what went wrong.
    """

    seed: int
    names: list[str]
    compared: int = 0
    apart: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"seed {self.seed}: {', '.join(self.names)}\n  " + "\n  ".join(self.faults)


def explicit_gramian(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    rows = []
    for one in losses.flatten():
        grads = torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        rows.append(torch.cat([torch.zeros(p.numel()) if g is None else g.to_dense().flatten() for g, p in pairs]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.t()


def error(found: Tensor, truth: Tensor, shape: tuple[int, ...]) -> float:
    """Return the largest error of an entry over the norms of the two gradients; tiny gradients count as larger ones."""
    k = len(shape)
    if found.shape != (*shape, *reversed(shape)) or not found.isfinite().all():
        return float("inf")
    found = found.permute([*range(k), *reversed(range(k, 2 * k))]).reshape(truth.shape)
    norms = truth.diagonal().clamp_min(0).sqrt()
    norms = norms.clamp_min(float(norms.max()) * 1e-5).clamp_min(1e-9)  # zero but for rounding
    return float(((found - truth).abs() / (norms[:, None] * norms)).max())


def _targets(program: Program, r: random.Random) -> list[nn.Module]:
    """Return the modules of the engine: mostly the network, else some of its parts."""
    if r.random() < 0.85:
        return [program.net]
    parts = [part for part in (*program.net.parts, program.net.own, program.net.tied) if r.random() < 0.5]
    return parts or [program.net]


def _draws(r: random.Random, program: Program, targets: Sequence[nn.Module], count: int) -> list[Draw]:
    draws = []
    base = (r.choice((1, 2, 2, 3, 4)), r.choice((1, 2, 2, 3)))
    for _ in range(count):
        sizes = base if r.random() < 0.7 else (r.choice((1, 2, 3, 4, 5)), r.choice((1, 2, 3)))
        draw = Draw(r.randrange(2**31), sizes, r.random() < 0.7)
        program.train(draw.training)
        losses = program(draw.seed, sizes)
        draw.shape = tuple(losses.shape)
        if losses.requires_grad and losses.numel():
            parameters = [p for target in targets for p in target.parameters() if p.requires_grad]
            truth = explicit_gramian(losses, parameters) if parameters else torch.zeros(losses.numel(), losses.numel())
            draw.truth = truth if truth.isfinite().all() else None
        draws.append(draw)
    return draws


def run(seed: int, names: Sequence[str] = (), *, every: bool = False, make: Callable[..., Any] = Engine) -> Verdict:
    """Compare the Gramians of one program.

    Args:
        seed: of the program.
        names: pieces that it begins with.
        every: whether all batch dimensions are tried, and not some of them.
        make: what makes the engines.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _run(seed, names, every, make)
    finally:
        torch.set_default_dtype(before)


def _choices(engine: Any) -> list[Any]:
    return [choice for known in engine._known.values() for choice in known.choices.values()]


def _run(seed: int, names: Sequence[str], every: bool, make: Callable[..., Any]) -> Verdict:
    program, r = Program(seed, names), random.Random(~seed)
    for p in program.parameters():
        p.requires_grad_(r.random() < 0.93)
    targets = _targets(program, r)
    draws = _draws(r, program, targets, r.choice((2, 2, 2, 3)))
    verdict = Verdict(seed, program.names)
    dims: list[Any] = [*range(-1, max(len(draw.shape) for draw in draws)), None]
    for batch_dim in ["auto", *(dims if every else [r.choice(dims)])]:
        engine = make(*targets, batch_dim=batch_dim)
        for number, draw in enumerate(draws):
            k = len(draw.shape)
            if draw.truth is None or (isinstance(batch_dim, int) and not -k <= batch_dim < k):
                continue
            program.train(draw.training)
            label = f"batch_dim={batch_dim}, call {number}, sizes {draw.sizes}, losses {draw.shape}"
            try:
                found = engine.compute_gramian(program(draw.seed, draw.sizes))
            except Exception as problem:
                if isinstance(batch_dim, int) and isinstance(problem, ValueError) and "independent" in str(problem):
                    verdict.refused += 1
                else:
                    verdict.faults.append(f"crash, {label}: {type(problem).__name__}: {str(problem)[:300]}")
                continue
            verdict.compared += 1
            verdict.apart += any(choice.passes < found.numel() ** 0.5 for choice in _choices(engine))
            wrong = error(found, draw.truth, draw.shape)
            if not wrong < LIMIT:
                verdict.faults.append(f"wrong, {label}: an error of {wrong:.1e}")
        del engine
    return verdict


if __name__ == "__main__":
    sys.stdout.write(f"{run(int(sys.argv[1]), every=True)}\n")

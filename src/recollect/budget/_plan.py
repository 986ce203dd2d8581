"""A plan: measured, solved, applied, and verified by a real step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recollect._arguments import Certify, check_certify
from recollect._util._tree import tensors_of
from recollect.budget._bytes import as_bytes, in_words
from recollect.budget._measure import Measured, Options, measure
from recollect.budget._problem import problem_of
from recollect.budget._solve import Choice, least, solve
from recollect.budget._step import Step, apart, is_within
from recollect.budget._treatment import Applied, Treated
from recollect.budget._units import Units, find_units, is_inverted
from recollect.frames import Forward, Kept, Offload, Previous, Source, frames_apply, in_backward

__all__ = ["BudgetError", "BudgetWarning", "Plan", "Row", "plan"]

OnExceed = Literal["warn", "replan", "raise"]
_STRATEGIES = ("store", "checkpoint", "link", "selective", "invert")
_CORRECTIONS = 3
_FINE = 64  # by such a part of the budget less is looked for, where the choice was too much
_ENOUGH = 0.95  # of the budget in use, above which no correction looks for more


class BudgetError(RuntimeError):
    """A step does not fit in the budget.

    Attributes:
        least: the smallest peak in bytes that was measured.

    Example:
        >>> import recollect, torch
        >>> from recollect.budget import BudgetError
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])
        >>> try:
        ...     recollect.plan(model, torch.randn(512, 32), budget="1 kB")
        ... except BudgetError as error:
        ...     print(error.least > 1000)
        True
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


class BudgetWarning(UserWarning):
    """A step with inputs of another size than the plan's example exceeds the budget.

    Example:
        >>> import recollect, torch, warnings
        >>> from recollect.budget import BudgetWarning
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])
        >>> plan = recollect.plan(model, torch.randn(64, 32), budget="100 kB")
        >>> with plan, warnings.catch_warnings(record=True) as found:
        ...     warnings.simplefilter("always", BudgetWarning)
        ...     _ = model(torch.randn(640, 32))
        >>> [warning.category.__name__ for warning in found]
        ['BudgetWarning']
    """


@dataclass(frozen=True)
class Row:
    """One line of a plan's table.

    Args:
        unit: its name.
        keeps: bytes from its forward to its backward, as measured with everything kept in it.
        strategy: ``"store"``, ``"checkpoint"``, ``"link"`` (a checkpoint whose input the unit before makes again),
            ``"selective"``, ``"offload"`` or ``"invert"``.
        bytes: that it keeps with this strategy.
        seconds: that the strategy adds to a step.

    Example:
        >>> import recollect, torch
        >>> model = torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(3)])
        >>> row = recollect.plan(model, torch.randn(64, 32, requires_grad=True), budget="1 MB").rows[0]
        >>> row.unit, row.strategy, row.keeps, row.bytes  # of 64 * 32 numbers
        ('0', 'store', 8192, 8192)
    """

    unit: str
    keeps: int
    strategy: str
    bytes: int
    seconds: float


class _Guard(Forward):
    """Tries steps of the model whose inputs are larger than any before."""

    __slots__ = ("plan",)

    def __init__(self, module: nn.Module, plan: Plan | None = None) -> None:
        super().__init__(module)
        self.plan = plan  # a copy of the model has none

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        plan = self.plan
        if plan is not None and frames_apply() and not in_backward():
            plan._look(args, kwargs)
        return self.own()(*args, **kwargs)


class Plan:
    """What is kept of each unit, so that a step stays within a budget; see :func:`plan`.

    Attributes:
        rows: one for each call of a unit, in order.
        budget: in bytes.
        peak: of a step, in bytes, as measured.
        seconds: that the plan adds to a step, as estimated from its units.
        steps: how many steps were measured.

    Example:
        >>> import recollect, torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])
        >>> plan = recollect.plan(model, torch.randn(64, 32), budget="1 MB")
        >>> plan.apply().peak <= plan.budget == 1_000_000
        True
        >>> model(torch.randn(64, 32)).sum().backward()
        >>> plan.remove()
    """

    def __init__(self, step: Step, budget: int, units: dict[str, nn.Module], options: Options, on: OnExceed) -> None:
        self.budget = budget
        self.peak = 0
        self.seconds = 0.0
        self.steps = 0
        self.rows: tuple[Row, ...] = ()
        self._step = step
        self._units = units
        self._options = options
        self._on_exceed = on
        self._applied: Applied | None = None
        self._known = [step.shapes()]  # of steps that were tried
        self._looking = False

    # What users call.

    def apply(self) -> Plan:
        """Apply the plan to the model, and return it; does nothing if it is applied."""
        if self._applied is None:
            guards = [] if self._step.whole is not None else [_Guard(self._step.model, self)]
            self._applied = Applied([*self._treated(), *guards])
        return self

    def remove(self) -> None:
        """Leave the model as it was; does nothing if the plan is not applied."""
        applied, self._applied = self._applied, None
        if applied is not None:
            applied.remove()

    def __enter__(self) -> Plan:
        return self.apply()

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def __str__(self) -> str:
        head = ("unit", "everything", "strategy", "keeps", "adds")
        body = [(r.unit, in_words(r.keeps), r.strategy, in_words(r.bytes), f"{1e3 * r.seconds:.2f} ms")
                for r in self.rows]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}  {e:>{widths[4]}}".rstrip()
            for a, b, c, d, e in (head, *body)
        ]
        lines.append(
            f"peak {in_words(self.peak)} (measured) of {in_words(self.budget)}; adds {1e3 * self.seconds:.1f} ms to a "
            "step (estimated)"
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Plan(budget={self.budget}, peak={self.peak}, units={len(self._units)})"

    # How it comes about.

    def _make(self, given: tuple[Row, ...] = ()) -> None:
        step = self._step
        if given and (peak := self._verify(given)) <= self.budget:
            self.peak, self.seconds = peak, _seconds(given)
            return
        with step.tried():
            measured = measure(self._units, step.forward, step.model, (step.args, step.kwargs), self._options)
        self.steps += 1
        if not measured.calls:
            raise ValueError(f"none of the units {', '.join(self._units)} ran with gradients; name others by units=")
        target, found, tried, over = self.budget, None, list[tuple[Row, ...]](), False
        for _ in range(1 + _CORRECTIONS):
            rows = self._choose(measured, target)
            while over and rows in tried:  # what was too much is not tried again, but something that takes less
                target -= max(1, self.budget // _FINE)
                rows = self._choose(measured, target)
            if rows is None or rows in tried:
                break
            tried.append(rows)
            peak = self._verify(rows)
            over = peak > self.budget
            if over:
                target -= peak - self.budget + 1
                continue
            if found is None or _seconds(rows) < _seconds(found[1]):
                found = peak, rows
            if _seconds(rows) == 0.0 or peak >= _ENOUGH * self.budget:
                break
            target += self.budget - peak
        self.peak, self.rows = found if found is not None else self._smallest(measured)
        self.seconds = _seconds(self.rows)

    @staticmethod
    def _choose(measured: Measured, budget: int) -> tuple[Row, ...] | None:
        choice = solve(problem_of(measured, budget))
        return None if choice is None else _rows(measured, choice)

    def _verify(self, rows: tuple[Row, ...]) -> int:
        """Return the peak of a real step with this choice."""
        self.rows = rows
        self.steps += 1
        with Applied(self._treated()):
            return self._step.peak()

    def _smallest(self, measured: Measured) -> tuple[int, tuple[Row, ...]]:
        """Return the choice of the least peak, if it is within the budget."""
        bound = 2 * (measured.outside + sum(c.kept + c.input + c.gradients for c in measured.calls)) + (1 << 20)
        bound += 2 * max((max(c.cost.forward, c.cost.backward) for c in measured.calls if c.cost), default=0)
        found = least(lambda budget: problem_of(measured, budget), bound)
        assert found is not None
        rows = _rows(measured, found[1])
        peak = self._verify(rows)
        if peak > self.budget:
            largest = max(measured.calls, key=lambda call: call.kept)
            raise BudgetError(
                f"a step of {type(self._step.model).__name__} does not fit in {in_words(self.budget)}: the least peak "
                f"that was measured is {in_words(peak)} ({peak} bytes). Of that {in_words(measured.outside)} are kept "
                f"outside of units, and the largest unit, {largest.name}, keeps {in_words(largest.kept)} while it goes "
                "backward. Lower are smaller batches, units of smaller parts (units=), and offload=folder",
                peak,
            )
        return peak, rows

    def _treated(self) -> list[Forward]:
        strategies: dict[str, set[str]] = {}
        for row in self.rows:
            strategies.setdefault(row.unit, set()).add(row.strategy)
        fronts: list[Forward] = []
        for name, found in strategies.items():
            # Several calls of one unit that were decided differently: what keeps less.
            strategy = next(iter(found)) if len(found) == 1 else "checkpoint"
            front = self._front(self._units[name], strategy)
            if front is not None:
                fronts.append(front)
        return fronts

    def _front(self, module: nn.Module, strategy: str) -> Forward | None:
        if strategy == "invert" or (strategy == "store" and not is_inverted(module)):
            return None
        sources: dict[str, Source | None] = {
            "store": None, "checkpoint": Previous(1), "link": Previous(), "selective": Kept(),
            "offload": self._options.offload,
        }  # fmt: skip
        return Treated(module, sources[strategy], selective=strategy == "selective", certify=self._options.certify)

    # Inputs of other sizes.

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = replace(self._step, args=args, kwargs=kwargs)
        shapes = step.shapes()
        if self._looking or any(is_within(shapes, known) for known in self._known):
            return
        size = step.size()
        self._looking = True
        try:
            step = replace(step, args=apart(args), kwargs=apart(kwargs))
            peak = step.peak()
            self._known = [known for known in self._known if not is_within(known, shapes)] + [shapes]
            if peak <= self.budget:
                return
            found = (
                f"a step with inputs of {in_words(size)} has a peak of {in_words(peak)}, and the budget is "
                f"{in_words(self.budget)}; plan with the largest inputs, or with on_exceed='replan'"
            )
            if self._on_exceed == "raise":
                raise BudgetError(found, peak)
            if self._on_exceed == "warn":
                warnings.warn(found, BudgetWarning, stacklevel=4)
                return
            self.remove()
            self._step = step
            self._make()
            self.apply()
        finally:
            self._looking = False


def _seconds(rows: tuple[Row, ...]) -> float:
    return sum(row.seconds for row in rows)


def _rows(measured: Measured, choice: Choice) -> tuple[Row, ...]:
    rows: list[Row] = []
    calls = iter(measured.calls)
    for length, region in choice.regions:
        for place in range(length):
            call = next(calls)
            keeps = region.keeps if place == 0 else 0
            strategy = region.strategy if place == 0 else "link"
            seconds = region.seconds / length
            rows.append(Row(call.name, call.kept, strategy, keeps, seconds))
    return tuple(rows)


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: int | float | str,
    loss: Callable[[Any], Tensor] | None = None,
    step: Callable[..., Tensor] | None = None,
    units: Units | None = None,
    certify: Certify = True,
    selective: bool = True,
    offload: str | os.PathLike[str] | bool = False,
    on_exceed: OnExceed = "warn",
    rows: Sequence[Row] = (),
) -> Plan:
    """Find what to keep of a model's layers so that a training step stays within a memory budget, in the least time.

    One forward pass measures for every unit what it keeps, what it takes and what it costs to run again. Which units
    are stored, checkpointed (alone, or some in a row), inverted or offloaded is found by dynamic programming. Then the
    plan is applied, a real step is measured, and the plan is corrected at most three times: its ``peak`` is a
    measurement. The model's parameters, buffers, gradients, attributes and random state are afterwards what they were,
    and the plan is not applied: call :meth:`Plan.apply`, or use it in a ``with`` statement.

    Class, names and state dict of an applied model are those of the model without. Gradients are the same.

    Args:
        model: any module, in the mode (training, autocast) in which it will be used, before it is given to
            ``DistributedDataParallel``.
        example_inputs: of the model: a tuple of positional arguments, a dict of keyword arguments, or one argument.
        budget: what a step may allocate at most beside what is there before it (parameters, the optimizer's state,
            inputs): bytes, ``"1.5 GB"``, ``"1.5 GiB"``, or a share ``"60%"`` of the memory of the device, of the
            machine on the CPU. Gradients of parameters count, as in a step that begins without them.
        loss: of the model's output, a scalar; ``None``: the sum of all outputs that require a gradient.
        step: from the inputs to the loss, where a step is more than the loss of one call of the model. The inputs are
            its own then, and later ones of other sizes are not looked at.
        units: what is treated as a whole: a type of modules, a name with ``*`` and ``?`` allowed, several of these, or
            a predicate. ``None``: layers that a container repeats, and layers with an inverse.
        certify: what is accepted of a rebuild; see :func:`recollect.checkpoint`.
        selective: whether checkpoints that keep what products return come into question.
        offload: a folder to which inputs may be offloaded, or on accelerators ``True`` for host memory.
        on_exceed: what happens where inputs have a dimension larger than those of a step that was tried, so that their
            own step is tried, and it exceeds the budget: ``"warn"``, ``"raise"`` a :class:`BudgetError`, or
            ``"replan"``.
        rows: of an earlier plan of this model, ``plan.rows``: what it chose is taken again if the step that is
            measured stays within the budget, so that a run that goes on computes what it computed before.

    Returns:
        The plan. ``print(plan)`` shows a table.

    Raises:
        BudgetError: the budget cannot be met; the message says what the least peak is.
        ValueError: there are no units, or ``budget`` or another argument is not among what is allowed.
        TypeError: the same.

    Example:
        >>> import torch, recollect
        >>> from torch import nn
        >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(8)])
        >>> plan = recollect.plan(model, torch.randn(512, 32), budget="800 kB")
        >>> plan.peak <= 800_000
        True
        >>> with plan:
        ...     model(torch.randn(512, 32)).sum().backward()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module (got {type(model).__name__})")
    if on_exceed not in ("warn", "replan", "raise"):
        raise ValueError(f"on_exceed must be 'warn', 'replan' or 'raise' (got {on_exceed!r})")
    check_certify(certify)
    if isinstance(example_inputs, dict):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}
    device = _device_of(model, (args, kwargs))
    source: Source | None = None
    if offload is True and device.type != "cpu":
        source = Offload()
    elif offload is True:
        raise ValueError("offload=True is host memory, and the model is there; give a folder on a disk")
    elif offload is not False:
        source = Offload(path=offload)
    options = Options(device, certify, selective, source)
    if step is not None and loss is not None:
        raise ValueError("loss= is of the model's output, and step= calls the model itself: give one of them")
    tried = Step(model, args, kwargs, loss, device, step)
    made = Plan(tried, as_bytes(budget, device), find_units(model, units), options, on_exceed)
    made._make(_checked(rows, made))
    return made


def _checked(rows: Sequence[Row], made: Plan) -> tuple[Row, ...]:
    known = [*_STRATEGIES, *(["offload"] if made._options.offload is not None else [])]
    for row in rows:
        if row.unit not in made._units or row.strategy not in known:
            raise ValueError(
                f"rows: {row.unit!r} with the strategy {row.strategy!r} is of another plan; its units are "
                f"{', '.join(made._units)}, its strategies {', '.join(known)}"
            )
    return tuple(rows)


def _device_of(model: nn.Module, inputs: Any) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *tensors_of(inputs)) if t.device.type != "cpu"}
    if len(devices) > 1:
        raise ValueError(f"a plan is for one device (got {', '.join(sorted(map(str, devices)))})")
    return devices.pop() if devices else torch.device("cpu")

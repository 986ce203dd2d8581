"""A plan: measured, solved, applied, and verified by a real step."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from recollect.budget._bytes import in_words
from recollect.budget._cost import Options
from recollect.budget._measure import Measured, measure
from recollect.budget._problem import problem_of, storing, timed
from recollect.budget._ranks import Outcome, of_all_ranks
from recollect.budget._rows import Row, inverting, lines_of, rows_of, seconds_of
from recollect.budget._solve import Choice, least, room_of, solve
from recollect.budget._step import Step, apart, is_within
from recollect.budget._treatment import Applied, Treated, segmented
from recollect.budget._units import is_inverted
from recollect.frames import Forward, FrameError, Kept, Previous, Source, frames_apply, in_backward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BudgetError", "BudgetWarning", "OnExceed", "Plan"]

OnExceed = Literal["warn", "replan", "raise"]
_CORRECTIONS = 3
_MARGINS = (0, 1, 4, 16)  # 64ths of the budget that are left free in addition, after so many choices were too much
_NUMBERS = 3  # larger numbers among the arguments made no difference so often: they are not looked at
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
        self._kept = 0  # bytes, with everything stored
        self._step = step
        self._units = units
        self._options = options
        self._on_exceed = on
        self._applied: Applied | None = None
        self._known = [step.shapes()]  # of steps that were tried
        self._numbers_seen = 0  # how often larger numbers among the arguments made no difference
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
        peak = f"peak {in_words(self.peak)} (measured) of {in_words(self.budget)}"
        return "\n".join([*lines_of(self.rows), f"{peak}; adds {1e3 * self.seconds:.1f} ms to a step (estimated)"])

    def __repr__(self) -> str:
        return f"Plan(budget={self.budget}, peak={self.peak}, units={len(self._units)})"

    # How it comes about.

    def _make(self, given: tuple[Row, ...] = ()) -> None:
        for _ in range(2 if given else 0):  # the first step may also make what is there for all later ones
            if (peak := self._verify(given)) <= self.budget:
                self.peak, self.seconds = peak, seconds_of(given)
                return
        try:
            self._search(self._measured(self._options))
        except FrameError:  # of units that look alike, one cannot be rebuilt as the other
            self._search(self._measured(replace(self._options, apart=True)))

    def _agree(self, group: ProcessGroup, given: tuple[Row, ...] = ()) -> None:
        """Find a choice with the ranks of a group."""
        try:
            self._make(given)
            own = Outcome(self.rows, self.peak, self._kept)
        except BudgetError as error:
            own = Outcome(None, error.least, self._kept)
        found = of_all_ranks(own, group)
        rows, peak = found.rows, found.peak
        if rows is not None:
            self.peak = self._verify(rows)
            self.seconds = seconds_of(rows)
            peak = of_all_ranks(Outcome(rows, self.peak, self._kept), group).peak
        if rows is None or peak > self.budget:
            raise BudgetError(
                f"a step of {type(self._step.model).__name__} does not fit in {in_words(self.budget)} on every rank: "
                f"the largest peak that was measured is {in_words(peak)} ({peak} bytes)",
                peak,
            )

    def _measured(self, options: Options) -> Measured:
        step = self._step
        with step.tried() as tried:
            measured = measure(self._units, tried.forward, step.model, (tried.args, tried.kwargs), options)
        self.steps += 1
        if not measured.calls:
            raise ValueError(
                f"none of the units {', '.join(self._units)} ran with gradients and outside of checkpoints; name "
                "others by units="
            )
        self._kept = measured.outside + sum(call.kept for call in measured.calls)
        return measured

    def _search(self, measured: Measured) -> None:
        """Choose, measure a step, and choose again by how far its peak was from the estimate, a few times."""
        budget, target, overs, found = self.budget, self.budget, 0, None
        tried: list[tuple[Row, ...]] = []
        # Moments are estimated from above: everything may fit all the same.
        choice = storing(measured) if self._kept <= budget else None
        while len(tried) <= _CORRECTIONS:
            choice = choice or solve(problem_of(measured, target))
            is_smallest = choice is None and not tried
            if is_smallest:
                choice, rows, peak = self._smallest(measured)
            else:
                rows = () if choice is None else rows_of(measured, choice)
                if choice is None or rows in tried or (found and seconds_of(rows) >= seconds_of(found[1])):
                    break
                peak = self._verify(rows)
            tried.append(rows)
            estimate = target - room_of(problem_of(measured, target), choice)
            if peak > budget:
                overs += 1
                target = estimate - (peak - budget) - _MARGINS[overs - 1] * budget // 64 - 1
            else:
                found = peak, rows
                target = estimate + (budget - peak)
                if seconds_of(rows) == 0.0 or (peak >= _ENOUGH * budget and not is_smallest):
                    break
            choice = None
        if found is None:
            _, rows, peak = self._smallest(measured)
            found = peak, rows
        self.peak, self.rows = found
        self.seconds = seconds_of(self.rows)

    def _verify(self, rows: tuple[Row, ...]) -> int:
        """Return the peak of a real step with this choice."""
        self.rows = rows
        self.steps += 1
        with Applied(self._treated()):
            return self._step.peak()

    def _smallest(self, measured: Measured) -> tuple[Choice, tuple[Row, ...], int]:
        """Return the choice of the least peak, its rows and that peak, if it is within the budget."""
        bound = 2 * (measured.outside + sum(c.kept + c.input + c.gradients for c in measured.calls)) + (1 << 20)
        bound += 2 * max((max(c.cost.forward, c.cost.backward) for c in measured.calls if c.cost), default=0)
        found = least(lambda budget: problem_of(measured, budget, timed=False), bound)
        assert found is not None
        choice = timed(measured, found[1])
        rows = rows_of(measured, choice)
        peak = self._verify(rows)
        inverted = inverting(rows, measured)
        if peak > self.budget and inverted != rows:  # what an inverse takes is estimated from above
            other = self._verify(inverted)
            peak, rows = min((peak, rows), (other, inverted), key=lambda one: one[0])
        if peak > self.budget:
            largest = max(measured.calls, key=lambda call: call.kept)
            raise BudgetError(
                f"a step of {type(self._step.model).__name__} does not fit in {in_words(self.budget)}: the least peak "
                f"that was measured is {in_words(peak)} ({peak} bytes). Of that {in_words(measured.outside)} are kept "
                f"outside of units, and the largest unit, {largest.name}, keeps {in_words(largest.kept)} while it goes "
                "backward. Lower are smaller batches, units of smaller parts (units=), and offload=folder",
                peak,
            )
        return choice, rows, peak

    def _treated(self) -> list[Forward]:
        strategies: dict[str, set[str]] = {}
        for row in self.rows:
            strategies.setdefault(row.unit, set()).add(row.strategy)
        sources: dict[str, Source | None] = {
            "store": None, "checkpoint": Previous(1), "link": Previous(), "selective": Kept(),
            "offload": self._options.offload,
        }  # fmt: skip
        certify = self._options.certify
        fronts: list[Forward] = []
        for name, found in strategies.items():
            # Several calls of one unit that were decided differently: what keeps less.
            strategy, module = next(iter(found)) if len(found) == 1 else "checkpoint", self._units[name]
            if strategy == "invert" or (strategy == "store" and not is_inverted(module)):
                continue
            fronts.append(Treated(module, sources[strategy], selective=strategy == "selective", certify=certify))
        in_rows: dict[str, Source] = {name: source for name in ("checkpoint", "link") if (source := sources[name])}
        calls = [(self._units[row.unit], row.strategy) for row in self.rows]
        return fronts + segmented(self._step.model, calls, in_rows, certify)

    # Inputs of other sizes.

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = replace(self._step, args=args, kwargs=kwargs)
        shapes = step.shapes()
        if self._numbers_seen >= _NUMBERS:
            shapes = shapes._replace(numbers=self._known[0].numbers)
        if self._looking or any(is_within(shapes, known) for known in self._known):
            return
        size = step.size()
        self._looking = True
        try:
            step = replace(step, args=apart(args), kwargs=apart(kwargs))
            try:
                peak = step.peak()
            except Exception as error:
                found = (
                    f"a step with inputs of {in_words(size)} could not be tried ({type(error).__name__}: {error}), so "
                    f"that nobody knows whether it stays within {in_words(self.budget)}: give recollect.plan a loss= "
                    "that takes outputs of any size, or the largest inputs"
                )
                if self._on_exceed == "raise":
                    raise BudgetError(found, 0) from error
                self._known.append(shapes)
                warnings.warn(found, BudgetWarning, stacklevel=4)
                return
            if any(is_within(shapes._replace(numbers=known.numbers), known) for known in self._known):
                self._numbers_seen += peak <= self.peak  # a number that grows, as that of a step, and takes nothing
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

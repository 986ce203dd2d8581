"""A memory budget in Lightning: a callback, whose base is looked for when one is made."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

from torch import Tensor, nn

from recollect.budget._plan import OnExceed, Plan
from recollect.budget._planning import plan
from recollect.budget._rows import Row

__all__ = ["LightningBudget"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_SILENT = ("log", "log_dict")


class LightningBudget:
    """A callback of Lightning that keeps training steps within a memory budget; see :func:`recollect.plan`.

    Before the first batch it tries ``training_step`` on it, plans what is kept of each unit, and applies the plan; the
    tried steps log nothing, and what they change in the module is put back. At the end of training the plan is removed.

    The choice is in the trainer's checkpoints: training that goes on from one computes what it did.

    It is a subclass of the ``Callback`` of ``lightning.pytorch`` or of ``pytorch_lightning``, of which the one that is
    imported already counts; recollect itself needs neither.

    Attributes:
        plan: the plan, from the first batch on; ``print(callback.plan)`` shows its table.

    Args:
        budget: as in :func:`recollect.plan`.
        loss: from the module and a batch to the loss; ``None``: ``training_step``. With manual optimization it has to
            be given, since there ``training_step`` moves the parameters.
        on_exceed: what happens at a batch with a larger dimension than those before, if its step, which is then tried,
            exceeds the budget: ``"warn"``, ``"raise"`` or ``"replan"``.
        **options: of :func:`recollect.plan`: ``units``, ``certify``, ``selective``, ``offload``.

    Raises:
        ModuleNotFoundError: neither of both packages is installed.
        TypeError: an option is none of :func:`recollect.plan`.

    Example:
        >>> from recollect.budget import LightningBudget
        >>> callback = LightningBudget("500 MB")  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[callback])  # doctest: +SKIP
    """

    plan: Plan | None

    def __new__(cls, *args: Any, **kwargs: Any) -> LightningBudget:
        """Make one whose class is a callback, too."""
        made: LightningBudget = object.__new__(_with_base(cls, _callback()))
        return made

    def __init__(
        self,
        budget: int | float | str,
        loss: Callable[[Any, Any], Tensor] | None = None,
        on_exceed: OnExceed = "warn",
        **options: Any,
    ) -> None:
        wrong = sorted(options.keys() - {"units", "certify", "selective", "offload"})
        if wrong:
            raise TypeError(f"LightningBudget: {wrong[0]!r} is no option; those of recollect.plan are units, certify, "
                            "selective and offload")  # fmt: skip
        self.budget = budget
        self.loss = loss
        self.on_exceed = on_exceed
        self.options = options
        self.plan = None
        self._rows: tuple[Row, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"options": self.options, "_rows": self._chosen}
        return LightningBudget, (self.budget, self.loss, self.on_exceed), state

    @property
    def state_key(self) -> str:
        """The name of its state in checkpoints."""
        return "recollect.budget.LightningBudget"

    def state_dict(self) -> dict[str, Any]:
        """Return the budget, and the rows of the plan."""
        return {"budget": self.budget, "rows": [list(astuple(row)) for row in self._chosen]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the choice of a run that goes on, if it has this budget."""
        if state_dict["budget"] == self.budget:
            self._rows = tuple(Row(*row) for row in state_dict["rows"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin without a plan, but with the choice of the one before."""
        self._rows, self.plan = self._chosen, None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Make the plan; and try the step of a batch that is larger than those before."""
        if self.plan is None:
            with _silent(pl_module):
                self.plan = plan(
                    pl_module, (batch,), budget=self.budget, step=self._step_of(trainer, pl_module),
                    on_exceed=self.on_exceed, rows=self._rows, **self.options,
                ).apply()  # fmt: skip
        else:
            with _silent(pl_module):
                self.plan._look((batch,), {})

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the plan."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the plan."""
        self._remove()

    def _remove(self) -> None:
        if self.plan is not None:
            self.plan.remove()

    @property
    def _chosen(self) -> tuple[Row, ...]:
        return self._rows if self.plan is None else self.plan.rows

    def _step_of(self, trainer: Any, module: Any) -> Callable[[Any], Tensor]:
        given = self.loss
        if given is None and not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} optimizes manually, so its training_step moves the parameters: say how a "
                "batch's loss is computed, LightningBudget(budget, loss=lambda module, batch: ...)"
            )

        def step(batch: Any) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                if given is not None:
                    return given(module, batch)
                parameters = inspect.signature(module.training_step).parameters
                output = module.training_step(batch, 0) if len(parameters) > 1 else module.training_step(batch)
            found = output.get("loss") if isinstance(output, dict) else output
            if not isinstance(found, Tensor):
                raise ValueError(
                    f"{type(module).__name__}.training_step returned no loss, but a {type(found).__name__}: give "
                    "LightningBudget(budget, loss=lambda module, batch: ...)"
                )
            return found

        return step


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Let a module log nothing in the body."""
    names = vars(module)
    before = {name: names[name] for name in _SILENT if name in names}
    names.update(dict.fromkeys(_SILENT, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in _SILENT:
            names.pop(name, None)
        names.update(before)


def _callback() -> type:
    """Return the class of callbacks: of the package that is imported already, or that is installed."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            found: type = importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
            continue
        return found
    raise ModuleNotFoundError(
        "LightningBudget is a callback of Lightning, which is not installed: install lightning or pytorch-lightning",
        name="lightning",
    )


_made: dict[tuple[type, type], type] = {}


def _with_base(cls: type, base: type) -> type:
    """Return the subclass of both, the same one for the same two."""
    if issubclass(cls, base):
        return cls
    if (cls, base) not in _made:
        names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
        _made[cls, base] = type(cls.__name__, (cls, base), names)
    return _made[cls, base]

"""`plan`: what users call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recollect._arguments import Certify, check_certify
from recollect._util._tree import tensors_of
from recollect.budget._bytes import as_bytes
from recollect.budget._cost import Options
from recollect.budget._plan import OnExceed, Plan
from recollect.budget._ranks import check_local
from recollect.budget._rows import Row
from recollect.budget._step import Step
from recollect.budget._units import Units, find_units
from recollect.frames import Offload, Source

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["plan"]

_STRATEGIES = ("store", "checkpoint", "link", "selective", "invert")


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
    group: ProcessGroup | None = None,
) -> Plan:
    """Find what to keep of a model's layers so that a training step stays within a memory budget, in the least time.

    One forward pass measures for every unit what it keeps, what it takes and what it costs to run again. Which units
    are stored, stored in part, checkpointed (alone, or some in a row), inverted or offloaded is found by dynamic
    programming. Then the plan is applied, a real step is measured, and the plan is corrected at most three times: its
    ``peak`` is a measurement. The model's parameters, buffers, gradients, attributes and random state are afterwards
    what they were, and the plan is not applied: call :meth:`Plan.apply`, or use it in a ``with`` statement. In steps
    that are only tried :func:`recollect.in_backward` is true: what happens once per step, such as pushes to histories,
    does not happen. A unit whose rebuild is not what the forward was (it draws numbers from Python's generator) is
    stored.

    Class, names and state dict of an applied model are those of the model without. Gradients are the same.

    Args:
        model: any module, in the mode (training, autocast) in which it will be used, before it is given to
            ``DistributedDataParallel`` or ``fully_shard``.
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
        selective: whether it comes into question to keep all but what norms, activations and other cheap functions
            return, which is computed again from what is kept.
        offload: a folder to which inputs may be offloaded, or on accelerators ``True`` for host memory.
        on_exceed: what happens where inputs have a dimension larger than those of a step that was tried, so that their
            own step is tried, and it exceeds the budget: ``"warn"``, ``"raise"`` a :class:`BudgetError`, or
            ``"replan"``. A step whose types or flags are others is tried too, and one in which a whole number among
            the arguments is larger; numbers that were larger three times and took nothing are not looked at any more.
        rows: of an earlier plan of this model, ``plan.rows``: what it chose is taken again if the step that is
            measured stays within the budget, so that a run that goes on computes what it computed before.
        group: of processes that run one model together, all of which call this, such as
            ``torch.distributed.group.WORLD``: they take the choice of the rank that keeps most, and the largest peak
            counts. Where parameters are sharded this is needed: ranks that rebuild other units wait for ever.

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
    if group is not None and on_exceed == "replan":
        raise ValueError("on_exceed='replan' is for one process: ranks would not plan at the same time; use 'raise'")
    check_certify(certify)
    check_local(model)
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
    given = _checked(rows, made)
    if group is None:
        made._make(given)
    else:
        made._agree(group, given)
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

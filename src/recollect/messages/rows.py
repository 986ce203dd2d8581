"""Whether a function goes row by row: by what torch's modules are, or else as observed on a few rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recollect._torch import has_global_hooks
from recollect.messages.reach import DRAWING, Constant, Rewound, same

__all__ = ["by_structure", "goes_by_rows", "some_rows"]

_ROWS, _PART = 24, slice(5, 12)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ELEMENTWISE = (
    nn.Identity, nn.Dropout, nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_FORWARDS = {kind: kind.forward for kind in (*_ELEMENTWISE, *_NORMS, nn.Linear, nn.BatchNorm1d, nn.Sequential)}


def by_structure(module: Any) -> bool:
    """Return whether a module goes row by row, of rows [n, channels], in the mode in which it is, whatever it holds.

    So do some of torch's own modules without hooks; of all others it is not known.

    Example:
        >>> from torch import nn
        >>> from recollect.messages.rows import by_structure
        >>> by_structure(nn.Sequential(nn.LayerNorm(4), nn.ReLU())), by_structure(nn.BatchNorm1d(4))
        (True, False)
    """
    known = isinstance(module, nn.Module) and all(map(_is_known, module.modules()))
    return known and not has_global_hooks(beside_engines=True)


def _is_known(module: nn.Module) -> bool:
    names, kind = vars(module), type(module)
    if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind] or "forward" in names or "_call_impl" in names:
        return False
    if any(names[hooks] for hooks in _HOOKS):
        return False
    held = (*names["_parameters"].values(), *names["_buffers"].values())
    if any(type(each) not in (nn.Parameter, Tensor, type(None)) for each in held):
        return False
    if isinstance(module, _NORMS):
        return len(module.normalized_shape) == 1
    if isinstance(module, nn.BatchNorm1d):
        return not module.training and module.running_mean is not None
    return True


def goes_by_rows(run: Callable[..., Tensor], *rows: Tensor | None, module: nn.Module) -> bool:
    """Return whether what a function returns for some rows depends on no other rows, nor on their number.

    Args:
        run: the function.
        rows: its arguments, each [24, channels]; ``None`` stays what it is.
        module: whose buffers it may write; they stay as they are.

    Raises:
        ValueError: it cannot be computed for some of the rows, or writes what depends on them.
    """
    with DRAWING, Constant(), torch.no_grad():
        rewound = Rewound(_Called(run, module))
        whole = rewound(*rows)
        try:
            part = rewound(*(None if each is None else each[_PART] for each in rows))
        except Exception as error:
            raise ValueError(f"it cannot be computed for some of the rows alone: {error}") from error
        finally:
            rewound.rewind()
    if rewound.varied is not None:
        raise ValueError(f"it writes to the buffer {rewound.varied} what depends on the rows")
    return same(part, whole[_PART])


@dataclass(frozen=True)
class _Called:
    """A function that runs a module."""

    run: Callable[..., Tensor]
    module: nn.Module

    def __call__(self, *rows: Tensor | None) -> Tensor:
        return self.run(*rows)


def some_rows(x: Tensor) -> Tensor:
    """Return 24 rows of a tensor, for :func:`goes_by_rows`."""
    generator = torch.Generator().manual_seed(0)
    return x[torch.randint(x.size(0), (_ROWS,), generator=generator).to(x.device)]

"""The base of modules that users make invertible by hand."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from recollect._arguments import Certify, check_count
from recollect._torch import graph_task_id
from recollect.frames import DRIFT_THRESHOLD, frames_apply, run_invertible
from recollect.invertible import Measured

__all__ = ["InvertibleModule"]


class InvertibleModule(Measured):
    """A module that trains without keeping its first input: it is recomputed from the output.

    Subclasses define ``_forward(x, *args)``, which returns a tensor or a tuple of tensors, and
    ``_inverse(*outputs, *args)``, which returns ``x`` again. ``args`` are kept, and may be anything. Keyword arguments
    are kept too, and given to both.

    Args:
        disable: run plain, keeping everything. Can be changed between steps.
        num_bwd_passes: ``None`` for any number of backward passes; an integer is enforced.
        anchor_every: in a chain of invertible modules, keep every s-th activation, which bounds the numerical drift of
            the reconstruction; ``None`` keeps none.
        drift_threshold: relative error of the reconstructed input above which a
            :class:`~recollect.frames.DriftWarning` is given.
        certify: whether what backward rebuilds is compared with the forward: ``True`` allows for rounding, ``"exact"``
            takes equal bits alone, ``False`` compares nothing.

    Raises:
        TypeError: a subclass defines ``forward`` and no ``_forward``.
        ValueError: ``num_bwd_passes`` or ``anchor_every`` is below 1.
        NotImplementedError: a subclass without ``_inverse`` is called while gradients are enabled, and not disabled.

    Example:
        >>> import torch
        >>> from recollect.reversible import InvertibleModule
        >>> class Scale(InvertibleModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log_scale = torch.nn.Parameter(torch.ones(4))
        ...     def _forward(self, x):
        ...         return x * self.log_scale.exp()
        ...     def _inverse(self, y):
        ...         return y * (-self.log_scale).exp()
        >>> layer, x = Scale(), torch.randn(5, 4)
        >>> y = layer(x)
        >>> y.sum().backward()
        >>> torch.allclose(layer.log_scale.grad, y.sum(0)), torch.allclose(layer.inverse(y), x)
        (True, True)
    """

    _written: ClassVar[tuple[str, str] | None] = ("_forward", "_inverse")

    def __init__(
        self,
        disable: bool = False,
        num_bwd_passes: int | None = None,
        *,
        anchor_every: int | None = None,
        drift_threshold: float = DRIFT_THRESHOLD,
        certify: Certify = True,
    ) -> None:
        super().__init__(anchor_every=anchor_every, drift_threshold=drift_threshold, certify=certify)
        check_count("num_bwd_passes", num_bwd_passes)
        self.disable = disable
        self.num_bwd_passes = num_bwd_passes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`_forward`; its first argument is not kept for backward."""
        if not self.disable:
            self._check_inverse("disable=True makes it a plain module, which keeps everything")
        return self._run(self._forward, self._inverse, args, kwargs)

    def inverse(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`_inverse`, trainable as :meth:`forward` is."""
        return self._run(self._inverse, self._forward, args, kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define _forward(x, *args)")

    def _inverse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define _inverse(*outputs, *args)")

    def _run(self, function: Any, inverse: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._forget_drift()
        if self.disable:
            output = function(*args, **kwargs)
        else:
            output = run_invertible(
                function,
                inverse,
                args,
                kwargs,
                inverted=1,
                gauge=self._gauge,
                anchor_every=self.anchor_every,
                certify=self.certify,
                certificate=self.certificate,
            )
        if isinstance(output, tuple) and len(output) == 1:
            output = output[0]
        self._limit_passes(output)
        return output

    def _limit_passes(self, output: Any) -> None:
        """Enforce ``num_bwd_passes`` on the graph of ``output``."""
        allowed = self.num_bwd_passes
        if allowed is None or self.disable or not frames_apply():
            return
        passes: set[int] = set()  # one backward may come through several outputs

        def count(_: tuple[Tensor, ...]) -> None:
            passes.add(graph_task_id())
            if len(passes) > allowed:
                raise RuntimeError(
                    f"Trying to perform a backward pass through {type(self).__name__} more than {allowed} time(s); "
                    "raise num_bwd_passes, or set it to None for any number"
                )

        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(count)

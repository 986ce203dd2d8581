"""The proof that what was rebuilt is what was computed: figures, and the judgement over two fingerprints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect._arguments import Certify
from recollect._verdicts import arrive, later, outstanding
from recollect.frames._errors import RebuildError, naming
from recollect.frames._fingerprint import (
    Fingerprint,
    difference,
    error_between,
    fingerprint,
    is_late,
    late_parts,
    on_host,
)  # fmt: skip
from recollect.frames._modes import aside

__all__ = [
    "GROSS", "Certificate", "Figures", "Mark", "Meta", "acceptance", "certificate_of_process", "check_block", "differs",
    "is_gross", "judge", "show", "tolerance_of",
]  # fmt: skip

Meta = tuple[torch.Size, torch.dtype, torch.device]

# Relative error (of the norm) that a repetition may have: what kernels that sum in another order every time may do.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}


class Figures:
    """What was counted between two resets; verdicts that come late are counted where they belong."""

    __slots__ = ("equal", "largest", "rounded")

    def __init__(self) -> None:
        self.equal = self.rounded = 0
        self.largest = 0.0

    def note(self, error: float) -> None:
        """Count a tensor that was accepted with this relative error."""
        if error == 0.0:
            self.equal += 1
        else:
            self.rounded += 1
            self.largest = max(self.largest, error)


class Certificate:
    """Figures of what was certified since the last :meth:`reset`.

    To read one waits for the devices that what was rebuilt is on, if they are not done with it.

    Example:
        >>> import torch
        >>> from recollect.frames import Certificate, Kept, run_frame
        >>> certificate = Certificate()
        >>> y = run_frame(torch.exp, (torch.ones(3, requires_grad=True),), {}, Kept(), certificate=certificate)
        >>> y.sum().backward()
        >>> certificate.equal, certificate.rounded
        (1, 0)
    """

    __slots__ = ("figures",)

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.figures = Figures()

    @property
    def equal(self) -> int:
        """How many rebuilt tensors had the fingerprint of the forward's."""
        return self._read().equal

    @property
    def rounded(self) -> int:
        """How many differed within the rounding of their dtype."""
        return self._read().rounded

    @property
    def largest(self) -> float:
        """The largest relative error among the latter, as estimated from fingerprints; 0.0 if there was none."""
        return self._read().largest

    def _read(self) -> Figures:
        if outstanding():
            arrive()
        return self.figures

    def __repr__(self) -> str:
        return f"Certificate(equal={self.equal}, rounded={self.rounded}, largest={self.largest:.1e})"


certificate_of_process = Certificate()
"""What is certified that no module owns."""


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative error that is rounding for a dtype."""
    return _TOLERANCES.get(dtype.to_real() if dtype.is_complex else dtype, _TOLERANCES[torch.float32])


def judge(
    pairs: Sequence[tuple[Fingerprint | None, Fingerprint | None]], verdict: Callable[[list[float]], None]
) -> None:
    """Give ``verdict`` the relative errors of pairs of fingerprints: at once, or when they come from their device."""
    marks = [mark for pair in pairs for mark in pair if mark is not None]
    if not any(map(is_late, marks)):
        verdict(_errors_between(pairs))
        return

    def read(numbers: list[list[Any]]) -> None:
        coming = iter(numbers)
        verdict(_errors_between([tuple(None if m is None else on_host(m, coming) for m in pair) for pair in pairs]))

    later([tensor for mark in marks for tensor in late_parts(mark)], read)


def acceptance(
    name: Callable[[], str], what: str, allowed: float, certify: Certify, figures: Figures
) -> Callable[[float], None]:
    """Return what judges the relative error of a tensor that is handed out again.

    Args:
        name: whose it is.
        what: which tensor of that, for the message.
        allowed: relative error that is rounding.
        certify: what is accepted.
        figures: where it is counted.
    """
    exact = certify == "exact"

    def accept(error: float) -> None:
        if error > 0.0 and (exact or error > allowed):
            limit = "certify='exact' allows none)" if exact else f"rounding: {allowed:.0e})"
            raise differs(name(), f"{what} has other values (relative error {error:.1e}; {limit}")
        figures.note(error)

    return accept


def differs(name: str, what: str) -> RebuildError:
    """Return the error of a region that is not what it was."""
    return RebuildError(
        f"{name}: running it again for backward differs from the forward pass: {what}. It must "
        "compute the same again. Most often it draws random numbers from somewhere other than torch's default "
        "generators (NumPy, random), or was called with seed=False, or reads something that was changed in "
        "between, or branches on recollect.in_backward(). Draw from torch, pass what changes as an argument, or "
        "call it without a frame"
    )


def show(meta: Meta) -> str:
    """Return how messages name a tensor."""
    shape, dtype, device = meta
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"


class Mark:
    """What is kept of a tensor that is dropped, to compare with what is computed in its place.

    Args:
        function: whose it is, for the error; it is not kept.
        tensor: what is dropped.
        certify: what is accepted; ``False``: nothing is compared.
        certificate: where it is counted; ``None``: in that of the process.

    Example:
        >>> import torch
        >>> from recollect.frames import Certificate, Mark
        >>> certificate, x = Certificate(), torch.randn(8)
        >>> mark = Mark(torch.exp, x.exp(), certificate=certificate)
        >>> mark.check(x.exp())
        >>> certificate.equal
        1
    """

    __slots__ = ("_certificate", "_certify", "_mark", "_name")

    def __init__(
        self,
        function: Callable[..., Any],
        tensor: Tensor,
        *,
        certify: Certify = True,
        certificate: Certificate | None = None,
    ) -> None:
        self._certify = certify
        self._certificate = certificate if certificate is not None else certificate_of_process
        self._name = naming(function)
        with torch.no_grad(), aside():
            self._mark = fingerprint(tensor, exact=certify == "exact", apart=True) if certify else None

    def check(self, tensor: Tensor) -> None:
        """Compare a tensor with the one that was dropped: at once, or when the numbers come from its device.

        Raises:
            RebuildError: it has other values.
        """
        then = self._mark
        if then is None:
            return
        what = f"what a function returned, {show((tensor.shape, tensor.dtype, tensor.device))},"
        accept = acceptance(self._name, what, tolerance_of(tensor.dtype), self._certify, self._certificate.figures)
        exact = self._certify == "exact"
        with torch.no_grad(), aside():
            if is_late(then):
                now = fingerprint(tensor, exact=exact, like=then)
                judge([(then, now)], lambda errors: accept(errors[0]))
            else:
                accept(difference(then, tensor, exact=exact, apart=True))


def _errors_between(pairs: Sequence[tuple[Fingerprint | None, ...]]) -> list[float]:
    return [0.0 if then is None or now is None else error_between(then, now) for then, now in pairs]


def check_block(
    name: str,
    given: float,
    returned: float,
    tolerance: float,
    amplification: Callable[[], float | None] | None,
    certify: Certify,
    figures: Figures,
) -> None:
    """Tell a repetition that drifts by rounding from one that computed something else.

    Args:
        name: whose repetition it is.
        given: relative error of what it was given.
        returned: relative error of what it returned.
        tolerance: relative error that is rounding.
        amplification: measures how many times larger the error of what is returned is than that of what is given, and
            returns ``None`` if it does not return the same twice; asked only where the errors alone do not tell.
        certify: what is accepted.
        figures: where it is counted.

    Raises:
        RebuildError: it computed something else.
    """
    if certify == "exact":
        accepted = returned == 0.0
    else:
        # Where drift is out of hand nothing can be told; its gauge warns.
        accepted = returned <= tolerance or returned <= _ORDINARY * given or given > _DRIFTED
        if not accepted and amplification is not None and math.isfinite(returned):
            times = amplification()
            # Errors below the precision of the projections show as none.
            unseen = min(tolerance, max(tolerance / _ORDINARY, _TOLERANCES[torch.float32]))
            accepted = times is not None and returned <= _SAFETY * times * max(given, unseen)
    if not accepted:
        if certify == "exact":
            found = "what it returns has other bits, " + ("as had" if given else "but not") + " what it was given"
            allowed = "certify='exact' and streams with exact= take equal bits alone"
            remedy = (
                ". Kernels that add up in another order each time repeat themselves under "
                "torch.use_deterministic_algorithms(True), and exact=False takes what differs by rounding"
            )
        else:
            found = f"what it returns has a relative error of {returned:.1e}, and what it was given one of {given:.1e}"
            allowed, remedy = f"rounding: {tolerance:.0e}", ""
        raise RebuildError(
            f"{name}: running it again for backward differs from the forward pass: {found} ({allowed}). It must "
            "compute the same again, and an inverse give back what its function was given. Most often it draws random "
            "numbers from somewhere other than torch's default generators (NumPy, random), or was called with "
            "seed=False, or reads something that was changed in between. Draw from torch, pass what changes as an "
            f"argument, or use a checkpoint, which keeps the input{remedy}"
        )
    figures.note(returned)


def is_gross(error: float, given: float, tolerance: float) -> bool:
    """Return whether what a block saves differs by more than drift of its input explains.

    Args:
        error: relative error of what it saves.
        given: relative error of what it was given.
        tolerance: relative error that is rounding.
    """
    return given <= max(1e-4, tolerance) and error > min(_STEEP * max(given, tolerance), max(GROSS, 10 * given))


# How many times larger errors ordinary blocks make of small ones, and how uncertain a measured amplification is.
_ORDINARY = 10.0
_SAFETY = 30.0
# Relative error of flags and indices that a block saves, above which it is another block, and of other tensors in terms
# of the error of its input.
GROSS = 0.25
_STEEP = 1e3
_DRIFTED = 1e-2

"""Other forms of operations for the CPU, in tests that look at what follows from them."""

from dataclasses import replace
from typing import Any

import pytest

from recollect._devices import FORMS


def set_form(monkeypatch: pytest.MonkeyPatch, **forms: Any) -> None:
    """Let the CPU have other forms until the end of a test; see :class:`recollect._devices.Forms`."""
    monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], **forms))

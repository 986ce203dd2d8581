"""Gives the tests of this folder a second device; its module is imported as ``device.emulation``."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from recollect._devices import FORMS, OTHERS
from recollect.frames import settle

sys.path.append(str(Path(__file__).parents[1]))

from device import emulation

# What it does: see ``_copy`` there.
FORMS[emulation.NAME] = replace(OTHERS, sends_at_once=True)
# While tests are collected: torch counts its devices in a process's first backward pass.
emulation.install()


@pytest.fixture
def other() -> Iterator[str]:
    """The name of the device, which torch finds available as long as the test runs."""
    emulation.device.present = True
    emulation.device.manual_seed(0)
    yield emulation.NAME
    settle()  # what is wrong is an error of the test that did it
    emulation.device.catch_up()
    emulation.device.lag = 1
    emulation.device.has_float64 = True
    emulation.device.present = False

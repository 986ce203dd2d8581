"""Gives the tests of this folder a second device; its module is imported as ``device.emulation``."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recollect.frames import settle

sys.path.append(str(Path(__file__).parents[1]))

from device import emulation

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

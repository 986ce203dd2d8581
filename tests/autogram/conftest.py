"""Lets the tests of this folder import the networks that they share, and go through compiled code several times."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch._functorch.config

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def kept_buffers() -> Iterator[None]:
    """Compiled code gives buffers away in backward, and then refuses a second pass, unless it was told not to."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield

"""What the tests of this folder share; they may import from here."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def assert_passed(tmp_path_factory):
    """Return what fails unless a case of a module passed in each process; all cases of a module run once."""

    from processes import run, starter

    forks = starter()

    @functools.cache
    def outcome(module, world, cases):
        try:
            return run(forks, module, world, tmp_path_factory.mktemp(f"{module}{world}"), cases=cases)
        except (AssertionError, OSError, ValueError) as error:
            return str(error)  # for every case: the processes are not started again

    def check(module, world, case, cases=()):
        found = outcome(module, world, tuple(cases))
        assert isinstance(found, list), found
        for rank, raised in enumerate(found):
            assert raised[case] is None, f"rank {rank}:\n{raised[case]}"

    yield check
    forks.stop()

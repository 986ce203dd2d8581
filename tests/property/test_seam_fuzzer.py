"""Random programs over the seam: plain autograd's numbers and the same world afterwards, or an error that helps.

``RECOLLECT_FUZZ=100000 pytest tests/property/test_seam_fuzzer.py`` tries that many programs;
``python tests/property/seam_programs.py SEED`` shows one.
"""

import os
from collections import Counter

import pytest
import seam_programs
from seam_calls import CALLS
from seam_programs import SOURCES, Plain
from seam_world import HAZARDS

from recollect.frames import Offload

PROGRAMS = int(os.environ.get("RECOLLECT_FUZZ", "3000"))
PARTS = 12

ALONE = [(name, source) for name in HAZARDS for source in SOURCES] + [(name, "checkpoint") for name in CALLS]


def told(failures):
    return f"{len(failures)} programs fail:\n" + "\n".join(str(one)[:1500] for one in failures[:4])


@pytest.mark.parametrize("part", range(PARTS))
def test_programs(part):
    verdicts = [seam_programs.run(seed) for seed in range(part, PROGRAMS, PARTS)]
    failures = [one for one in verdicts if one.fails]
    assert not failures, told(failures)
    kinds = Counter(one.kind for one in verdicts)
    assert kinds["right"] > 0.6 * len(verdicts), kinds
    assert kinds["void"] <= max(4, 0.05 * len(verdicts)), kinds


@pytest.mark.parametrize(("name", "source"), ALONE)
def test_each_hazard_alone(name, source):
    verdicts = [seam_programs.run(seed, {name}, (source,)) for seed in range(6)]
    failures = [one for one in verdicts if one.fails]
    assert not failures, told(failures)
    assert any(name in one.used for one in verdicts)


@pytest.mark.parametrize("name", [name for name, source in ALONE if source == "checkpoint"])
@pytest.mark.parametrize("place", ["host", "file"])
def test_each_hazard_over_other_sources(name, place, tmp_path):
    source = Offload() if place == "host" else Offload(path=tmp_path)
    verdicts = [seam_programs.run(seed, {name}, ("checkpoint",), seam_programs.Framed(source)) for seed in range(3)]
    failures = [one for one in verdicts if one.fails]
    assert not failures, told(failures)


def test_the_generator_agrees_with_itself():
    verdicts = [seam_programs.run(seed, wrap=Plain()) for seed in range(400)]
    assert {one.kind for one in verdicts} <= {"right", "void"}, told([v for v in verdicts if v.kind != "right"])
    rare = {name for table in (HAZARDS, CALLS) for name, entry in table.items() if entry.weight < 0.5}
    used = frozenset.union(*(one.used for one in verdicts))
    assert used | rare >= {*HAZARDS, *CALLS}


def test_a_program_that_goes_wrong_is_found():
    class Blind(Plain):
        """Runs every region twice, as a rebuild that puts nothing back would."""

        def checkpoint(self, function, *args, **kwargs):
            function(*args, **kwargs)
            return function(*args, **kwargs)

    names = {"counter", "buffer_through_data", "functional_batch_norm", "random_of_torch", "counter_in_an_attribute"}
    for name in sorted(names):
        verdicts = [seam_programs.run(seed, {name}, ("checkpoint",), Blind()) for seed in range(6)]
        assert any(one.kind == "wrong" for one in verdicts if name in one.used), name

"""Gramians of random losses of random networks: those of plain autograd, whatever the engine finds out.

``RECOLLECT_FUZZ=100000 pytest tests/property/test_gramian_fuzzer.py`` tries that many programs;
``python tests/property/gramian_programs.py SEED`` shows one.
"""

import os
from collections import Counter

import gramian_programs
import pytest
from gramian_blocks import BLOCKS
from gramian_programs import ENDS, LOSSES

from recollect.autogram import _operations, _sites

PROGRAMS = int(os.environ.get("RECOLLECT_FUZZ", "3000"))
PARTS = 12


def told(failures):
    return f"{len(failures)} programs fail:\n" + "\n".join(str(one)[:1500] for one in failures[:4])


@pytest.mark.parametrize("part", range(PARTS))
def test_programs(part):
    verdicts = [gramian_programs.run(seed) for seed in range(part, PROGRAMS, PARTS)]
    failures = [one for one in verdicts if one.faults]
    assert not failures, told(failures)
    compared = sum(one.compared for one in verdicts)
    assert compared > 3 * len(verdicts), compared
    assert sum(one.refused for one in verdicts) < 0.1 * compared
    assert sum(one.apart for one in verdicts) > 0.35 * compared  # several losses in one pass


@pytest.mark.parametrize("name", BLOCKS)
def test_each_piece_behind_a_layer(name):
    verdicts = [gramian_programs.run(seed, ("linear", name), every=True) for seed in range(2)]
    failures = [one for one in verdicts if one.faults]
    assert not failures, told(failures)
    assert any(one.compared for one in verdicts)


def test_all_pieces_are_drawn():
    drawn = Counter(name for seed in range(1500) for name in gramian_programs.Program(seed).names)
    assert set(drawn) == {*BLOCKS, *LOSSES, *ENDS}


def wrong(names, programs=40):
    """Return whether any of these programs' Gramians is wrong, or does not fit its gradient."""
    verdicts = (gramian_programs.run(seed, names) for seed in range(programs))
    return any(fault.startswith("wrong") or "GramianError" in fault for one in verdicts for fault in one.faults)


@pytest.mark.parametrize(
    ("operation", "piece"),
    [
        ("Roll", "roll"),
        ("Softmax", "softmax"),
        ("NativeBatchNorm", "batch_norm"),
        ("Gather", "gather"),
        ("Cumsum", "cumsum"),
        ("IndexSelect", "index_select"),
    ],
)
def test_a_wrong_rule_is_found(operation, piece, monkeypatch):
    kind = _operations._KINDS[operation]
    monkeypatch.setitem(_operations._KINDS, operation, _operations._Kind(_operations._pointwise, kind.settings))
    _operations._by_name.cache_clear()
    try:
        assert wrong(("linear", f"along an axis: {piece}"))
    finally:
        monkeypatch.undo()
        _operations._by_name.cache_clear()


def test_rows_that_are_summed_too_early_are_found(monkeypatch):
    monkeypatch.setattr(_sites, "goes_by_entry", lambda *args: True)
    assert wrong(("linear", "functions_in_python"), 80)

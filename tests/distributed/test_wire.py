"""How exchanges between ranks begin: headers, and what they refuse (gloo)."""

from dataclasses import replace

import header_cases
import pytest
import torch
import wire_cases
from torch import distributed as dist

from recollect.distributed import Ranks, SharesError
from recollect.distributed._wire import HEADER_BYTES, Header, Wire

CASES = {2: list(wire_cases.CASES), 3: ["rows_of_another_width_that_were_begun_ahead", "rows_that_nobody_takes"]}

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@needs_gloo
@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases], ids=str
)
def test_what_differs_is_named_on_each_rank(assert_passed, case, world):
    assert_passed("wire_cases", world, case, CASES[world])


@needs_gloo
@pytest.mark.parametrize("world", [2, 3], ids="world{}".format)
@pytest.mark.parametrize("case", header_cases.CASES)
def test_operations_of_engines_and_whole_graphs_begin_with_headers(assert_passed, case, world):
    assert_passed("header_cases", world, case)


HEADER = Header(7, "halo rows", route=3, channels=8, item=4, wants=5, sends=6, values=(0.5, 1.0, -2.0), failed=True)


@pytest.mark.parametrize("what", ["", "rows", "a" * 176, "a" * 300, "Zeilen für ä" * 30])
def test_a_header_has_one_size_and_comes_back(what):
    packed = replace(HEADER, what=what).pack()
    assert len(packed) == HEADER_BYTES == 256
    back = Header.unpack(packed)
    assert replace(back, what="") == replace(HEADER, what="")
    assert what.startswith(back.what)
    assert len(back.what.encode()) >= min(len(what.encode()), 175)


def test_headers_fit_where_every_condition_does():
    theirs = replace(HEADER, wants=6, sends=5, values=(2.0, 0.0, 0.0), failed=False)
    assert HEADER.fits(theirs)
    assert theirs.fits(HEADER)
    for name, value in {"number": 8, "what": "x", "route": 1, "channels": 9, "item": 8, "wants": 7, "sends": 4}.items():
        other = replace(theirs, **{name: value})
        assert not HEADER.fits(other), name
        assert not other.fits(HEADER), name
    unknown = replace(HEADER, sends=-1)
    assert unknown.fits(replace(theirs, sends=-1, wants=100))
    assert not unknown.fits(replace(theirs, sends=4))


def test_rows_of_headers_that_differ_have_other_tags():
    others = [replace(HEADER, **{name: 1}) for name in ("number", "route", "channels", "item")]
    tags = [header.tag(5) for header in (HEADER, replace(HEADER, what="x"), *others)] + [HEADER.tag(6)]
    assert len(set(tags)) == len(tags)
    assert all(0 <= tag < 2**31 for tag in tags)


@needs_gloo
def test_a_rank_alone_meets_itself_and_is_refused_after_a_failure():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wire = Wire(Ranks())
        assert wire.meet("a place", 3.0) == [3.0]
        exchange = wire.announce("rows", wants=[0], sends=[0], channels=2, item=4)
        exchange.send(torch.empty(0, 2), [0], torch.empty(0, 2), [0])
        exchange.wait()
        assert [header.what for header in exchange.hear()] == ["rows"]
        assert (wire.number, wire.row_bytes) == (2, 0)
        assert str(wire.fail("why")) == "why"
        with pytest.raises(SharesError, match="failed before: why"):
            wire.meet("a place")
    finally:
        dist.destroy_process_group()

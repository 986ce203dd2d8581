from __future__ import annotations

import pytest

from recollect.train._check import check, check_given
from recollect.train._config import parse
from recollect.train._errors import UsageError


def test_each_key_is_held_against_its_range_and_then_all_against_one_another():
    settings = parse(["dataset=karate"])
    check(settings)
    object.__setattr__(settings.measure, "depths", [])
    with pytest.raises(UsageError, match=r"measure.depths=\[\]: must be a list of numbers of layers"):
        check(settings)
    object.__setattr__(settings, "runs", 0)
    with pytest.raises(UsageError, match=r"runs=0: must be at least 1"):
        check(settings)


@pytest.mark.parametrize("words", [["model=gcn"], ["training=autoscale"], ["training=wholegraph"]])
def test_depths_are_refused_where_no_other_depth_is_measured(words):
    settings = parse(["dataset=karate", *words])
    object.__setattr__(settings.measure, "depths", [2, 4])
    check(settings)  # a run that has it goes on
    check_given(settings, ["seed"])
    with pytest.raises(
        UsageError, match=r"measure.depths=\[2, 4\]: .* model=revgnn with training=full, and this is model="
    ):
        check_given(settings, ["seed", "measure.depths"])


def test_given_keys_that_nothing_looks_at_are_named():
    settings = parse(["training=autoscale"])
    check_given(settings, ["training.num_parts", "seed", "model.conv_kwargs.aggr", "optimizer.options.eps"])
    with pytest.raises(UsageError, match=r"training.store counts only with training=wholegraph, and this is training="):
        check_given(settings, ["seed", "training.store"])

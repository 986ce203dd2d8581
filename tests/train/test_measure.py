from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from lightning_fabric import Fabric

from recollect.memory import peak_memory
from recollect.train import _measure
from recollect.train._build import build_dataset
from recollect.train._config import parse
from recollect.train._measure import measure
from recollect.train._settings import RevGNNSettings
from recollect.train._step import Step
from recollect.train.families import ReversibleFamily, family_of

SETTINGS = parse(["dataset=karate", "model.num_layers=12", "model.hidden_channels=8", "measure.repeats=2"])


@pytest.fixture(scope="module")
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture(scope="module")
def graph(graph_maker):
    return graph_maker("multiclass", "accuracy", 3)


def step_of(fabric, graph, settings):
    family = family_of(settings)
    prepared = family.prepare(graph)
    return Step(fabric, family, prepared, family.build(prepared, fabric.device))


def costs_of(fabric, graph, settings=SETTINGS):
    return measure(settings, step_of(fabric, graph, settings))


@pytest.fixture(scope="module")
def costs(fabric, graph):
    return costs_of(fabric, graph)


def test_depth_costs_memory_only_where_everything_is_kept(costs):
    points = {point["layers"]: point for point in costs.curve}
    assert sorted(points) == [1, 2, 3, 4, 6, 12]
    assert points[12]["peak"] <= 1.05 * points[4]["peak"]
    assert points[12]["peak_plain"] > 2 * points[4]["peak_plain"]
    assert (costs.peak, costs.peak_plain) == (points[12]["peak"], points[12]["peak_plain"])


@pytest.mark.parametrize("plain", [False, True])
def test_peaks_are_those_of_a_plain_step(costs, graph, plain):
    settings = replace(SETTINGS, model=replace(cast(RevGNNSettings, SETTINGS.model), disable=plain))
    model = family_of(settings).build(graph, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters())
    data = graph.data

    def step():
        optimizer.zero_grad(set_to_none=False)
        model.loss(model(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()

    step()
    with peak_memory("cpu") as memory:
        step()
    assert (costs.peak_plain if plain else costs.peak) == pytest.approx(memory.peak_bytes, rel=0.05)


def test_both_modes_are_timed(costs):
    assert costs.seconds > 0
    assert costs.seconds_plain > 0


def test_state_is_parameters_gradients_and_two_moments(costs, graph):
    model = family_of(SETTINGS).build(graph, torch.device("cpu"))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    counters = 4 * len(list(model.parameters()))  # AdamW's step, one float32 for each
    assert costs.state == 4 * parameters + buffers + counters


def test_random_numbers_stay_as_they_were(fabric, graph):
    settings = replace(SETTINGS, model=replace(SETTINGS.model, num_layers=2))
    step = step_of(fabric, graph, settings)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    measure(settings, step)
    assert torch.equal(torch.rand(3), expected)


def test_what_would_not_fit_is_not_tried_but_expected(fabric, graph, costs, monkeypatch):
    between = (costs.curve[3]["peak_plain"] + costs.peak_plain) // 2  # enough for 4 layers, too little for 12
    monkeypatch.setattr(_measure, "available_bytes", lambda device: round(between / 0.7))
    small = costs_of(fabric, graph)
    assert small.peak == costs.peak
    assert small.peak_plain is None
    assert small.seconds_plain is None
    assert small.seconds > 0
    assert small.expected_plain == pytest.approx(costs.peak_plain, rel=0.05)


def test_time_that_is_over_ends_the_curve_not_the_measurement(fabric, graph):
    short = replace(SETTINGS, measure=replace(SETTINGS.measure, seconds=0.0))
    costs = costs_of(fabric, graph, short)
    assert [point["layers"] for point in costs.curve] == [2, 4, 12]
    assert costs.peak is not None
    assert costs.seconds is not None


def test_depths_can_be_chosen(fabric, graph):
    chosen = replace(SETTINGS, measure=replace(SETTINGS.measure, depths=[5, 16]))
    assert [point["layers"] for point in costs_of(fabric, graph, chosen).curve] == [2, 4, 5, 12, 16]


def test_a_depth_that_would_not_end_in_time_is_not_begun(fabric, graph, monkeypatch):
    chosen = replace(SETTINGS, measure=replace(SETTINGS.measure, depths=[5, 10**9, 16]))
    built, build = [], ReversibleFamily.build

    def noted(self, graph, device, num_layers=None):
        built.append(num_layers)
        return build(self, graph, device, num_layers)

    monkeypatch.setattr(ReversibleFamily, "build", noted)
    costs = costs_of(fabric, graph, chosen)
    assert costs.left_out == [10**9]
    assert 10**9 not in built
    assert [point["layers"] for point in costs.curve] == [2, 4, 5, 12, 16]


PARTS = ["training.num_parts=20", "training.parts_per_batch=1"]


def parts_step(fabric, training):
    settings = parse(
        [
            *(
                "dataset=sbm",
                "dataset.options.num_nodes=2000",
                "model=gcn",
                "model.hidden_channels=32",
                "measure.repeats=1",
            ),
            *(f"training={training}", *(PARTS if training == "autoscale" else [])),
        ]
    )
    return settings, step_of(fabric, build_dataset(settings.dataset, settings.data), settings)


def test_a_step_on_a_few_parts_takes_less_than_one_on_the_whole_graph(fabric):
    costs = measure(*parts_step(fabric, "autoscale"))
    alone = measure(*parts_step(fabric, "full"))
    assert 0 < costs.peak < 0.5 * costs.peak_plain
    assert costs.peak_plain == pytest.approx(alone.peak, rel=0.01)
    assert costs.curve == []
    assert costs.seconds > 0
    assert costs.seconds_plain > 0
    assert (alone.peak_plain, alone.expected_plain, alone.seconds_plain) == (None, None, None)


def test_a_whole_graph_that_would_not_fit_is_not_tried_but_expected(fabric, monkeypatch):
    known = measure(*parts_step(fabric, "autoscale"))
    monkeypatch.setattr(_measure, "available_bytes", lambda device: known.peak)
    costs = measure(*parts_step(fabric, "autoscale"))
    assert costs.peak_plain is None
    assert costs.seconds_plain is None
    assert 0.5 * known.peak_plain < costs.expected_plain < 2 * known.peak_plain


def test_measuring_leaves_steps_on_parts(fabric):
    settings, step = parts_step(fabric, "autoscale")
    measure(settings, step)
    step.switch(second=False)
    assert len(list(step.batches)) > 1

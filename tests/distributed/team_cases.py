"""What each of several processes of a training run holds of the graph; see processes.py.

Run through the tests, or by hand: ``python processes.py RANK WORLD_SIZE FOLDER team_cases HOW``.
"""

from __future__ import annotations

import gc
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from processes import registering
from torch import Tensor
from torch import distributed as dist

from recollect.messages import rows_of
from recollect.train._build import build_dataset
from recollect.train._config import parse
from recollect.train._graph import TrainingGraph
from recollect.train._step import Step
from recollect.train._surroundings import make_fabric
from recollect.train._team import team
from recollect.train._trainer import Trainer
from recollect.train.families import family_of

CASES: dict[str, Any] = {}
case = registering(CASES)

NODES, FEATURES = 400, 8
WORDS = [
    "dataset=sbm", f"dataset.options.num_nodes={NODES}", f"dataset.options.num_features={FEATURES}", "device=cpu",
    "training=autoscale", "training.layerwise=true", "training.partition=contiguous", "training.num_parts=8",
    "training.parts_per_batch=2", "model.hidden_channels=8", "model.dropout=0", "measure.enabled=false",
]  # fmt: skip


def prepared(world: int, words: list[str]) -> tuple[Any, TrainingGraph]:
    settings = parse([*WORDS, f"devices={world}", *words])
    family = family_of(settings)
    return family, family.prepare(build_dataset(settings.dataset, settings.data))


def made(family: Any, graph: TrainingGraph) -> Step:
    fabric = make_fabric(family.settings)
    fabric.seed_everything(0, verbose=False)
    return Step(fabric, family, graph, family.build(graph, fabric.device))


def tensors_of(graph: TrainingGraph) -> list[Tensor]:
    found = [value for value in graph.data.to_dict().values() if isinstance(value, Tensor)]
    if graph.own is not None:
        found += [value for value in graph.own.data.to_dict().values() if isinstance(value, Tensor)]
    return found


def nbytes(tensors: list[Tensor]) -> int:
    parts = []
    for tensor in tensors:
        sparse = tensor.layout == torch.sparse_csr
        parts += [tensor.crow_indices(), tensor.col_indices(), tensor.values()] if sparse else [tensor]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


@case
def a_process_keeps_its_own_part(rank: int, world: int, words: tuple[str, ...] = ("model=gcn",)) -> None:
    """Rows of its nodes and their neighbours, and the edges that its mini-batches have; and labels of all nodes."""
    family, graph = prepared(world, list(words))
    adj_t, feature = graph.data.adj_t, weakref.ref(graph.data.x)
    step = made(family, graph)
    start, stop = family._shares.nodes
    target, source = rows_of(adj_t), adj_t.col_indices()
    kept = (target >= start) & (target < stop)
    if any("compensate" in word for word in words):
        kept |= (source >= start) & (source < stop)
    near = torch.cat([target[kept], source[kept], torch.arange(start, stop)]).unique().numel()
    labels = NODES * (8 + 3)
    of_node = 4 * FEATURES + 8 + 3 + 8 + 8  # x, y, three masks, node_order, where edges begin
    expected = labels + near * of_node + 8 + int(kept.sum()) * (8 + 4)
    assert nbytes(tensors_of(step.graph)) == expected, (nbytes(tensors_of(step.graph)), expected)
    assert expected - labels < nbytes(tensors_of(graph))
    del graph, adj_t, target, source
    gc.collect()
    assert feature() is None  # nothing else holds the whole graph


case(a_process_keeps_its_own_part, "of_corrected_histories", words=("model=gcn", "training.compensate=cut"))
case(a_process_keeps_its_own_part, "of_a_reversible_network", words=("model=revgnn", "model.num_layers=3"))


@case
def steps_are_those_on_the_whole_graph(
    rank: int, world: int, words: tuple[str, ...] = ("model=gcn", "training.compensate=cut", "training.refresh_every=1")
) -> None:
    family, graph = prepared(world, list(words))
    other, whole = prepared(world, list(words))
    other._prepared = whole
    steps = [made(family, graph), _on_whole(other, whole)]
    assert [step.graph.own is None for step in steps] == [False, True]
    torch.testing.assert_close(steps[0].evaluate(), steps[1].evaluate(), rtol=0, atol=0)
    for epoch in (1, 2):
        found = []
        for step in steps:
            torch.manual_seed(epoch)
            step.begin(epoch)
            found.append((step.train(), step.score(step.evaluate(), "val"), step.observe(errors=True)))
        assert str(found[0]) == str(found[1])
    for one, another in zip(steps[0].network.parameters(), steps[1].network.parameters(), strict=True):
        assert torch.equal(one, another)


case(
    steps_are_those_on_the_whole_graph,
    "steps_of_a_reversible_network",
    words=("model=revgnn", "model.num_layers=3", "training.errors_every=1"),
)


def _on_whole(family: Any, graph: TrainingGraph) -> Step:
    usual = TrainingGraph.in_part
    TrainingGraph.in_part = lambda self, *arguments: self  # type: ignore[method-assign]
    try:
        return made(family, graph)
    finally:
        TrainingGraph.in_part = usual  # type: ignore[method-assign]


@case
def what_needs_all_edges_keeps_the_whole_graph(rank: int, world: int) -> None:
    for words in (["training.compensate=complete"], ["training.compensate=cut", "training.combine=0.8"]):
        family, graph = prepared(world, ["model=gcn", *words])
        step = made(family, graph)
        assert step.graph.own is None
        assert step.graph.data is graph.data


@case
def a_run_goes_on_with_its_histories_of_gradients(rank: int, world: int) -> None:
    """Those of every process, which went on for steps of an epoch before the processes died."""
    words = ["model=gcn", "training.compensate=cut", "model.dropout=0.3", "epochs=3", "checkpoint_every=2"]
    folder = Path(team().share(tempfile.mkdtemp() if rank == 0 else None))
    found = []
    for name in ("whole", "broken", "broken"):
        family, graph = prepared(world, words)
        checkpoint = folder / f"{name}.ckpt"
        trainer = Trainer(family.settings, made(family, graph), checkpoint)
        there = team().share(checkpoint.exists())
        if there:
            trainer.load()
            assert (trainer.epoch, trainer.draws_on) == (2, True)
        else:
            team().draw_apart(0, 0)
        if name == "broken" and not there:
            trainer.step.fill()
            for _ in range(2):
                trainer._epoch()
            trainer.save()
            trainer.step.train()
            dist.barrier()
            continue
        trainer.fit(lambda row: None)
        state = trainer.step.network.gradients.state()
        rows = [{key: str(value) for key, value in row.items() if key != "seconds"} for row in trainer.history]
        found.append((rows, dict(trainer.step.network.named_parameters()), state))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=0, atol=0)
    assert any(bool(table["rows"]["table"].any()) for table in found[0][2]["tables"])

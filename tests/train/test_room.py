from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from recollect.data import GraphDataset
from recollect.memory import tensor_bytes
from recollect.train import _room
from recollect.train._build import build_optimizer
from recollect.train._command import command
from recollect.train._config import parse
from recollect.train._errors import TrainingError
from recollect.train._room import check_network, check_processes
from recollect.train._settings import Settings
from recollect.train.families import family_of, outline_of

CPU = torch.device("cpu")
KINDS = ["gcn", "gat", "appnp", "gcn2", "pna", "pna_jk", "gin", "revgnn"]


def check(settings: Settings, graph: GraphDataset) -> None:
    """Hold the network against the memory that is free."""
    family = family_of(settings)
    prepared = family.prepare(graph)
    outline = outline_of(settings, prepared)
    assert outline is not None
    check_network(settings, outline, prepared.data.num_nodes, CPU, family.any_depth)


def trained_bytes(network: nn.Module, settings: Settings) -> int:
    """Bytes of parameters, gradients and the optimizer's numbers after a step."""
    optimizer = build_optimizer(settings.optimizer, network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return tensor_bytes(network, optimizer, gradients=True)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_refused_where_less_is_free_than_it_takes_and_not_where_more_is(
    kind: str, optimizer: str, graph_maker: Callable[..., GraphDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_maker("multiclass", "accuracy", 3)
    channels = 64
    words = [f"model={kind}", "model.num_layers=9", f"model.hidden_channels={channels}", f"optimizer={optimizer}"]
    settings = parse(words)
    family = family_of(settings)
    network = family.build(family.prepare(graph), CPU)
    trained = trained_bytes(network, settings)
    # Objects of the interpreter, and what a plain step keeps.
    rest = 1536 * sum(1 for _ in network.modules()) + 512 * len(list(network.parameters())) + 9 * 4 * 12 * channels
    monkeypatch.setattr(_room, "available_bytes", lambda device: trained + rest)
    check(settings, graph)
    monkeypatch.setattr(_room, "available_bytes", lambda device: int(0.9 * trained))
    with pytest.raises(TrainingError, match=r"model.num_layers=9: a network of 9 layers .* KiB are free|MiB are free"):
        check(settings, graph)


def test_as_many_layers_have_room_as_the_message_says(
    graph_maker: Callable[..., GraphDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_maker("multiclass", "accuracy", 3)
    monkeypatch.setattr(_room, "available_bytes", lambda device: 2**30)
    with pytest.raises(TrainingError, match=r"measure.depths=1000000: .* fewer layers, [\d,]+ at most, or") as found:
        check(parse(["measure.depths=[8,1000000]"]), graph)
    most = int(str(found.value).partition("fewer layers, ")[2].partition(" at")[0].replace(",", ""))
    check(parse([f"measure.depths=[8,{most}]"]), graph)
    with pytest.raises(TrainingError):
        check(parse([f"measure.depths=[8,{most + 1}]"]), graph)
    check(parse(["measure.depths=[8,1000000]", "measure.enabled=false"]), graph)
    check(parse(["model.tied=true", "model.num_layers=1000000"]), graph)  # has the parameters of one layer


def test_what_would_end_the_process_is_refused_in_a_line_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_room, "available_bytes", lambda device: 2**34)
    words = ["dataset=karate", "threads=1", f"run_dir={tmp_path}/run"]
    for word in ("model.num_layers=1000000", "measure.depths=[1000000]", "model.hidden_channels=1000000"):
        assert command([*words, word]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "at least" in said
    assert not (tmp_path / "run").exists()


def test_processes_need_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_room, "available_bytes", lambda device: 2**30)
    check_processes(5)
    with pytest.raises(TrainingError, match=r"devices=6: .* at least 1.17 GiB, .* free: choose 5 or fewer"):
        check_processes(6)

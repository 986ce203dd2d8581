from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from recollect.train._build import build_dataset, build_optimizer, warmup
from recollect.train._config import parse
from recollect.train._errors import TrainingError, UsageError


def test_missing_raw_files_are_named(tmp_path):
    settings = parse(["dataset=cora", f"data.root={tmp_path}"])
    with pytest.raises(TrainingError, match=r"ind\.cora[\s\S]*dataset\.options\.download=true") as error:
        build_dataset(settings.dataset, settings.data)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    "override", ["dataset.name=coraa", "dataset.options.k=0", "dataset.options={k: 10, colour: red}"]
)
def test_a_wrong_dataset_is_wrong_usage(override):
    settings = parse([]).dataset
    settings = {
        "dataset.name=coraa": replace(settings, name="coraa"),
        "dataset.options.k=0": replace(settings, options={"k": 0}),
        "dataset.options={k: 10, colour: red}": replace(settings, options={"k": 10, "colour": "red"}),
    }[override]
    with pytest.raises(UsageError, match=r"coraa|k is 0|colour"):
        build_dataset(settings, parse([]).data)


def test_the_seed_of_generated_graphs_is_its_own():
    settings = parse(["dataset=sbm", "dataset.options.num_nodes=50", "dataset.options.num_classes=2"])
    one = build_dataset(settings.dataset, settings.data)
    same = build_dataset(settings.dataset, settings.data)
    other = build_dataset(settings.dataset, replace(settings.data, seed=1))
    assert torch.equal(one.data.x, same.data.x)
    assert not torch.equal(one.data.x, other.data.x)


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers_get_their_settings(name, kind):
    settings = parse([f"optimizer={name}", "optimizer.lr=0.5", "optimizer.weight_decay=0.25"]).optimizer
    optimizer = build_optimizer(settings, torch.nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert optimizer.defaults.items() >= {"lr": 0.5, "weight_decay": 0.25}.items()
    assert optimizer.defaults.get("momentum", 0.9) == 0.9


def test_a_wrong_option_of_the_optimizer_is_wrong_usage():
    settings = parse(["optimizer.options.betas=[a,b]"]).optimizer
    with pytest.raises(UsageError, match=r"optimizer.options.betas=\[a,b\]: must be two numbers"):
        build_optimizer(settings, torch.nn.Linear(2, 2))
    settings = parse(["optimizer.options.betas=[2.0,0.9]"]).optimizer
    with pytest.raises(UsageError, match="the optimizer cannot be built: Invalid beta"):
        build_optimizer(settings, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("betas", ["[]", "[0.9]", "[0.9,0.99,0.999]"])
def test_another_number_of_betas_is_refused(betas):
    settings = parse([f"optimizer.options.betas={betas}"]).optimizer
    with pytest.raises(UsageError, match=rf"optimizer.options.betas={re.escape(betas)}: must be two numbers"):
        build_optimizer(settings, torch.nn.Linear(2, 2))


class Two(torch.nn.Module):
    """Says which of its modules are regularised."""

    def __init__(self):
        super().__init__()
        self.reg_modules = torch.nn.ModuleList([torch.nn.Linear(2, 3)])
        self.nonreg_modules = torch.nn.ModuleList([torch.nn.Linear(3, 1), torch.nn.Linear(1, 1)])


def test_two_groups_have_two_weight_decays():
    settings = parse(["optimizer=adam", "optimizer.weight_decay=0.5", "optimizer.other_weight_decay=0.25"]).optimizer
    model = Two()
    first, second = build_optimizer(settings, model).param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0.25)
    assert [p.numel() for p in first["params"]] == [6, 3]
    assert [p.numel() for p in second["params"]] == [3, 1, 1, 1]


def test_one_weight_decay_is_for_all_parameters():
    (group,) = build_optimizer(parse(["optimizer.weight_decay=0.5"]).optimizer, Two()).param_groups
    assert (group["weight_decay"], len(group["params"])) == (0.5, 6)


def test_a_model_that_does_not_say_what_is_regularised_has_one_weight_decay():
    settings = parse(["optimizer.other_weight_decay=0.0"]).optimizer
    with pytest.raises(UsageError, match=r"other_weight_decay=0.0: Linear does not say"):
        build_optimizer(settings, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("epochs", "rates"), [(0, [1, 1, 1]), (2, [1 / 3, 2 / 3, 1, 1])])
def test_the_rate_rises_to_its_value(epochs, rates):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = warmup(optimizer, epochs), []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(rates)


def test_a_file_of_one_s_own_is_loaded_with_its_options(tmp_path):
    np.savez(tmp_path / "g.npz", edge_index=[[0, 1, 2], [1, 2, 3]], y=np.arange(20) % 2, x=np.ones((20, 2)))
    graph = build_dataset(
        *_parsed("dataset=file", f"dataset.path={tmp_path / 'g.npz'}", "dataset.options.undirected=true", "data.seed=3")
    )
    assert graph.data.edge_index.T.tolist() == [[0, 1], [1, 2], [2, 3], [1, 0], [2, 1], [3, 2]]
    assert any("seed 3" in note for note in graph.notes)
    with pytest.raises(UsageError, match="no path is given"):
        build_dataset(*_parsed("dataset=file"))
    with pytest.raises(UsageError, match="there is no file or folder"):
        build_dataset(*_parsed("dataset=file", f"dataset.path={tmp_path / 'nothing.npz'}"))
    (tmp_path / "g.npz").write_text("x")
    with pytest.raises(TrainingError, match=r"is no file of numpy\.savez"):
        build_dataset(*_parsed("dataset=file", f"dataset.path={tmp_path / 'g.npz'}"))
    with pytest.raises(UsageError, match="folder"):
        build_dataset(*_parsed("dataset=karate", f"data.root={tmp_path / 'g.npz'}"))


def _parsed(*words):
    settings = parse(words)
    return settings.dataset, settings.data

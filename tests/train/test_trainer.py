from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from lightning_fabric import Fabric
from torch.testing import assert_close

from recollect.train._config import parse
from recollect.train._errors import InvalidRunError, NonFiniteLossError
from recollect.train._metrics import score
from recollect.train._settings import RevGNNSettings
from recollect.train._step import Step
from recollect.train._surroundings import AtomicCheckpointIO
from recollect.train._trainer import Trainer
from recollect.train.families import family_of

COMMON = ["warmup_epochs=0", "epochs=6", "optimizer.lr=0.05", "checkpoint_every=1"]
BASE = parse([*COMMON, "model.num_layers=3", "model.hidden_channels=8"])


PARTS = parse(
    [
        *(*COMMON, "model=gcn", "model.num_layers=3", "training=autoscale"),
        *("training.num_parts=4", "training.parts_per_batch=1", "training.errors_every=2"),
    ]
)
LAYERWISE = replace(PARTS, training=replace(PARTS.training, layerwise=True, history_dtype="int8"))


def make(graph, tmp_path, settings=BASE, seed=0):
    torch.manual_seed(seed)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[AtomicCheckpointIO()])
    family = family_of(settings)
    prepared = family.prepare(graph)
    step = Step(fabric, family, prepared, family.build(prepared, fabric.device))
    return Trainer(settings, step, tmp_path / "checkpoint.ckpt")


def numbers(trainer):
    """The history without what a clock says, and without drift, of which each backward takes another random sample."""
    return [
        {
            key: value if math.isfinite(value) else str(value)
            for key, value in row.items()
            if key not in ("seconds", "drift")
        }
        for row in trainer.history
    ]


@pytest.fixture
def graph(graph_maker):
    return graph_maker("multiclass", "accuracy", 3)


def test_epochs_are_those_of_a_plain_loop(graph, tmp_path):
    trainer = make(graph, tmp_path)
    trainer.fit(lambda row: None)
    torch.manual_seed(0)
    model = family_of(replace(BASE, model=replace(cast(RevGNNSettings, BASE.model), disable=True))).build(
        graph, torch.device("cpu")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=1e-4)
    data, losses = graph.data, []
    for _ in range(6):
        model.train()
        loss = torch.nn.functional.cross_entropy(
            model(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    logits = model(data.x, data.edge_index)
    assert [row["loss"] for row in trainer.history] == pytest.approx(losses, rel=1e-4)
    assert trainer.history[-1]["val_accuracy"] == score(graph, logits, "val")
    assert trainer.history[-1]["train_accuracy"] == score(graph, logits, "train")
    assert [row["epoch"] for row in trainer.history] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= row["drift"] < 1e-3 for row in trainer.history)


def test_labels_are_trained_by_binary_cross_entropy(graph_maker, tmp_path):
    graph = graph_maker("multilabel", "micro_f1", 4)
    trainer = make(graph, tmp_path, replace(BASE, epochs=1))
    trainer.fit(lambda row: None)
    torch.manual_seed(0)
    model = family_of(BASE).build(graph, torch.device("cpu")).train()
    mask = graph.data.train_mask
    p, y = torch.sigmoid(model(graph.data.x, graph.data.edge_index))[mask], graph.data.y[mask]
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert trainer.history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("settings", [BASE, PARTS, LAYERWISE], ids=["reversible", "parts", "parts-layerwise"])
def test_a_trainer_goes_on_from_a_checkpoint_as_if_nothing_had_happened(graph, tmp_path, settings, stop):
    whole = make(graph, tmp_path, settings)
    whole.fit(lambda row: None)
    whole.checkpoint.unlink()

    class KilledError(Exception):
        pass

    def kill(row):
        if row["epoch"] == stop:
            raise KilledError

    with pytest.raises(KilledError):
        make(graph, tmp_path, settings).fit(kill)
    resumed = make(graph, tmp_path, settings, seed=5)
    resumed.load()
    assert resumed.epoch == stop
    resumed.fit(lambda row: None)
    assert numbers(resumed) == numbers(whole)
    assert resumed.best_epoch == whole.best_epoch
    assert all(torch.equal(resumed.best_state[name], value) for name, value in whole.best_state.items())
    assert torch.equal(torch.get_rng_state(), resumed.step.fabric.load(resumed.checkpoint)["random"]["cpu"])


CUT = ("model=gcn", "training.compensate=cut", "model.dropout=0")
CORRECTED = {
    "cut": CUT,
    "cut, with dropout": (*CUT, "model.dropout=0.3"),
    "complete": ("model=gat", "training.compensate=complete"),
    "combined": (*CUT, "training.combine=0.8"),
    "refreshed": (*CUT, "training.refresh_every=2"),
    "int8": (*CUT, "training.history_dtype=int8", "training.layerwise=true"),
    "reversible": ("model=revgnn", "model.conv=graphconv", "training.compensate=cut"),
    "in files": (*CUT, "training.history_path={}"),
}


@pytest.mark.parametrize("name", CORRECTED)
def test_histories_of_gradients_go_on_too(graph, tmp_path, name):
    """Of the checkpoint's epoch, though the run went on for two steps before it died, and their files with it."""
    found = []
    for broken in (False, True):
        folder = tmp_path / str(broken)
        folder.mkdir()
        words = [word.format(folder / "files") for word in CORRECTED[name]]
        parts = ("training=autoscale", "training.num_parts=4", "training.parts_per_batch=1", "model.hidden_channels=8")
        settings = parse([*COMMON, "epochs=4", "model.num_layers=3", *parts, *words])
        trainer = make(graph, folder, settings)
        if broken:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Step, "_update", dying(10))
                with pytest.raises(KeyboardInterrupt) as caught:
                    trainer.fit(lambda row: None)
            caught.value.__traceback__ = None  # which holds the files open
            del caught, trainer
            gc.collect()
            trainer = make(graph, folder, settings, seed=5)
            trainer.load()
            assert trainer.epoch == 2
        trainer.fit(lambda row: None)
        gradients = trainer.step.network.gradients
        tables = [gradients.table(layer + 1).table.state() for layer in range(len(gradients.tables))]
        found.append((numbers(trainer), trainer.best_state, tables, gradients.state()["sums"]))
    (rows, best, tables, sums), (resumed, *others) = found
    assert resumed == rows
    assert_close(others, [best, tables, sums], rtol=0, atol=0)
    assert any(bool(table["table"].any()) for table in tables)


def dying(number):
    """An update of the parameters that dies after its call of this number, from 0."""
    own, done = Step._update, list[None]()

    def update(step):
        done.append(own(step))
        if len(done) > number:
            raise KeyboardInterrupt

    return update


def test_histories_of_another_network_are_refused(graph, tmp_path):
    words = [
        "training=autoscale",
        "training.num_parts=4",
        "training.parts_per_batch=1",
        *CUT,
        "model.hidden_channels=8",
    ]
    trainer = make(graph, tmp_path, parse([*COMMON, "epochs=1", "model.num_layers=3", *words]))
    trainer.fit(lambda row: None)
    kept = trainer.step.kept()
    gone = make(graph, tmp_path, trainer.settings)
    stored = trainer.step.fabric.load(trainer.checkpoint)
    trainer.step.fabric.save(gone.checkpoint, stored | {"kept": stored["kept"] * 2})
    gone.load()  # of two processes: one begins anew
    assert gone.step.network.gradients.is_empty(1)
    gradients = trainer.step.network.gradients
    kept["gradients"]["tables"][0]["rows"]["table"] = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"layer 1: table: a history of .* cannot load \[3, 8\]"):
        trainer.step.restore(kept)
    assert gradients.is_empty(1)
    assert gradients.is_empty(2)
    with pytest.raises(ValueError, match="cannot be taken over"):
        trainer.step.restore({"gradients": {"tables": []}})


def test_checkpoints_are_of_every_so_many_epochs_and_the_last(graph, tmp_path):
    trainer = make(graph, tmp_path, replace(BASE, epochs=5, checkpoint_every=2))
    seen = []

    def look(row):
        state = torch.load(trainer.checkpoint, weights_only=True) if trainer.checkpoint.exists() else {"history": []}
        seen.append(len(state["history"]))

    trainer.fit(look)
    assert seen == [0, 2, 2, 4, 5]


def test_checkpoints_take_a_tenth_of_the_time(graph, tmp_path, monkeypatch):
    """A clock that only training (4 ticks an epoch) and saving (2 ticks) move."""
    now = 0.0
    trainer = make(graph, tmp_path, replace(BASE, epochs=12, checkpoint_every=None))
    train, write, saved = trainer.step.train, trainer.step.fabric.save, []

    def tick(of, ticks):
        def call(*args):
            nonlocal now
            now += ticks
            return of(*args)

        return call

    monkeypatch.setattr("recollect.train._trainer.time.perf_counter", lambda: now)
    monkeypatch.setattr(trainer.step, "train", tick(train, 4))
    monkeypatch.setattr(trainer.step.fabric, "save", tick(write, 2))
    monkeypatch.setattr(trainer, "save", lambda: (saved.append(trainer.epoch), type(trainer).save(trainer)))
    trainer.fit(lambda row: None)
    assert saved == [1, 6, 11, 12]  # 5 epochs of 4 ticks are the first to be 9 times 2 ticks; and the last


def test_the_best_epoch_has_the_best_score_then_the_lowest_loss(graph, tmp_path):
    trainer = make(graph, tmp_path, replace(BASE, epochs=15))
    states = []
    trainer.fit(lambda row: states.append({k: v.clone() for k, v in trainer.step.network.state_dict().items()}))
    best = max(trainer.history, key=lambda row: (row["val_accuracy"], -row["val_loss"], -row["epoch"]))
    assert trainer.best == best
    assert best["epoch"] < 15  # otherwise the last parameters would do as well
    trainer.restore_best()
    kept = states[trainer.best_epoch - 1]
    assert all(torch.equal(value, kept[name]) for name, value in trainer.step.network.state_dict().items())


def test_training_stops_when_nothing_gets_better(graph, tmp_path):
    trainer = make(graph, tmp_path, replace(BASE, epochs=200, patience=3))
    trainer.fit(lambda row: None)
    assert trainer.epoch == trainer.best_epoch + 3 < 200
    again = make(graph, tmp_path, replace(BASE, epochs=200, patience=3))
    again.load()
    assert again.done


def test_gradients_are_clipped(graph, tmp_path):
    trainer = make(graph, tmp_path, replace(BASE, clip_norm=1e-3))
    trainer.step.train()
    norms = [parameter.grad.norm() for parameter in trainer.step.network.parameters()]
    assert float(torch.stack(norms).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_names_its_epoch_and_keeps_the_checkpoint_before(graph, tmp_path):
    trainer = make(graph, tmp_path)

    def ruin(row):
        if row["epoch"] == 2:
            with torch.no_grad():
                trainer.step.network.head.bias.fill_(math.inf)

    with pytest.raises(NonFiniteLossError, match=r"epoch 3: the loss is (nan|inf).*optimizer.lr.*checkpoint.ckpt"):
        trainer.fit(ruin)
    again = make(graph, tmp_path)
    again.load()
    assert again.epoch == 2
    assert all(bool(value.isfinite().all()) for value in again.step.network.state_dict().values())


def test_a_step_that_ruins_the_parameters_is_not_kept(graph, tmp_path):
    # In the second step the loss is still finite; the learning rate then throws the parameters out of range.
    trainer = make(graph, tmp_path)

    def hurl(row):
        for group in trainer.step.optimizer.param_groups:
            group["lr"] = 1e37

    with pytest.raises(NonFiniteLossError, match=r"epoch 2: the (validation loss|model's output) is") as error:
        trainer.fit(hurl)
    assert error.value.epoch == 2
    assert len(torch.load(trainer.checkpoint, weights_only=True)["history"]) == 1


@pytest.mark.parametrize("damage", ["cut", "text", "other model"])
def test_a_checkpoint_that_cannot_be_used_is_refused(graph, tmp_path, damage):
    trainer = make(graph, tmp_path, replace(BASE, epochs=1))
    trainer.fit(lambda row: None)
    if damage == "cut":
        trainer.checkpoint.write_bytes(trainer.checkpoint.read_bytes()[:1000])
    elif damage == "text":
        trainer.checkpoint.write_text("no checkpoint")
    else:
        trainer = make(graph, tmp_path, replace(BASE, model=replace(BASE.model, hidden_channels=4)))
    with pytest.raises(InvalidRunError, match=r"checkpoint.ckpt cannot be read \("):
        trainer.load()


def test_histories_are_filled_before_the_first_step(graph, tmp_path):
    trainer = make(graph, tmp_path, replace(PARTS, epochs=1, optimizer=replace(PARTS.optimizer, lr=0.0)))
    trainer.settings = replace(trainer.settings, training=replace(PARTS.training, errors_every=1))
    trainer.step.network.dropout = 0.0
    trainer.fit(lambda row: None)  # with a rate of 0 the histories stay those of the parameters
    assert [trainer.history[0][name] for name in ("error_1", "error_2")] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_errors_of_histories_are_measured_every_so_many_epochs(graph, tmp_path):
    trainer = make(graph, tmp_path, PARTS)
    trainer.fit(lambda row: None)
    known = [row["epoch"] for row in trainer.history if math.isfinite(row["error_1"])]
    assert known == [2, 4, 6]
    assert all(row["age_2"] > 0 for row in trainer.history)


def test_the_best_parameters_hold_no_histories(graph, tmp_path):
    trainer = make(graph, tmp_path, replace(PARTS, epochs=1))
    trainer.fit(lambda row: None)
    assert trainer.best_state.keys() == dict(trainer.step.network.named_parameters()).keys()

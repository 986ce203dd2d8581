"""The callback: with a trainer in small that calls its hooks, and with Lightning itself where it is installed."""

import contextlib
import copy
import importlib.util
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recollect.budget import BudgetError, LightningBudget
from recollect.memory import peak_memory

INSTALLED = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)]


class Callback:
    """What Lightning's callbacks extend."""


class Trainer:
    """Calls the hooks of one callback, and takes plain steps; what peaks they have is noted."""

    def __init__(self, callback=None):
        self.callback = callback
        self.peaks = []
        self.precision_plugin = types.SimpleNamespace(train_step_context=contextlib.nullcontext)

    def fit(self, module, batches):
        torch.manual_seed(3)
        module.trainer, optimizer = self, torch.optim.SGD(module.parameters(), lr=0.1)
        hooks = self.callback or types.SimpleNamespace(**dict.fromkeys(HOOKS, lambda *args: None))
        hooks.on_train_start(self, module)
        try:
            for index, batch in enumerate(batches):
                hooks.on_train_batch_start(self, module, batch, index)
                optimizer.zero_grad()
                with peak_memory("cpu") as memory:
                    output = module.training_step(batch, index)
                    (output["loss"] if isinstance(output, dict) else output).backward()
                self.peaks.append(memory.peak_bytes)
                optimizer.step()
        except Exception as error:
            hooks.on_exception(self, module, error)
            raise
        hooks.on_fit_end(self, module)


HOOKS = ("on_train_start", "on_train_batch_start", "on_exception", "on_fit_end")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1))
        self.last = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.last(self.net(x))


class Body:
    """What a module for Lightning, and one for the trainer in small, have in common."""

    automatic_optimization = True
    log: Any
    parameters: Any

    def make(self):
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(32) for _ in range(6))
        self.head = nn.Linear(32, 4)
        self.calls = 0
        return self

    def training_step(self, batch, batch_idx):
        self.calls += 1
        x, y = batch
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(self.head(x), y)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Module(Body, nn.Module):
    def __init__(self):
        super().__init__()
        self.make()
        self.logged = []

    def log(self, name, value):
        self.logged.append(name)


def batches(*sizes):
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(n, 32, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def fitted(callback=None, given=(64, 64, 64)):
    module, trainer = Module(), Trainer(callback)
    trainer.fit(module, batches(*given))
    return module, trainer


def is_plain(module):
    return all("forward" not in vars(part) for part in module.modules())


@pytest.fixture
def lightning(monkeypatch):
    module: Any = types.ModuleType("pytorch_lightning")
    module.Callback = Callback
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return module


def test_steps_stay_within_the_budget_and_parameters_are_those_without(lightning):
    oracle, plain = fitted()
    budget = max(plain.peaks) * 6 // 10
    callback = LightningBudget(budget, units=Block)
    assert isinstance(callback, Callback)
    module, trainer = fitted(callback)
    assert max(trainer.peaks) <= budget
    assert all(map(torch.equal, module.state_dict().values(), oracle.state_dict().values()))
    assert (module.calls, module.logged) == (3, ["loss"] * 3)  # what was only tried is not counted
    assert {row.unit for row in callback.plan.rows} == {f"blocks.{k}" for k in range(6)}
    assert is_plain(module)
    assert "log" not in vars(module)


def test_a_run_that_goes_on_has_its_choice(lightning):
    budget = max(fitted()[1].peaks) * 6 // 10
    first, again, other = LightningBudget(budget), LightningBudget(budget), LightningBudget(budget + 1)
    fitted(first)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    for callback in (again, other):
        callback.load_state_dict(state)
    fitted(again)
    assert (again.plan.rows, again.plan.steps) == (first.plan.rows, 1)
    fitted(other)
    assert other.plan.steps > 1
    duplicate = pickle.loads(pickle.dumps(first))
    assert type(duplicate) is type(first)
    assert (duplicate.budget, duplicate.state_dict()) == (first.budget, first.state_dict())


def test_larger_batches_are_planned_anew_or_refused(lightning):
    budget = max(fitted()[1].peaks) * 9 // 10
    again = LightningBudget(budget, on_exceed="replan")
    _, trainer = fitted(again, (32, 48, 64))
    assert max(trainer.peaks) <= budget
    with pytest.raises(BudgetError, match="the budget is"):
        fitted(LightningBudget(budget, on_exceed="raise"), (32, 32, 64))


def test_manual_optimization_says_how_the_loss_is_computed(lightning):
    module = Module()
    module.automatic_optimization = False
    trainer = Trainer(LightningBudget("10 MB"))
    with pytest.raises(ValueError, match="Module optimizes manually"):
        trainer.fit(module, batches(8))
    callback = LightningBudget("10 MB", loss=lambda module, batch: module.training_step(batch, 0)["loss"])
    Trainer(callback).fit(module, batches(8))
    assert callback.plan.peak <= 10_000_000


def test_wrong_options_and_steps_without_a_loss_are_refused(lightning):
    with pytest.raises(TypeError, match="'unit' is no option"):
        LightningBudget("1 MB", unit=Block)
    module = Module()
    module.training_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="returned no loss, but a NoneType"):
        Trainer(LightningBudget("1 MB")).fit(module, batches(8))
    assert is_plain(module)


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="install lightning or pytorch-lightning"):
        LightningBudget("1 MB")


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_with_lightning_itself(name, tmp_path):
    package: Any = importlib.import_module("lightning.pytorch" if name == "lightning" else name)

    class Lit(Body, package.LightningModule):
        pass

    def fit(module, callbacks, epochs, path=None):
        torch.manual_seed(3)
        options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = package.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            default_root_dir=tmp_path,
            **options,
        )
        data = TensorDataset(torch.cat([x for x, _ in given]), torch.cat([y for _, y in given]))
        trainer.fit(module, DataLoader(data, batch_size=64), ckpt_path=path)
        return trainer

    given = batches(64, 64, 64)
    oracle = Lit().make()
    module = copy.deepcopy(oracle)
    fit(oracle, [], 2)
    callback = LightningBudget("500 kB")
    assert isinstance(callback, package.Callback)
    trainer = fit(module, [callback], 2)
    assert callback.plan.peak <= 500_000
    assert {row.strategy for row in callback.plan.rows} - {"store"}
    assert module.calls == 6
    assert is_plain(module)
    assert all(map(torch.equal, module.state_dict().values(), oracle.state_dict().values()))
    assert "loss" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = LightningBudget("500 kB")
    fit(module, [again], 3, tmp_path / "two.ckpt")
    assert (again.plan.rows, again.plan.steps) == (callback.plan.rows, 1)

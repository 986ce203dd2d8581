"""The epochs of a run, and all of its state that a checkpoint holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.frames import settle
from recollect.train._build import warmup
from recollect.train._errors import InvalidRunError, NonFiniteLossError
from recollect.train._settings import Settings
from recollect.train._step import Step
from recollect.train._stored_checkpoint import check_checkpoint
from recollect.train._team import team

__all__ = ["Row", "Trainer"]

Row = dict[str, float]
"""An epoch: epoch (from 1), loss, train_accuracy, val_accuracy, val_loss, learning_rate, seconds, and what
`Step.observe` returns."""

_PAUSE = 9  # between checkpoints, times as long as one takes


class Trainer:
    """Trains to the last epoch, or until validation stops getting better, and keeps the best parameters.

    The best epoch is that of the highest validation score, among equal ones that of the lowest validation loss.

    Args:
        settings: of the run.
        step: the model and its graph.
        checkpoint: the file that the state is saved to.

    Attributes:
        draws_on: whether :meth:`load` has found this process's own random state, of several.
    """

    def __init__(self, settings: Settings, step: Step, checkpoint: Path) -> None:
        self.settings = settings
        self.step = step
        self.checkpoint = checkpoint
        self.scheduler = warmup(step.optimizer.optimizer, settings.warmup_epochs)
        self.history: list[Row] = []
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        self.draws_on = False
        self._saved, self._saving = -math.inf, 0.0  # when the last checkpoint was written, and for how long

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.history)

    @property
    def best(self) -> Row:
        """The best epoch so far."""
        return self.history[self.best_epoch - 1]

    @property
    def done(self) -> bool:
        """Whether there is nothing more to train."""
        patience = self.settings.patience
        return self.epoch >= self.settings.epochs or (
            patience is not None and self.epoch > 0 and self.epoch - self.best_epoch >= patience
        )

    def fit(self, on_epoch: Callable[[Row], None]) -> None:
        """Train, save, and then report each epoch.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; the last checkpoint is of an epoch before it.
        """
        if not self.done:
            self.step.fill()
        while not self.done:
            row = self._epoch()
            if self.done or team().share(self._is_due()):  # all save together
                self.save()
            on_epoch(row)

    def _epoch(self) -> Row:
        start, epoch = time.perf_counter(), self.epoch + 1
        learning_rate = self.scheduler.get_last_lr()[0]
        self.step.begin(epoch)
        loss = self.step.train()
        self._check(loss, "loss", epoch)
        every = self.settings.training.errors_every
        seen = self.step.observe(errors=every is not None and epoch % every == 0)
        self.scheduler.step()
        logits = self.step.evaluate()
        found = [
            self.step.loss(logits, "val"),
            logits.double().abs().sum(),
            self.step.score(logits, "train"),
            self.step.score(logits, "val"),
        ]
        # Together: each number by itself would be waited for.
        val_loss, size, train_score, val_score = torch.stack([one.double().to(logits.device) for one in found]).tolist()
        settle()  # what is wrong with the gradients of this epoch is an error of this epoch
        # A step can ruin the parameters with its own loss still finite. Then nothing of this epoch may be kept.
        self._check(val_loss, "validation loss", epoch)
        self._check(size, "model's output", epoch)
        row = {
            "epoch": epoch,
            "loss": loss,
            "train_accuracy": train_score,
            "val_accuracy": val_score,
            "val_loss": val_loss,
            "learning_rate": float(learning_rate),
            "seconds": time.perf_counter() - start,
            **seen,
        }
        self.history.append(row)
        if self.best_epoch == 0 or self._rank(row) > self._rank(self.best):
            self.best_epoch = epoch
            self.best_state = {name: value.detach().clone() for name, value in self.step.network.state_dict().items()}
        return row

    @staticmethod
    def _rank(row: Row) -> tuple[float, float]:
        return row["val_accuracy"], -row["val_loss"]

    def _check(self, value: float, what: str, epoch: int) -> None:
        if math.isfinite(value):
            return
        kept = f"The checkpoint of an epoch before is kept: {self.checkpoint}" if self.checkpoint.exists() else ""
        raise NonFiniteLossError(
            f"epoch {epoch}: the {what} is {value}, so training stopped. Try a lower optimizer.lr, warmup_epochs=5, "
            f"clip_norm=1.0, model.norm=batch or precision=32-true. {kept}".rstrip(),
            epoch,
        )

    def _is_due(self) -> bool:
        every = self.settings.checkpoint_every
        if every is not None:
            return self.epoch % every == 0
        return time.perf_counter() - self._saved >= _PAUSE * self._saving

    def save(self) -> None:
        """Write the checkpoint, in one step; of several processes the first does, with what all of them keep."""
        start, group, fabric = time.perf_counter(), team(), self.step.fabric
        random = _random_state(fabric.device)
        kept = group.gather(self.step.kept() | ({"random": random} if group.size > 1 else {}))
        if not group.is_first:
            return
        fabric.save(
            self.checkpoint,
            {
                "model": self.step.model,
                "optimizer": self.step.optimizer,
                "scheduler": self.scheduler.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
                "history": self.history,
                "best_epoch": self.best_epoch,
                "best_state": self.best_state,
                "random": random,
                "kept": kept,
            },
        )
        self._saved = time.perf_counter()
        self._saving = self._saved - start

    def load(self) -> None:
        """Go back to the checkpoint.

        Raises:
            InvalidRunError: it cannot be read, or is not of this model.
        """
        if not self.checkpoint.is_file():
            raise InvalidRunError(f"the checkpoint {self.checkpoint} is no file; remove it, and start the run anew")
        fabric = self.step.fabric
        network, optimizer, precision = self.step.network, self.step.optimizer.optimizer, fabric.strategy.precision
        others = {"scheduler": self.scheduler.state_dict(), "precision": precision.state_dict()}
        try:
            stored = fabric.load(self.checkpoint, weights_only=True)
            rest = check_checkpoint(stored, network, optimizer, others, self.checkpoint)
            network.load_state_dict(rest["model"])
            optimizer.load_state_dict(rest["optimizer"])
            self.scheduler.load_state_dict(rest["scheduler"])
            precision.load_state_dict(rest["precision"])
            self.history, self.best_epoch = rest["history"], rest["best_epoch"]
            self.best_state = {name: value.to(fabric.device) for name, value in rest["best_state"].items()}
            _restore_random_state(rest["random"], fabric.device)
            self._restore(rest.get("kept", []))
        except InvalidRunError:
            raise
        except Exception as error:  # torch.load of a damaged file raises half a dozen unrelated types
            line = str(error).strip().partition("\n")[0]
            raise InvalidRunError(
                f"the checkpoint {self.checkpoint} cannot be read ({type(error).__name__}: {line}); start the run anew"
            ) from error

    def _restore(self, kept: list[dict[str, Any]]) -> None:
        """Take over what each process kept; of another number of processes it begins anew."""
        group = team()
        if len(kept) != group.size:  # earlier checkpoints have nothing of it
            return
        own = kept[group.rank]
        self.step.restore(own)
        if "random" in own:
            _restore_random_state(own["random"], self.step.fabric.device)
            self.draws_on = True

    def restore_best(self) -> None:
        """Give the model the parameters of the best epoch."""
        self.step.network.load_state_dict(self.best_state)


def _random_state(device: torch.device) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    state = {"cpu": torch.get_rng_state(), "cuda": cuda}
    if device.type not in state:
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if device.type not in ("cpu", "cuda") and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])

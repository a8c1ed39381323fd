"""Training of one network: optimizer, moving average of weights, loss log, and a state file to resume from."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from engines.files import replacing

EMA_DECAY = 0.999
LOG_EVERY = 10  # steps
LOG = "losses.jsonl"
PARTS = ("net", "optimizer", "schedule", "average")

Net = TypeVar("Net", bound=nn.Module)


@dataclass
class Learner(Generic[Net]):
    """A network in training, and the file its state is saved to."""

    net: Net
    optimizer: AdamW
    schedule: LambdaLR
    average: Net
    path: Path
    step: int = 0

    def learn_until(self, steps: int, loss: Callable[[], Tensor], save: Callable[[], None], *, every: int) -> None:
        """Train until step `steps`; call `save` every `every` steps and at the end."""
        with _progress() as bar:
            task = bar.add_task(self.path.stem, total=steps)
            while self.step < steps:
                value = loss()
                self._learn(value)
                bar.update(task, completed=self.step)
                if self.step % LOG_EVERY == 0:
                    self._log(value.item())
                if self.step % every == 0 or self.step == steps:
                    self._save()
                    save()

    def _learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        for average, weight in zip(self.average.parameters(), self.net.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    def _log(self, loss: float) -> None:
        entry = {"net": self.path.stem, "step": self.step, "loss": round(loss, 5), "time": round(time.time())}
        with (self.path.parent / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")

    def _save(self) -> None:
        save_atomically({**{name: getattr(self, name).state_dict() for name in PARTS}, "step": self.step}, self.path)

    def resume(self) -> None:
        """Load the state file, if there is one."""
        if self.path.exists():
            state = load(self.path)
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.step = state["step"]


def new_learner(net: Net, rate: Callable[[int], float], peak: float, path: Path) -> Learner[Net]:
    """Return a learner at step 0 or at that of its state file; `rate` gives a fraction of the `peak` learning rate."""
    optimizer = AdamW(net.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(net).requires_grad_(False)
    learner = Learner(net, optimizer, LambdaLR(optimizer, rate), average, path)
    learner.resume()
    return learner


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write to a temporary file, then rename it: an interruption leaves the old file."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict[str, Any]:
    """Load what `save_atomically` wrote."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

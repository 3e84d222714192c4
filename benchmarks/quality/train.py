"""Training one arm: `Training` holds all that a stop must not lose."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks.quality import batches, texts
from benchmarks.quality.batches import ANSWER, TEXT, Batches
from benchmarks.quality.model import make_model, save

CHECKPOINT = "checkpoint.pt"
SECONDS_BETWEEN_CHECKPOINTS = 60.0
WORKERS, PREFETCHED = 2, 16
"""Processes that make batches, and how many batches each has made ahead."""
CURVE_POINTS = 200
WARM_UP = 0.02
"""The part of the steps in which the learning rate rises; then it falls to a tenth along a cosine."""


@dataclass(frozen=True)
class Settings:
    """What decides a training, and must be the same when it goes on.

    Attributes:
        arm: of the model.
        seed: of weights and data.
        steps: of the optimizer.
        tokens_per_step: in all sequences of a batch.
        learning_rate: the highest.
        tiny: a model of no size, a few texts and short sequences, for a CPU.
    """

    arm: str
    seed: int = 0
    steps: int = 4400
    tokens_per_step: int = 32768
    learning_rate: float = 1e-3
    tiny: bool = False


class Training:
    """A model on its way.

    Args:
        settings: of the training.
        folder: for checkpoints. One that is there is gone on with. None for a training that is only timed.
        device: where to train.

    Raises:
        ValueError: the checkpoint that is there has other settings; the message names the first of them.
    """

    def __init__(self, settings: Settings, folder: Path | None, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.path = None if folder is None else folder / CHECKPOINT
        curriculum = batches.TINY_CURRICULUM if settings.tiny else batches.CURRICULUM
        text = texts.load(held_out=False, limit=20 if settings.tiny else None)
        self.batches = Batches(text, settings.seed, settings.tokens_per_step, settings.steps, curriculum)
        self.model = make_model(settings.arm, settings.seed, device, settings.tiny)
        self.optimizer = torch.optim.AdamW(
            _groups(self.model), lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda"
        )
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.recalls: list[float] = []
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def run(self, report: Callable[[Training], None]) -> None:
        """Train to the end; `report` is called after every step."""
        saved = start = time.monotonic()
        before = self.seconds
        for batch in self._load_batches():
            loss, recall = self.train_step(batch).tolist()
            self.step += 1
            self.losses.append(loss)
            self.recalls.append(recall)
            self.seconds = before + time.monotonic() - start
            report(self)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                self.save()
                saved = time.monotonic()
        self.save()

    def _load_batches(self) -> Iterable[list[torch.Tensor]]:
        """Those that are left; other processes make them where a GPU would wait for them."""
        on_gpu = self.device.type == "cuda"
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(self.step, self.settings.steps),
            num_workers=WORKERS if on_gpu else 0,
            prefetch_factor=PREFETCHED if on_gpu else None,
            pin_memory=on_gpu,
        )

    def train_step(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        """[2]: the loss of text, and the part of the answers' numbers that was right, still on the device.

        What is learned from has both in equal parts: the mean loss of text, and that of answers' numbers.
        """
        tokens, roles = (x.to(self.device, non_blocking=True) for x in batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * _schedule(self.step / self.settings.steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(tokens[:, :-1], use_cache=False).logits
        targets = tokens[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        text, answers = (_mean(losses, (roles == role).flatten()) for role in (TEXT, ANSWER))
        right = _mean((logits.detach().argmax(dim=-1) == targets).flatten(), (roles == ANSWER).flatten())
        (text + answers).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([text.detach(), right])

    def speed(self, steps: int) -> float:
        """Tokens per second of `steps` steps on one batch of the greatest length, warmed up by as many."""
        batch = [torch.as_tensor(x, device=self.device) for x in self.batches[self.settings.steps - 1]]
        for _ in range(steps):
            last = self.train_step(batch)
        last.tolist()
        start = time.monotonic()
        for _ in range(steps):
            last = self.train_step(batch)
        last.tolist()
        return steps * batch[1].numel() / (time.monotonic() - start)

    def facts(self) -> dict[str, Any]:
        """What is said of the model that comes out."""
        return {
            **asdict(self.settings),
            "parameters": sum(x.numel() for x in self.model.parameters()),
            "train_tokens": self.batches.tokens(self.step),
            "train_seconds": round(self.seconds, 1),
            "losses": _means(self.losses),
            "recalls": _means(self.recalls),
        }

    def save(self) -> None:
        """Write the checkpoint as a whole: whoever stops this loses a minute at most."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.seconds, self.losses, self.recalls),
        }
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        torch.save(state, unfinished)
        unfinished.replace(self.path)

    def save_model(self, folder: Path) -> None:
        """Write the model as it is served."""
        save(self.model, folder, self.facts())

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, value in asdict(self.settings).items():
            if state["settings"][name] != value:
                found = state["settings"][name]
                raise ValueError(f"{path}: {name} {found!r}, expected {value!r}, as asked for now")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses, self.recalls = state["progress"]


def _mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Of the chosen values, 0 where there are none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def _means(losses: list[float]) -> list[float]:
    """Of some steps each, CURVE_POINTS numbers at most."""
    parts = np.array_split(np.array(losses), min(CURVE_POINTS, max(1, len(losses))))
    return [float(f"{part.mean():.4g}") for part in parts if len(part)]


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: matrices decay, the scales of norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [x for x in parameters if x.dim() > 1], "weight_decay": 0.1},
        {"params": [x for x in parameters if x.dim() == 1], "weight_decay": 0.0},
    ]


def _schedule(progress: float) -> float:
    """The learning rate after that part of the training, as a part of the highest."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))

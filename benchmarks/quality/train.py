"""Training one arm: `Training` holds all that a stop must not lose."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.quality import batches, texts
from benchmarks.quality.batches import ANSWER_WEIGHT, Batch, Batches
from benchmarks.quality.model import make_model, save

CHECKPOINT = "checkpoint.pt"
SECONDS_BETWEEN_CHECKPOINTS = 60.0
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
    steps: int = 4000
    tokens_per_step: int = 65536
    learning_rate: float = 3e-3
    tiny: bool = False


class Training:
    """A model on its way.

    Args:
        settings: of the training.
        folder: for checkpoints. One that is there is gone on with.
        device: where to train.

    Raises:
        ValueError: the checkpoint that is there has other settings; the message names the first of them.
    """

    def __init__(self, settings: Settings, folder: Path, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.path = folder / CHECKPOINT
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
        if self.path.exists():
            self._load()

    def run(self, report: Callable[[Training], None]) -> None:
        """Train to the end; `report` is called after every step."""
        saved = start = time.monotonic()
        before = self.seconds
        batch = self.batches.batch(self.step)
        while self.step < self.settings.steps:
            measured = self.train_step(batch)
            self.step += 1
            if self.step < self.settings.steps:
                batch = self.batches.batch(self.step)  # while the GPU is at work
            loss, recall = measured.tolist()
            self.losses.append(loss)
            self.recalls.append(recall)
            self.seconds = before + time.monotonic() - start
            report(self)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                self.save()
                saved = time.monotonic()
        self.save()

    def train_step(self, batch: Batch) -> torch.Tensor:
        """[2]: the loss and the part of the answers' numbers that was right. A GPU may still compute them."""
        tokens, weights = (torch.from_numpy(x).to(self.device) for x in batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * _schedule(self.step / self.settings.steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(tokens[:, :-1], use_cache=False).logits
        targets = tokens[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        is_number = weights == ANSWER_WEIGHT
        right = (logits.detach().argmax(dim=-1) == targets) & is_number
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), right.sum() / is_number.sum().clamp(min=1)])

    def facts(self) -> dict[str, Any]:
        """What is said of the model that comes out."""
        return {
            **asdict(self.settings),
            "parameters": sum(x.numel() for x in self.model.parameters()),
            "train_tokens": self.step * self.settings.tokens_per_step,
            "train_seconds": round(self.seconds, 1),
            "losses": _means(self.losses),
            "recalls": _means(self.recalls),
        }

    def save(self) -> None:
        """Write the checkpoint as a whole: whoever stops this loses a minute at most."""
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

    def _load(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        for name, value in asdict(self.settings).items():
            if state["settings"][name] != value:
                found = state["settings"][name]
                raise ValueError(f"{self.path}: {name} {found!r}, expected {value!r}, as asked for now")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses, self.recalls = state["progress"]


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

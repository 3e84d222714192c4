"""Pictures and a table of what the arms know: pass keys by length and depth, losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.drawing import new_figure
from benchmarks.quality.arms import ARMS, MAX_LENGTH
from benchmarks.quality.evaluate import NUM_DEPTHS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
COLORS = dict(zip(ARMS, ("#555555", "#2f6db3", "#3a9d5d", "#b5446e", "#f2a03d"), strict=True))


def figures(records: list[Record]) -> dict[str, Figure]:
    """The figures, by name."""
    return {"passkey": draw_passkeys(records), "loss": draw_losses(records)}


def cells(records: list[Record], arm: str, task: str) -> dict[tuple[int, int], float]:
    """By (length, depth), the part of an arm's samples that was right, of all residues."""
    sums: dict[tuple[int, int], list[float]] = {}
    for record in records:
        if (record["arm"], record["task"]) == (arm, task):
            total = sums.setdefault((record["length"], record["depth"]), [0.0, 0])
            total[0] += record["accuracy"] * record["samples"]
            total[1] += record["samples"]
    return {cell: right / samples for cell, (right, samples) in sums.items()}


def draw_passkeys(records: list[Record]) -> Figure:
    """A panel per arm: how often a pass key was found, by the context's length and where it lay."""
    arms = [arm for arm in ARMS if cells(records, arm, "passkey")]
    figure = new_figure(2.6 * len(arms) + 0.8, 3.6)
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    image = None
    for axes, arm in zip(panels, arms, strict=True):
        found = cells(records, arm, "passkey")
        lengths = sorted({length for length, _ in found})
        shares = np.full((NUM_DEPTHS, len(lengths)), np.nan)
        for (length, depth), share in found.items():
            shares[depth, lengths.index(length)] = share
        image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize=7)
        axes.set_title(arm, fontsize=10, loc="left")
        axes.set_xlabel("tokens")
    panels[0].set_yticks(range(NUM_DEPTHS), [f"{100 * depth // NUM_DEPTHS}%" for depth in range(NUM_DEPTHS)])
    panels[0].set_ylabel("depth of the pass key")
    figure.colorbar(image, ax=panels, label="found")
    return figure


def draw_losses(records: list[Record]) -> Figure:
    """Training losses, and losses of held-out text by position."""
    figure = new_figure(9.6, 3.8)
    training, held_out = figure.subplots(1, 2)
    for record in records:
        if record["task"] != "loss":
            continue
        arm = record["arm"]
        losses, by_position = record["losses"], record["loss_by_position"]
        tokens = np.linspace(0, record["train_tokens"] / 1e6, len(losses) + 1)[1:]
        training.plot(tokens, losses, color=COLORS[arm], linewidth=1, label=arm)
        positions = (np.arange(len(by_position)) + 0.5) * MAX_LENGTH / len(by_position)
        held_out.plot(positions, by_position, marker="o", markersize=3, color=COLORS[arm], label=arm)
    training.set_xlabel("million tokens")
    training.set_ylabel("training loss")
    training.legend(fontsize=8)
    held_out.set_xlabel("position in held-out text")
    held_out.set_ylabel("nats per token")
    return figure


def table(records: list[Record]) -> str:
    """A Markdown table: what every arm was trained on, its loss, and what it finds, the worst cell first."""
    lines = [
        "| attention | parameters | trained on, million tokens | in | alone, at the greatest length "
        f"| held-out loss | pass key, worst cell to {_short(MAX_LENGTH)} | all cells "
        f"| {_short(2 * MAX_LENGTH)} | recall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if record["task"] != "loss":
            continue
        arm = record["arm"]
        trained = {c: v for c, v in cells(records, arm, "passkey").items() if c[0] <= MAX_LENGTH}
        beyond = [v for c, v in cells(records, arm, "passkey").items() if c[0] > MAX_LENGTH]
        recall = [v for c, v in cells(records, arm, "recall").items() if c[0] <= MAX_LENGTH]
        cells_of_arm = [
            min(trained.values(), default=None),
            _mean([*trained.values()]),
            _mean(beyond),
            _mean(recall),
        ]
        shares = " | ".join("" if share is None else f"{share:.1%}" for share in cells_of_arm)
        lines.append(
            f"| {arm} | {record['parameters'] / 1e6:.1f} M | {record['train_tokens'] / 1e6:,.0f} "
            f"| {record['train_seconds']:,.0f} s | {_speed(records, arm)} | {record['loss']:.3f} | {shares} |"
        )
    return "\n".join(lines)


def _speed(records: list[Record], arm: str) -> str:
    rates = [r["tokens_per_second"] for r in records if (r["arm"], r["task"]) == (arm, "speed")]
    return f"{rates[0] / 1e3:,.0f} thousand tokens/s" if rates else ""


def _mean(shares: list[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None


def _short(length: int) -> str:
    """32K for 32,768 tokens."""
    return f"{-(-length // 1024)}K" if length >= 1000 else str(length)

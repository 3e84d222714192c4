"""Train and compare small models with and without S2-Attention.

python -m benchmarks.quality train --arm s2
python -m benchmarks.quality evaluate --arms s2 dense
python -m benchmarks.quality speed
python -m benchmarks.quality vocabulary
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.engine.options import fraction
from benchmarks.quality import texts, vocabulary
from benchmarks.quality.arms import ARMS, MAX_LENGTH, SERVED_LENGTH
from benchmarks.quality.evaluate import TINY, Suite, evaluate
from benchmarks.quality.model import load_facts
from benchmarks.quality.train import Settings, Training
from benchmarks.results_file import ResultFile, describe_run
from s2_vllm.cli import positive_int
from s2_vllm.demo.vocabulary import FILE

if TYPE_CHECKING:
    from vllm import LLM

KEY = ("arm", "task", "length", "depth", "residue")
"""What a measurement is known by."""
MODELS = Path("quality-models")
OUTPUT = Path("benchmarks/results/quality.json")
KV_CACHE_BYTES = 8 << 30
SPEED_SEQUENCES = 4
"""Of a step that is timed: with fewer, the host of such small models takes longer than a fast GPU."""
TINY_SETTINGS = {"steps": 4, "tokens_per_step": 384}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if not (options.tiny or options.command == "vocabulary" or torch.cuda.is_available()):
        print("benchmarks.quality: no CUDA GPU found, expected one, or --tiny", file=sys.stderr)
        return 2
    try:
        commands = {"train": _train, "evaluate": _evaluate, "speed": _speed, "vocabulary": _make_vocabulary}
        commands[options.command](options)
    except ValueError as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"benchmarks.quality: {error}\nexpected a larger GPU, or fewer --tokens-per-step", file=sys.stderr
        )
        return 1
    return 0


def _train(options: argparse.Namespace) -> None:
    settings = _settings(options, options.arm)
    folder = options.models / options.arm
    training = Training(settings, folder, torch.device("cpu" if options.tiny else "cuda"))
    if training.step:
        print(f"{options.arm}: going on after step {training.step}", flush=True)
    try:
        training.run(_report)
    except KeyboardInterrupt:
        training.save()
        print(f"\n{options.arm}: stopped after step {training.step}; the same command goes on from there")
        raise SystemExit(130) from None
    training.save_model(folder)
    print(f"\n{options.arm}: saved {folder}")


def _settings(options: argparse.Namespace, arm: str) -> Settings:
    names = ("seed", "steps", "tokens_per_step", "learning_rate")
    chosen = {name: getattr(options, name, None) for name in names}
    given = {name: value for name, value in chosen.items() if value is not None}
    return Settings(arm, tiny=options.tiny, **{**(TINY_SETTINGS if options.tiny else {}), **given})


def _report(training: Training) -> None:
    step, steps = training.step, training.settings.steps
    if step % max(1, steps // 200) and step != steps:
        return
    done = 40 * step // steps
    loss, recall = (np.mean(x[-20:]) for x in (training.losses, training.recalls))
    length = training.batches.length(step - 1)
    rate = training.batches.tokens(step) / training.seconds
    bar = f"[{'#' * done}{'.' * (40 - done)}]"
    print(
        f"\r{training.settings.arm} {bar} step {step} of {steps}, sequences of {length:,} tokens, "
        f"loss {loss:.3f}, {recall:.1%} of the numbers right, {rate / 1e3:,.0f} thousand tokens/s",
        end="",
        flush=True,
    )


def _speed(options: argparse.Namespace) -> None:
    """Two turns of every arm, the second ones in reverse order, and the faster of both."""
    device = torch.device("cpu" if options.tiny else "cuda")
    if not (options.tiny or options.tokens_per_step):
        options.tokens_per_step = SPEED_SEQUENCES * MAX_LENGTH
    trainings = {arm: Training(_settings(options, arm), None, device) for arm in options.arms}
    rates = dict.fromkeys(trainings, 0.0)
    for arm in [*trainings, *reversed(trainings)]:
        rates[arm] = max(rates[arm], trainings[arm].speed(options.repeat))
    file = ResultFile(options.output, describe_run(), KEY)
    for arm, rate in rates.items():
        length = max(length for length, _ in trainings[arm].batches.curriculum)
        print(f"{arm}: {rate / 1e3:,.1f} thousand tokens/s in sequences of {length:,}")
        step = {"length": length, "tokens_per_step": trainings[arm].settings.tokens_per_step}
        file.add({"arm": arm, "task": "speed", **step, "tokens_per_second": round(rate, 1)})
    print(f"saved {options.output}")


def _evaluate(options: argparse.Namespace) -> None:
    suite = TINY if options.tiny else Suite()
    if options.lengths:
        suite = replace(suite, lengths=tuple(options.lengths))
    if max(suite.lengths) > SERVED_LENGTH - 1:
        raise ValueError(f"--lengths: {max(suite.lengths)}, expected at most {SERVED_LENGTH - 1} tokens")
    arms = options.arms or [arm for arm in ARMS if (options.models / arm / "config.json").exists()]
    if not arms:
        raise ValueError(f"--models: {options.models}, expected a folder with trained models")
    trained = {arm: load_facts(options.models / arm, arm) for arm in arms}
    text = texts.load(held_out=True, limit=60 if options.tiny else None)
    file = ResultFile(options.output, describe_run(), KEY)
    for arm, facts in trained.items():
        known = {name: facts[name] for name in ("parameters", "train_tokens", "train_seconds")}
        start = time.monotonic()

        def progress(what: str, arm: str = arm, start: float = start) -> None:
            print(f"\r{arm}, {time.monotonic() - start:.0f} s: {what:60}", end="", flush=True)

        with _engine(options, arm, suite) as llm:
            for record in evaluate(llm, text, suite, progress):
                if record["task"] == "loss":
                    record |= {**known, "losses": facts["losses"]}
                file.add({"arm": arm, **record})
        print()
    print(f"saved {options.output}")


@contextmanager
def _engine(options: argparse.Namespace, arm: str, suite: Suite) -> Iterator[LLM]:
    """The engine that serves a model, in this process; its state is gone afterwards."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    is_gpu, memory = torch.cuda.is_available(), options.gpu_memory_utilization
    llm = LLM(
        str(options.models / arm),
        skip_tokenizer_init=True,
        dtype="bfloat16" if is_gpu else "float32",
        max_model_len=max(*suite.lengths, suite.loss_length) + 1,
        enforce_eager=options.enforce_eager or options.tiny or not is_gpu,
        # Enough, and nothing is measured: other processes may take and free memory of the GPU meanwhile.
        kv_cache_memory_bytes=KV_CACHE_BYTES if is_gpu and not options.tiny else 1 << 28,
        **({} if memory is None else {"gpu_memory_utilization": memory}),
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def _make_vocabulary(options: argparse.Namespace) -> None:
    vocabulary.train(texts.read(held_out=False)).save(str(options.output), pretty=False)
    print(f"saved {options.output}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an arm, or go on where a training stopped")
    train.add_argument("--arm", choices=list(ARMS), required=True)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--steps", type=positive_int)
    train.add_argument("--tokens-per-step", type=positive_int, metavar="TOKENS")
    train.add_argument("--learning-rate", type=float, metavar="RATE")
    train.add_argument("--models", type=Path, default=MODELS, help="folder, default: %(default)s")
    evaluate = commands.add_parser("evaluate", help="serve trained arms and ask them for pass keys")
    evaluate.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all that are trained")
    evaluate.add_argument("--lengths", nargs="+", type=positive_int, metavar="TOKENS")
    evaluate.add_argument("--gpu-memory-utilization", type=fraction, metavar="SHARE", help="default: vLLM's")
    evaluate.add_argument("--enforce-eager", action="store_true", help="no compilation, no graphs")
    evaluate.add_argument("--models", type=Path, default=MODELS, help="folder, default: %(default)s")
    speed = commands.add_parser("speed", help="time training steps at the greatest length")
    speed.add_argument("--arms", nargs="+", choices=list(ARMS), default=["dense", "s2"])
    speed.add_argument(
        "--repeat", type=positive_int, default=30, metavar="STEPS", help="default: %(default)s"
    )
    speed.add_argument(
        "--tokens-per-step", type=positive_int, metavar="TOKENS", help=f"default: {SPEED_SEQUENCES} sequences"
    )
    for command in (evaluate, speed):
        command.add_argument("--output", type=Path, default=OUTPUT)
    for command in (train, evaluate, speed):
        command.add_argument(
            "--tiny", action="store_true", help="the same steps with no model to speak of, on a CPU"
        )
    tokenizer = commands.add_parser("vocabulary", help="make the vocabulary anew; models have to be as well")
    tokenizer.add_argument("--output", type=Path, default=FILE)
    tokenizer.set_defaults(tiny=False)
    options = parser.parse_args(arguments)
    if options.command in ("evaluate", "speed") and options.tiny and options.output == OUTPUT:
        parser.error("--output: missing, expected a file with --tiny: its figures mean nothing")
    return options


if __name__ == "__main__":
    sys.exit(main())

"""Makes a small S2 checkpoint, serves a batch of prompts from it and prints what that took."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from s2_vllm.demo.checkpoint import make_checkpoint


def main() -> None:
    """Run the demo; see --help."""
    options = _parse_arguments()
    if options.checkpoint_only is not None:
        make_checkpoint(options.checkpoint_only)
        print(f"Wrote a checkpoint with random weights to {options.checkpoint_only}")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    _run(options.output)


def _run(output: Path) -> None:
    from s2_vllm.demo.report import report_batch, report_plan
    from s2_vllm.demo.serving import DOCUMENT_TOKENS, make_batches, serve, start_engine, warm_up
    from s2_vllm.plan import plan_of

    checkpoint, picture = output / "checkpoint", output / "pattern.png"
    make_checkpoint(checkpoint)
    print(f"Wrote a checkpoint to {checkpoint}. Its weights are random: the text it generates means nothing.")
    print("Starting vLLM ...", flush=True)
    llm = start_engine(checkpoint)
    plan = plan_of(llm.llm_engine.vllm_config)
    assert plan is not None, "the checkpoint's architecture requires a pattern"
    warm_up(llm)
    mixed, more_questions = make_batches(llm)
    print(report_batch("Prompts of several lengths:", serve(llm, mixed), plan), flush=True)
    print(report_batch("The long document again, other questions:", serve(llm, more_questions), plan))
    llm.llm_engine.engine_core.shutdown()
    print(report_plan(plan, DOCUMENT_TOKENS))
    plan.patterns[0].draw(picture, num_blocks=32)
    print(f"Which blocks each head attends to: {picture}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m s2_vllm.demo", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where the checkpoint and the picture of the pattern go (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint-only", type=Path, metavar="DIR", help="make the checkpoint in DIR and stop there"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

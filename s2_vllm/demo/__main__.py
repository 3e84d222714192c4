"""Hides pass keys in a long document, serves a small trained model and asks it for them."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from s2_vllm.demo.checkpoint import TRAINED, make_checkpoint


def main() -> None:
    """Run the demo; see --help."""
    options = _parse_arguments()
    if options.checkpoint_only is not None:
        _make(options.checkpoint_only, options.random)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.random:
        from s2_vllm.demo.untrained import run
    else:
        from s2_vllm.demo.trained import run
    run(options.output)


def _make(folder: Path, is_random: bool) -> None:
    if is_random:
        make_checkpoint(folder)
    else:
        shutil.copytree(TRAINED, folder, dirs_exist_ok=True)
    print(f"Wrote a checkpoint {'with random weights ' if is_random else ''}to {folder}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m s2_vllm.demo", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where pictures, and a checkpoint that is made, go (default: %(default)s)",
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="a model of another geometry with random weights, and a batch of prompts of several lengths",
    )
    parser.add_argument(
        "--checkpoint-only", type=Path, metavar="DIR", help="write the checkpoint to DIR and stop there"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""A soak of the real server: `python -m tests.soak --help`.

A tiny model is served in float32, in which an answer does not depend on the batch that it is made in, from a
pool of pages too small for its requests. Clients stream, abort, disconnect, share prefixes and exceed limits;
then the engine's process is killed under them; then a new server answers every request alone. All traffic
goes to 127.0.0.1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.soak.phases import make_checkpoint, run

if TYPE_CHECKING:
    from tests.soak.clients import Tally

HAS_TO_HAPPEN = (
    "completed",
    "of these, streamed",
    "follow-ups",
    "aborted in mid-stream",
    "disconnected",
    "broken off",
    "refused by name",
    "preemptions",
    "tokens from the prefix cache",
)
"""Events without which a soak has tested too little."""


def report(tally: Tally) -> int:
    """Print what has happened, and return the exit status: 1 where the server is at fault."""
    for event, times in tally.events.items():
        print(f"{times:>10} {event}")
    never = [event for event in HAS_TO_HAPPEN if not tally.events[event]]
    faults = tally.faults or [f"{event}: none, too little to have tested it" for event in never]
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.soak",
        description="Serve a tiny model under hostile traffic, and compare every answer with the one alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of traffic; the rest takes some more")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and of who asks for what")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes: {options.minutes}, expected a positive number")

    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="s2-soak-"))
    make_checkpoint(folder)
    status = report(run(folder, options.minutes, options.seed))
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    if status:
        print(f"the checkpoint and the server's log are in {folder}")
    else:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())

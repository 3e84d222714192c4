"""`make mutants`: do the tests fail when the code is wrong?

Every mutant of the modules below meets the module's own tests; one that passes them survives. Fails when
fewer than 90% are killed, or when one survives for which survivors.md has no reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.mutation import runner
from tests.mutation.mutants import mutants

ROOT = Path(__file__).parent.parent.parent
LIST = Path(__file__).parent / "survivors.md"
KILLED_AT_LEAST = 0.9

TESTS = {
    "s2_kernels.pattern": "tests/test_pattern.py",
    "s2_kernels.layout": "tests/test_layout.py",
    "s2_kernels.masks": "tests/test_masks.py",
    "s2_kernels.config": "tests/test_config.py",
    "s2_vllm.plan": "tests/test_plan.py",
    "s2_vllm.planning": "tests/test_plan.py",
    "s2_vllm.packing": "tests/test_packing.py",
    "s2_vllm.specs": "tests/test_specs.py",
    "s2_vllm.refusals": "tests/test_refusals.py",
    "s2_vllm.startup": "tests/test_startup.py",
    "s2_vllm.cli": "tests/test_cli.py tests/test_heads.py",
    "s2_vllm.config_refusals": "tests/test_config_refusals.py",
    "s2_vllm.hf_config": "tests/test_hf_config.py",
}
"""The modules that are mutated, and the test files that must kill their mutants, with spaces between."""


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    arguments = parser.parse_args()
    modules = arguments.modules or list(TESTS)
    listed = _listed(LIST.read_text())
    made, survived = 0, []
    for module in modules:
        mutated, left = _run(module, arguments.processes, listed)
        made += mutated
        survived += left
    for mutant in sorted(listed.difference(survived)):
        if mutant.split()[0] in modules:
            print(f"\nListed in {LIST.name}, but no survivor:\n{mutant}")
    killed, unlisted = made - len(survived), [mutant for mutant in survived if mutant not in listed]
    print(
        f"\n{killed} of {made} mutants killed ({killed / made:.1%}); {len(unlisted)} survive without a reason"
    )
    return int(killed < KILLED_AT_LEAST * made or bool(unlisted))


def _run(module: str, processes: int, listed: set[str]) -> tuple[int, list[str]]:
    """The number of a module's mutants, and those that survive; prints those that are not `listed`."""
    start = time.monotonic()
    file = _file(module)
    tests = TESTS[module].split()
    runner.preload(tests)
    limit = 10 + round(5 * runner.processor_seconds(tests))
    made = mutants(module, file.read_text())
    left = []
    for mutant in runner.survivors(made, file, tests, limit, processes):
        left.append(str(mutant))
        if left[-1] not in listed:
            print(f"Survives:\n{mutant}\n", flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{module}: {len(made) - len(left)} of {len(made)} killed in {minutes:.1f} minutes", flush=True)
    return len(made), left


def _file(module: str) -> Path:
    path = Path(*module.split(".")).with_suffix(".py")
    return next(folder / path for folder in (ROOT, ROOT / "kernels") if (folder / path).exists())


def _listed(text: str) -> set[str]:
    """The mutants in the fenced parts of a Markdown text, each as it is printed, with blank lines between."""
    blocks = "\n\n".join(text.split("```")[1::2]).split("\n\n")
    return {block.strip().removeprefix("diff\n") for block in blocks} - {""}


if __name__ == "__main__":
    sys.exit(main())

"""Text that every installation has: the sources of Python, of what this project needs, and its own prose."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import numpy as np

from benchmarks.results_file import REPOSITORY
from s2_vllm.demo.passkeys import Tokens
from s2_vllm.demo.vocabulary import END_OF_TEXT
from s2_vllm.demo.vocabulary import load as load_tokenizer

HELD_OUT = 20
"""One file in so many is held out."""
PACKAGES = ("numpy", "torch", "transformers")
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "lib2to3"})


def files() -> list[Path]:
    """All files of text, those of the standard library first, in an order that is the same everywhere."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    specs = [find_spec(package) for package in PACKAGES]
    folders += [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    found: list[Path] = []
    for folder in folders:
        paths = {path: path.relative_to(folder) for path in folder.rglob("*.py")}
        found += sorted(
            (path for path, inner in paths.items() if not _LEFT_OUT & set(inner.parts)),
            key=lambda path: paths[path].as_posix(),
        )
    return found + [path for path in (REPOSITORY / "README.md",) if path.exists()]


def is_held_out(path: Path) -> bool:
    """By its name alone: the same files on every machine."""
    return crc32(path.name.encode()) % HELD_OUT == 0


def read(held_out: bool, limit: int | None = None) -> Iterator[str]:
    """The texts of one part, of the first `limit` files at most."""
    for path in files()[:limit]:
        if is_held_out(path) == held_out:
            yield path.read_text(errors="replace")


@cache
def load(held_out: bool, limit: int | None = None) -> Tokens:
    """The texts of one part as tokens, one file after the other; made once, since it takes a while."""
    encodings = load_tokenizer().encode_batch([text + END_OF_TEXT for text in read(held_out, limit)])
    tokens = np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encodings])
    tokens.flags.writeable = False
    return tokens

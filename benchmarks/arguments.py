"""Types of command-line arguments."""

from __future__ import annotations

import argparse
import math


def positive_float(text: str) -> float:
    """`text` as a positive number.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number")
    return value


def positive_int(text: str) -> int:
    """`text` as a positive integer.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive integer")
    return int(text)

"""Settings that must be in place before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read when Triton is imported; its interpreter runs the kernels on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

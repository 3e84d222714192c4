"""S2-Attention kernels: the pattern, its reference, and paged kernels in Triton and PyTorch."""

from s2_kernels.layout import TierLayout
from s2_kernels.pattern import S2Pattern

__all__ = ["S2Pattern", "TierLayout"]

"""A small model in some processes, of which each has a part of the batch: what a test of them runs.

    python -m tests.training RENDEZVOUS_FILE RANK PROCESSES

A process prints nothing; it fails when a gradient is not the mean of what the parts give by themselves.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from s2_kernels.dkernel import LocalStrideSparseAttention

HEADS, HEAD_SIZE, WIDTH = 4, 8, 32


class Layer(torch.nn.Module):
    """Attention with residues per head between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 2 * HEADS * HEAD_SIZE)
        self.out = torch.nn.Linear(HEADS * HEAD_SIZE, WIDTH)
        self.attn = LocalStrideSparseAttention(HEADS, 64, 16, 1, 2, num_kv_heads=HEADS // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, HEAD_SIZE))
        q, k, v = qkv.split([HEADS, HEADS // 2, HEADS // 2], dim=-2)
        return x + self.out(self.attn(q, k, v).flatten(-2))


def build_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(Layer(), Layer())


def gradients(model: torch.nn.Module, part: torch.Tensor) -> list[torch.Tensor]:
    model(part).square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def main(rendezvous: str, rank: int, processes: int) -> None:
    has_gpus = torch.cuda.device_count() >= processes
    torch.set_default_device(f"cuda:{rank}" if has_gpus else "cpu")
    if has_gpus:
        torch.cuda.set_device(rank)
    backend, init_method = "nccl" if has_gpus else "gloo", f"file://{rendezvous}"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=processes)
    torch.manual_seed(1)
    parts = torch.randn(processes, 2, 40, WIDTH)
    of_parts = [gradients(build_model(), part) for part in parts]
    expected = [torch.stack(of_parameter).mean(dim=0) for of_parameter in zip(*of_parts, strict=True)]
    assert all(gradient.any() for gradient in expected)

    # Left to itself, it takes a GPU wherever there is one.
    mesh = init_device_mesh("cuda" if has_gpus else "cpu", (processes,))
    sharded = build_model()
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (DistributedDataParallel(build_model()), sharded):
        for actual, gradient in zip(gradients(model, parts[rank]), expected, strict=True):
            torch.testing.assert_close(actual, gradient)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

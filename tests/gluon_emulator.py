"""Runs the Gluon kernels of `s2_kernels.hopper` on the CPU: their own source, on torch tensors.

Triton's interpreter does not know Gluon. This knows as much of it as those kernels use: the partitions of a
program are threads, mbarriers block them, TMA loads and matrix products happen at once. So it shows wrong
arithmetic, wrong addresses, wrong masks, and barriers that deadlock or let a thread run ahead of another. It
cannot show what the hardware or the compiler would make of an asynchronous instruction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from s2_kernels.hopper import consumer, key_gradients, prefill, producer, query_gradients, schedule

PATIENCE = 20.0
"""Seconds after which a barrier that nobody completes is a deadlock."""


class Value(torch.Tensor):
    """A tensor in registers, or a scalar: layouts are of no consequence here."""

    # In the place of torch's method of that name: kernels ask it for the layout.
    type = SimpleNamespace(layout=None)


def value(x: Any, dtype: torch.dtype | None = None) -> Value:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


@dataclass
class Pointer:
    """Elements of a flat tensor."""

    memory: torch.Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offset[index])


class SharedMemory:
    """Shared memory as pieces of 64 rows by 64 columns, however it is seen.

    `pieces` are [pieces, 64, 64]; a tile [rows, columns] is, as in the swizzled layout, its panels of 64
    columns one after the other, each of them rows / 64 pieces.
    """

    def __init__(self, pieces: torch.Tensor, shape: Sequence[int]) -> None:
        self.pieces, self.shape, self.dtype = pieces, list(shape), pieces.dtype

    def index(self, n: Any) -> SharedMemory:
        count = len(self.pieces) // self.shape[0]
        return SharedMemory(self.pieces[int(n) * count : (int(n) + 1) * count], self.shape[1:])

    def tile(self) -> torch.Tensor:
        rows, columns = self.shape
        panels = self.pieces.view(columns // 64, rows // 64, 64, 64)
        return panels.permute(1, 2, 0, 3).reshape(rows, columns)

    def slice(self, start: int, length: int, dim: int) -> torch.Tensor:
        return self.tile().narrow(dim, start, length)

    def permute(self, order: Sequence[int]) -> torch.Tensor:
        return self.tile().permute(*order)

    def load(self, layout: Any) -> Value:
        return self.tile().clone().as_subclass(Value)

    def store(self, values: torch.Tensor) -> None:
        self.write(values.as_subclass(torch.Tensor))

    def write(self, values: torch.Tensor) -> None:
        rows, columns = self.shape
        self.pieces.copy_(
            values.view(rows // 64, 64, columns // 64, 64).permute(2, 0, 1, 3).reshape(-1, 64, 64)
        )


@dataclass
class Barrier:
    """An mbarrier: a phase ends with the last arrival and the last byte."""

    changed: threading.Condition
    count: int = 0
    pending: int = 0
    bytes_expected: int = 0
    phase: int = 0

    def update(self, arrivals: int, new_bytes: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes_expected += new_bytes
            assert self.pending >= 0, "more arrivals in a phase than the barrier counts"
            if self.pending == 0 and self.bytes_expected == 0:
                self.phase ^= 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != phase, PATIENCE), "deadlock"


class Barriers(list[Barrier]):
    def index(self, n: Any) -> Barrier:
        return self[int(n)]


def _barrier(barrier: Barrier | Barriers) -> Barrier:
    return barrier[0] if isinstance(barrier, Barriers) else barrier


def _init(barrier: Barrier | Barriers, count: int) -> None:
    _barrier(barrier).count = _barrier(barrier).pending = count


@dataclass
class Language:
    """`triton.experimental.gluon.language` for one program."""

    program: int
    programs: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    int32, int64, float32 = torch.int32, torch.int64, torch.float32

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_, **__: None
        raise AttributeError(name)

    constexpr = staticmethod(lambda x: x)
    static_range = staticmethod(range)

    def program_id(self, axis: int) -> int:
        return self.program

    def num_programs(self, axis: int) -> int:
        return self.programs

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if dtype == torch.int64:
            return Barriers(Barrier(self.changed) for _ in range(shape[0]))
        elements = torch.Size(shape).numel()
        return SharedMemory(torch.full((elements // 4096, 64, 64), torch.nan, dtype=dtype), shape)

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
        offset, mask = torch.broadcast_tensors(value(pointer.offset), value(mask))
        loaded = pointer.memory[torch.where(mask, offset, 0)]
        return torch.where(mask, loaded, value(other, loaded.dtype)).as_subclass(Value)

    @staticmethod
    def store(pointer: Pointer, values: torch.Tensor, mask: torch.Tensor) -> None:
        offset, mask, values = torch.broadcast_tensors(pointer.offset, mask, values)
        pointer.memory[offset[mask]] = values[mask].as_subclass(torch.Tensor)

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        if isinstance(yes, Pointer):
            return yes if condition else no
        return torch.where(value(condition), value(yes), value(no))

    @staticmethod
    def maximum(a: Any, b: Any) -> Value:
        return torch.maximum(value(a), value(b))

    @staticmethod
    def minimum(a: Any, b: Any) -> Value:
        return torch.minimum(value(a), value(b))

    @staticmethod
    def arange(start: int, end: int, layout: Any) -> Value:
        return value(torch.arange(start, end))

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, layout: Any) -> Value:
        return value(torch.zeros(*shape, dtype=dtype))

    @staticmethod
    def full(shape: Sequence[int], fill: float, dtype: torch.dtype, layout: Any) -> Value:
        return value(torch.full(tuple(shape), fill, dtype=dtype))

    zeros_like = staticmethod(torch.zeros_like)
    exp2 = staticmethod(torch.exp2)
    log2 = staticmethod(torch.log2)
    sum = staticmethod(torch.sum)
    max = staticmethod(torch.amax)

    @staticmethod
    def convert_layout(x: Value, layout: Any) -> Value:
        return x

    @staticmethod
    def warp_specialize(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        """Run the partitions at the same time; raise what one of them raises."""
        failures: list[BaseException] = []

        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


@dataclass
class Descriptor:
    """A TMA descriptor: rows of a tensor's memory, loaded in boxes, zeros outside."""

    rows: torch.Tensor
    box: list[int]
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def read(self, row: int, column: int) -> torch.Tensor:
        box = torch.zeros(self.box, dtype=self.dtype)
        before = min(max(0, -row), self.box[0])
        part = self.rows[row + before : max(0, row + self.box[0]), column : column + self.box[1]]
        box[before : before + part.shape[0], : part.shape[1]] = part
        return box


def _tma_load(
    descriptor: Descriptor, at: Sequence[Any], barrier: Any, memory: SharedMemory, pred: Any = True
) -> None:
    if pred:
        box = descriptor.read(*(int(x) for x in at))
        memory.write(box)
        _barrier(barrier).update(0, -box.numel() * box.element_size())


def _warpgroup_mma(a: Any, b: Any, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
    left, right = (x.tile() if isinstance(x, SharedMemory) else x.as_subclass(torch.Tensor) for x in (a, b))
    product = value(left.float() @ right.float())
    return acc + product if use_acc else product


def _warpgroup_mma_wait(outstanding: int, deps: Sequence[Value]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: None,
    init=_init,
    expect=lambda barrier, count: _barrier(barrier).update(1, count),
    arrive=lambda barrier, count=1: _barrier(barrier).update(count, 0),
    wait=lambda barrier, phase: _barrier(barrier).wait(int(phase)),
)


class EmulatedKernel:
    """In the place of a compiled kernel: `kernel[grid](...)` runs its programs one after the other.

    Args:
        kernel: a compiled function.
        modules: where it and what it calls are defined.
    """

    def __init__(self, kernel: Any, modules: Sequence[ModuleType]) -> None:
        self.name = kernel.fn.__name__
        self.arg_names = kernel.arg_names
        self.is_constant = [parameter.is_constexpr for parameter in kernel.params]
        things = [(name, thing) for module in modules for name, thing in vars(module).items()]
        self.functions = {name: thing.fn for name, thing in things if hasattr(thing, "fn")}
        self.constants = {name: thing.value for name, thing in things if type(thing).__name__ == "constexpr"}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            arguments += tuple(constants[name] for name in self.arg_names[len(arguments) :])
            for program in range(grid[0]):
                given = zip(arguments, self.is_constant, strict=True)
                emulated = [x if is_constant else _argument(x) for x, is_constant in given]
                self.function(Language(program, grid[0]))(*emulated)

        return launch

    def run(self, *arguments: Any, grid: tuple[int], warmup: bool, num_warps: int) -> None:
        """As Triton's interpreter: there is nothing to warm up."""
        assert warmup

    def function(self, language: Any) -> Callable[..., Any]:
        """The kernel as a Python function, in a world where its names mean what this module says."""
        world: dict[str, Any] = {**self.constants}
        for name, function in self.functions.items():
            world[name] = FunctionType(function.__code__, world, name, function.__defaults__)
        world |= {
            "range": lambda *limits: map(value, range(*map(int, limits))),
            "gl": language,
            "mbarrier": MBARRIER,
            "warpgroup_mma": _warpgroup_mma,
            "warpgroup_mma_wait": _warpgroup_mma_wait,
            "tma_load": _tma_load,
            "fence_async_shared": lambda: None,
            "reinterpret": lambda memory, dtype, shape, layout: SharedMemory(memory.pieces, shape),
        }
        return world[self.name]


def _argument(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return Descriptor(x.base.as_strided(x.shape, x.strides), x.block_shape)
    if isinstance(x, torch.Tensor):
        span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        return Pointer(x.as_strided((span,), (1,)))
    return value(x) if isinstance(x, int) else x


def emulated_prefill() -> EmulatedKernel:
    """The Hopper prefill kernel."""
    return EmulatedKernel(prefill.prefill_fwd_kernel, (schedule, producer, consumer, prefill))


def emulated_gradients() -> tuple[EmulatedKernel, EmulatedKernel]:
    """The Hopper kernels for the gradients of keys and of queries."""
    modules = (schedule, producer, consumer, key_gradients, query_gradients)
    return (
        EmulatedKernel(key_gradients.key_gradients_bwd_kernel, modules),
        EmulatedKernel(query_gradients.query_gradients_bwd_kernel, modules),
    )

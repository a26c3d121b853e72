"""An interpreter for the PTX that NVRTC compiles from csrc/cuda. It uses NumPy arrays over the 32 lanes of a warp.

Between two barriers, the warps of a block run one after another in random order. The blocks of a grid run in random
order too. Shared memory is filled with NaN when a block begins. Fault is raised for everything that makes a GPU trap or
whose result is undefined:
- an access outside the tensors, or one that is not aligned;
- a barrier, or an instruction for whole warps, that only some of the lanes reach;
- a race: two threads access the same shared memory without a barrier between them, and at least one of them writes.
An unknown instruction raises NotImplementedError with its text.

The interpreter can't reveal errors in machine code, or errors that occur only if blocks run at the same time. Its fused
multiply-add rounds twice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ptx_instructions import (
    ALL,
    HANDLERS,
    LANES,
    TYPES,
    Fault,
    Instruction,
    Mask,
    Source,
    Step,
    Values,
    split,
)
from ptx_memory import SHARED, Memory, Parameters, Region, Shared
from torch import Tensor


def run(
    ptx: str,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Any],
    tensors: Iterable[Tensor],
    seed: int = 0,
) -> None:
    """Run the kernel in `ptx`, which must be its only one, over a grid of blocks. Raises Fault.

    arguments  ctypes numbers or structs, one for each parameter of the kernel
    tensors    CPU tensors; the kernel may access their storages and no other global memory
    seed       determines the random order of warps and blocks
    """
    kernel, chance = Kernel(ptx), random.Random(seed)
    parameters, memory = kernel.parameters.filled(arguments), Memory(tensors)
    x, y, z = grid
    places = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
    chance.shuffle(places)
    with np.errstate(all="ignore"):
        for place in places:
            Block(kernel, parameters, grid, place, threads, Shared(shared_bytes), memory).run(chance)


@dataclass(frozen=True)
class Decoded:
    """A decoded instruction. Its guard is a predicate register and the value of it with which the instruction runs."""

    instruction: Instruction
    guard: tuple[int, bool] | None
    head: str
    target: int  # index of the instruction that a branch jumps to; otherwise -1
    step: Step | None  # executes the instruction; None for a branch, a barrier or the kernel's end


class Kernel:
    """A decoded kernel.

    parameters  the kernel's parameters and where each begins
    registers   the type of each register, by the register's number
    code        the instructions, in order
    """

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
        entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\{(.*)\}", ptx, re.DOTALL)
        if entry is None:
            raise ValueError("this PTX has no kernel")
        self.parameters = Parameters(entry[1])
        self.shared = set(re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", ptx))
        self.registers: list[np.dtype[Any]] = []
        self.kinds = {
            prefix: TYPES[kind] for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>;", entry[3])
        }
        self.numbers: dict[str, int] = {}
        statements, self.labels = _statements(entry[3])
        self.code = [self._decoded(each) for each in statements]

    def number(self, name: str) -> int:
        """The number of the register with this name."""
        if name not in self.numbers:
            self.numbers[name] = len(self.registers)
            self.registers.append(self.kinds[name.rstrip("0123456789")])
        return self.numbers[name]

    def is_register(self, text: str) -> bool:
        """Whether an operand is a register. Special registers such as `%tid.x` don't count."""
        return re.fullmatch(r"%[a-z]+\d+", text) is not None

    def source(self, text: str, kind: np.dtype[Any]) -> Source:
        """Return a function that reads an operand as a type."""
        if self.is_register(text):
            number = self.number(text)
            declared = self.registers[number]
            if declared == kind:
                return lambda warp: warp.registers[number]
            if declared.itemsize == kind.itemsize and np.bool_ not in (declared, kind):
                return lambda warp: warp.registers[number].view(kind)
            narrow = np.dtype(f"u{kind.itemsize}")
            if declared.itemsize > kind.itemsize and declared != np.bool_:
                return lambda warp: warp.registers[number].astype(narrow).view(kind)
            raise NotImplementedError(f"{text} is declared as {declared} and read as {kind}")
        if text.startswith("%"):
            return lambda warp: warp.special[text].astype(kind)
        if text in self.shared:
            value: Any = SHARED
        elif text in self.parameters.begins:
            value = self.parameters.begins[text]
        else:
            value = _number(text, kind)
        constant = np.full(32, value).astype(kind)
        return lambda warp: constant

    def sink(self, text: str) -> Callable[[Warp, Values, Mask], None]:
        """Return a function that writes an operand in the active lanes."""
        if text == "_":
            return lambda warp, value, active: None
        number = self.number(text)
        declared = self.registers[number]

        def write(warp: Warp, value: Values, active: Mask) -> None:
            if value.dtype.itemsize == declared.itemsize:
                value = value.view(declared)
            elif value.dtype.kind in "ui" and value.dtype.itemsize < declared.itemsize:
                value = value.astype(declared)
            else:
                raise NotImplementedError(f"{text} is declared as {declared} and written as {value.dtype}")
            warp.registers[number] = value if active is ALL else np.where(active, value, warp.registers[number])

        return write

    def address(self, text: str) -> Source:
        """Return a function that computes the address in an operand's brackets."""
        parts = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if parts is None:
            raise NotImplementedError(f"the address {text}")
        base = self.number(parts[1]) if self.is_register(parts[1]) else None
        kind = np.dtype(np.uint64) if base is None else self.registers[base]
        read, further = self.source(parts[1], kind), int(parts[2] or 0)
        return lambda warp: read(warp).astype(np.int64) + further

    def _decoded(self, statement: str) -> Decoded:
        guarded = re.fullmatch(r"@(!?)(%\w+)\s+(.*)", statement)
        guard = None if guarded is None else (self.number(guarded[2]), guarded[1] == "")
        text = statement if guarded is None else guarded[3]
        opcode, _, rest = text.partition(" ")
        instruction = Instruction(statement, tuple(opcode.split(".")), tuple(split(rest)))
        head = instruction.opcode[0]
        if head in ("bra", "ret", "exit"):
            return Decoded(
                instruction, guard, head, self.labels[instruction.operands[0]] if head == "bra" else -1, None
            )
        if head in ("bar", "barrier"):
            if "sync" not in instruction.opcode or instruction.operands != ("0",):
                raise instruction.unknown()
            return Decoded(instruction, guard, "bar", -1, None)
        if head not in HANDLERS:
            raise instruction.unknown()
        return Decoded(instruction, guard, head, -1, HANDLERS[head](self, instruction))


def _statements(body: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions of a body, in order, and the index of the instruction after each label.

    The braces of scopes are left out.
    """
    statements: list[str] = []
    labels: dict[str, int] = {}
    for piece in body.split(";"):
        text = " ".join(piece.split())
        while opened := re.match(r"[{}]\s*|(\$?\w+):\s*", text):
            if opened[1] is not None:
                labels[opened[1]] = len(statements)
            text = text[opened.end() :]
        if text and not text.startswith("."):
            statements.append(text)
    return statements, labels


def _number(text: str, kind: np.dtype[Any]) -> Any:
    """Parse a constant; after 0f or 0d, it is the bits of a floating-point number."""
    if text[:2] in ("0f", "0d"):
        bits = np.dtype("u4" if text[:2] == "0f" else "u8")
        pattern = np.array(int(text[2:], 16), bits)
        return pattern.view(f"f{bits.itemsize}") if kind.kind == "f" else pattern
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text) is None:
        raise NotImplementedError(f"the operand {text}")
    value = int(text.rstrip("U"), 0)
    return value if kind.kind == "f" else np.array(value % 2**64, np.uint64)


class Block:
    """A block of threads, with its warps and its shared memory."""

    def __init__(
        self,
        kernel: Kernel,
        parameters: Region,
        grid: tuple[int, int, int],
        place: tuple[int, int, int],
        threads: int,
        shared: Shared,
        memory: Memory,
    ) -> None:
        self.kernel, self.parameters, self.shared, self.memory = kernel, parameters, shared, memory
        special = {f"%ctaid.{axis}": value for axis, value in zip("xyz", place, strict=True)}
        special |= {f"%nctaid.{axis}": value for axis, value in zip("xyz", grid, strict=True)}
        special |= {"%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}
        self.special = {name: np.full(32, value) for name, value in special.items()}
        self.warps = [Warp(self, number) for number in range(threads // 32)]

    def run(self, chance: random.Random) -> None:
        """Run the block to its end. Between two barriers, the warps run in random order."""
        going = True
        while going:
            chance.shuffle(self.warps)
            waits = [warp.run() for warp in self.warps]
            going = all(waits)
            if any(waits) and not going:
                raise Fault("some warps have ended while others wait at a barrier")
            self.shared.barrier()


class Warp:
    """32 threads (lanes), with their registers and the instruction that each has reached.

    The lanes that are furthest behind run first, so that lanes that have diverged converge again.
    """

    def __init__(self, block: Block, number: int) -> None:
        self.block, self.threads = block, 32 * number + LANES
        self.special = block.special | {"%tid.x": self.threads}
        self.registers: list[Values] = [  # all bits are set, which is NaN as a float
            np.full(32, 0xFF, np.uint8).repeat(kind.itemsize).view(kind) if kind != np.bool_ else ~ALL
            for kind in block.kernel.registers
        ]
        self.paths: dict[int, Mask] = {0: ALL}

    def run(self) -> bool:
        """Run to the next barrier or to the end; returns whether a barrier was reached."""
        code = self.block.kernel.code
        while self.paths:
            at = min(self.paths)
            if at == len(code):
                return False
            active, decoded = self.paths.pop(at), code[at]
            chosen = active
            if decoded.guard is not None:
                number, wanted = decoded.guard
                chosen = active & (self.registers[number] == wanted)
            if decoded.step is not None:
                if chosen is active or chosen.any():
                    self._take(decoded, ALL if chosen.all() else chosen)
                self._go(at + 1, active)
            elif decoded.head == "bar":
                if chosen is not ALL:
                    raise Fault(f"only some lanes of a warp wait at a barrier: {decoded.instruction.text}")
                self.paths = {at + 1: ALL}
                return True
            else:
                if decoded.head == "bra":
                    self._go(decoded.target, chosen)
                self._go(at + 1, active & ~chosen)
        return False

    def _take(self, decoded: Decoded, active: Mask) -> None:
        assert decoded.step is not None
        try:
            decoded.step(self, active)
        except Fault as fault:
            raise type(fault)(f"{fault}: {decoded.instruction.text}") from None

    def _go(self, at: int, lanes: Mask) -> None:
        """Move lanes to an instruction, and merge them with lanes that are already there."""
        if at in self.paths:
            lanes = lanes | self.paths[at]
        if lanes is ALL or lanes.all():
            self.paths[at] = ALL
        elif lanes.any():
            self.paths[at] = lanes

    def read(self, at: Values, size: int, active: Mask, threads: Values) -> Values:
        """Read `size` bytes at the address of each active lane; returns [32, ...], 0 in the other lanes."""
        addresses = self._addresses(at, size, active)
        if self._is_shared(addresses):
            content = self.block.shared.read(addresses, size, threads[active])
        else:
            content = self.block.memory.read(addresses, size)
        return _spread(content, active)

    def read_parameters(self, at: Values, size: int, active: Mask) -> Values:
        """Read like `read`, but from the kernel's parameters. Raises Fault for an address outside them."""
        addresses = self._addresses(at, size, active)
        if (addresses < 0).any() or (addresses + size > self.block.kernel.parameters.end).any():
            raise Fault("outside the parameters")
        return _spread(self.block.parameters.read(addresses, size), active)

    def write(self, at: Values, content: Values, active: Mask) -> None:
        """Write the content of each active lane to its address."""
        addresses = self._addresses(at, content.dtype.itemsize, active)
        if self._is_shared(addresses):
            self.block.shared.write(addresses, content[active], self.threads[active])
        else:
            self.block.memory.write(addresses, content[active])

    def _addresses(self, at: Values, size: int, active: Mask) -> Values:
        """The addresses of the active lanes. Raises Fault if one is not aligned."""
        addresses = at[active]
        if (addresses % size).any():
            raise Fault(f"an address is not a multiple of {size}")
        return addresses

    def _is_shared(self, at: Values) -> bool:
        """Whether addresses are in shared memory. Only the first is checked, because all are in the same memory."""
        return bool(at[0] < self.block.memory.begins[0]) if len(self.block.memory.begins) else True


def _spread(content: Values, active: Mask) -> Values:
    """Expand the active lanes' content to an array over all 32 lanes, with 0 in the other lanes."""
    if active is ALL:
        return content
    out = np.zeros(32, content.dtype)
    out[active] = content
    return out

"""An interpreter of PTX, for what NVRTC makes of csrc/cuda. It runs warp by warp, with NumPy for a warp's 32 lanes.

Between two barriers the warps of a block run one after another in random order, over shared memory that begins as NaN.
The blocks of a grid run in random order too. What a GPU traps at or leaves undefined raises Fault: an access outside
the tensors or not aligned, a barrier or an instruction of whole warps that only some lanes reach, and a race, which is
two threads at one place of shared memory without a barrier between them, one of which writes. An unknown instruction
raises NotImplementedError with its text.

It can't show errors of machine code or of blocks that run at the same time. A fused multiply-add rounds twice.
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
    """Run the one kernel of `ptx` over a grid of blocks. Raises Fault.

    arguments  ctypes numbers or structs, one for each parameter of the kernel
    tensors    on the CPU; the kernel may access the whole storage of each, and nothing else
    seed       of the order of warps and blocks
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
    """An instruction, decoded. Its guard is a register and the value that lets the instruction run."""

    instruction: Instruction
    guard: tuple[int, bool] | None
    head: str
    target: int  # of a branch; -1 for others
    step: Step | None  # what it does; None for a branch, a barrier and an end


class Kernel:
    """A kernel's code, decoded.

    parameters  where each begins
    registers   the type of each, by its number
    code        the instructions in order
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
        """The number of a register, by its name."""
        if name not in self.numbers:
            self.numbers[name] = len(self.registers)
            self.registers.append(self.kinds[name.rstrip("0123456789")])
        return self.numbers[name]

    def is_register(self, text: str) -> bool:
        """Whether an operand is a register; `%tid.x` is not."""
        return re.fullmatch(r"%[a-z]+\d+", text) is not None

    def source(self, text: str, kind: np.dtype[Any]) -> Source:
        """How to read an operand as a type."""
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
        """How to write an operand, in the active lanes only."""
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
        """How to compute the address that an operand has in brackets."""
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
    """The instructions of a body in order, and where its labels stand. The braces of scopes are left out."""
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
    """A constant; those that begin with 0f or 0d are the bits of a float."""
    if text[:2] in ("0f", "0d"):
        bits = np.dtype("u4" if text[:2] == "0f" else "u8")
        pattern = np.array(int(text[2:], 16), bits)
        return pattern.view(f"f{bits.itemsize}") if kind.kind == "f" else pattern
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text) is None:
        raise NotImplementedError(f"the operand {text}")
    value = int(text.rstrip("U"), 0)
    return value if kind.kind == "f" else np.array(value % 2**64, np.uint64)


class Block:
    """A block of threads."""

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
        """Run to the end, from barrier to barrier, with the warps in random order."""
        going = True
        while going:
            chance.shuffle(self.warps)
            waits = [warp.run() for warp in self.warps]
            going = all(waits)
            if any(waits) and not going:
                raise Fault("some warps have ended where others wait at a barrier")
            self.shared.barrier()


class Warp:
    """32 threads: their registers, and which of them are at which instruction.

    The lanes that are furthest behind run first, so that lanes that have diverged meet again.
    """

    def __init__(self, block: Block, number: int) -> None:
        self.block, self.threads = block, 32 * number + LANES
        self.special = block.special | {"%tid.x": self.threads}
        self.registers: list[Values] = [  # all bits set: NaN
            np.full(32, 0xFF, np.uint8).repeat(kind.itemsize).view(kind) if kind != np.bool_ else ~ALL
            for kind in block.kernel.registers
        ]
        self.paths: dict[int, Mask] = {0: ALL}

    def run(self) -> bool:
        """Run to the next barrier or to the end; returns whether it is a barrier."""
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
                    raise Fault(f"only a part of a warp waits: {decoded.instruction.text}")
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
        """Let lanes arrive at an instruction, where other lanes may be already."""
        if at in self.paths:
            lanes = lanes | self.paths[at]
        if lanes is ALL or lanes.all():
            self.paths[at] = ALL
        elif lanes.any():
            self.paths[at] = lanes

    def read(self, at: Values, size: int, active: Mask, threads: Values) -> Values:
        """`size` bytes at the address of each active lane, [32]."""
        addresses = self._addresses(at, size, active)
        if self._is_shared(addresses):
            content = self.block.shared.read(addresses, size, threads[active])
        else:
            content = self.block.memory.read(addresses, size)
        return _spread(content, active)

    def read_parameters(self, at: Values, size: int, active: Mask) -> Values:
        """As `read`, in the space of the parameters. Raises Fault outside it."""
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
        """The addresses of the active lanes. Raises Fault for one that isn't aligned."""
        addresses = at[active]
        if (addresses % size).any():
            raise Fault(f"an address is no multiple of {size}")
        return addresses

    def _is_shared(self, at: Values) -> bool:
        """Whether addresses are in shared memory; the first decides for all."""
        return bool(at[0] < self.block.memory.begins[0]) if len(self.block.memory.begins) else True


def _spread(content: Values, active: Mask) -> Values:
    """The active lanes' content as an array of all 32 lanes, with 0 for the others."""
    if active is ALL:
        return content
    out = np.zeros(32, content.dtype)
    out[active] = content
    return out

"""An interpreter of PTX, for what NVRTC makes of csrc/cuda: warp by warp, the 32 lanes of one at a time in NumPy.

Between two barriers the warps of a block run one after another in random order, over shared memory that begins as NaN;
the blocks of a grid run in random order too. Raised is what a GPU traps at or leaves undefined: an access outside the
tensors or not aligned, a barrier or an instruction of whole warps that only a part reaches, and a race: two threads at
one place of shared memory without a barrier between them, one of which writes. An instruction that isn't known here
raises NotImplementedError with its text.

It says nothing of machine code, of blocks that run at the same time, or of speed. A fused multiply-add rounds twice.
"""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ptx_instructions import (
    ALL,
    HANDLERS,
    LANES,
    SEVERAL,
    TYPES,
    Fault,
    Instruction,
    Mask,
    Race,
    Source,
    Step,
    Values,
    split,
)
from torch import Tensor

SHARED = 0x1000  # where a block's shared memory begins; tensors stand at their own addresses, far behind
GRANULE = 2  # bytes that races are told apart by
NOBODY = -1  # instead of a thread's number, as SEVERAL


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
    tensors    on the CPU: all that the kernel may reach, each with its whole storage
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
    """An instruction as it runs: its guard, a register and what that must be, and what it does."""

    instruction: Instruction
    guard: tuple[int, bool] | None
    head: str
    target: int  # of a branch
    step: Step | None  # of what isn't a branch, a barrier or an end


class Kernel:
    """A kernel's code, decoded.

    parameters  where each stands
    registers   the type of each, by its number
    code        in order
    """

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
        found = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\{(.*)\}", ptx, re.DOTALL)
        if found is None:
            raise ValueError("no kernel is in this PTX")
        self.parameters = Parameters(found[1])
        self.shared = set(re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", ptx))
        self.registers: list[np.dtype[Any]] = []
        self.kinds = {
            prefix: TYPES[kind] for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>;", found[3])
        }
        self.numbers: dict[str, int] = {}
        statements, self.labels = _statements(found[3])
        self.code = [self._decoded(each) for each in statements]

    def number(self, name: str) -> int:
        """A register's."""
        if name not in self.numbers:
            self.numbers[name] = len(self.registers)
            self.registers.append(self.kinds[name.rstrip("0123456789")])
        return self.numbers[name]

    def is_register(self, text: str) -> bool:
        """Whether an operand is one; `%tid.x` isn't."""
        return re.fullmatch(r"%[a-z]+\d+", text) is not None

    def source(self, text: str, kind: np.dtype[Any]) -> Source:
        """How to read an operand as a type."""
        if self.is_register(text):
            number = self.number(text)
            own = self.registers[number]
            if own == kind:
                return lambda warp: warp.registers[number]
            if own.itemsize == kind.itemsize and np.bool_ not in (own, kind):
                return lambda warp: warp.registers[number].view(kind)
            narrow = np.dtype(f"u{kind.itemsize}")
            if own.itemsize > kind.itemsize and own != np.bool_:
                return lambda warp: warp.registers[number].astype(narrow).view(kind)
            raise NotImplementedError(f"{text} is read as {kind}, and is {own}")
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
        """How to write an operand: in the lanes that take part."""
        if text == "_":
            return lambda warp, value, active: None
        number = self.number(text)
        own = self.registers[number]

        def write(warp: Warp, value: Values, active: Mask) -> None:
            if value.dtype.itemsize == own.itemsize:
                value = value.view(own)
            elif value.dtype.kind in "ui" and value.dtype.itemsize < own.itemsize:
                value = value.astype(own)
            else:
                raise NotImplementedError(f"{text} is {own}, and is given {value.dtype}")
            warp.registers[number] = value if active is ALL else np.where(active, value, warp.registers[number])

        return write

    def address(self, text: str) -> Source:
        """How to compute the address in an operand's brackets."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if found is None:
            raise NotImplementedError(f"the address {text}")
        base = self.number(found[1]) if self.is_register(found[1]) else None
        kind = np.dtype(np.uint64) if base is None else self.registers[base]
        read, further = self.source(found[1], kind), int(found[2] or 0)
        return lambda warp: read(warp).astype(np.int64) + further

    def _decoded(self, statement: str) -> Decoded:
        guarded = re.fullmatch(r"@(!?)(%\w+)\s+(.*)", statement)
        guard = None if guarded is None else (self.number(guarded[2]), guarded[1] == "")
        text = statement if guarded is None else guarded[3]
        opcode, _, rest = text.partition(" ")
        own = Instruction(statement, tuple(opcode.split(".")), tuple(split(rest)))
        head = own.opcode[0]
        if head in ("bra", "ret", "exit"):
            return Decoded(own, guard, head, self.labels[own.operands[0]] if head == "bra" else -1, None)
        if head in ("bar", "barrier"):
            if "sync" not in own.opcode or own.operands != ("0",):
                raise own.unknown()
            return Decoded(own, guard, "bar", -1, None)
        if head not in HANDLERS:
            raise own.unknown()
        return Decoded(own, guard, head, -1, HANDLERS[head](self, own))


def _statements(body: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a body in order, and where its labels stand; braces of a scope are left out."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for piece in body.split(";"):
        text = " ".join(piece.split())
        while opened := re.match(r"[{}]\s*|(\$?\w+):\s*", text):
            if opened[1] is not None:
                labels[opened[1]] = len(found)
            text = text[opened.end() :]
        if text and not text.startswith("."):
            found.append(text)
    return found, labels


def _number(text: str, kind: np.dtype[Any]) -> Any:
    """A constant: 0f and 0d are the bits of floats."""
    if text[:2] in ("0f", "0d"):
        bits = np.dtype("u4" if text[:2] == "0f" else "u8")
        pattern = np.array(int(text[2:], 16), bits)
        return pattern.view(f"f{bits.itemsize}") if kind.kind == "f" else pattern
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text) is None:
        raise NotImplementedError(f"the operand {text}")
    value = int(text.rstrip("U"), 0)
    return value if kind.kind == "f" else np.array(value % 2**64, np.uint64)


class Region:
    """Bytes that stand somewhere."""

    def __init__(self, begin: int, content: NDArray[np.uint8]) -> None:
        self.begin, self.end = begin, begin + len(content)
        self.views = {size: content[: len(content) // size * size].view(f"V{size}") for size in (1, 2, 4, 8, 16)}

    def read(self, at: Values, size: int) -> Values:
        """So many bytes at each of some addresses."""
        found: Values = self.views[size][(at - self.begin) // size]
        return found

    def write(self, at: Values, content: Values) -> None:
        """As `read`, of bytes that are given."""
        size = content.dtype.itemsize
        self.views[size][(at - self.begin) // size] = content


class Parameters:
    """A kernel's parameters, in an address space of their own that begins at 0.

    begins  where each begins, by name
    sizes   the bytes of each, by name
    """

    def __init__(self, declaration: str) -> None:
        pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s[^,]*?(\w+)(?:\[(\d+)\])?\s*(?:,|$)"
        self.begins: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.end = 0
        for alignment, kind, name, count in re.findall(pattern, declaration.strip()):
            itemsize = TYPES[kind].itemsize
            step = int(alignment or itemsize)
            self.begins[name] = -(-self.end // step) * step
            self.sizes[name] = itemsize * int(count or 1)
            self.end = self.begins[name] + self.sizes[name]

    def filled(self, arguments: Sequence[Any]) -> Region:
        """The space with these arguments in it. Raises TypeError where they don't fit."""
        sizes = [ctypes.sizeof(argument) for argument in arguments]
        if sizes != list(self.sizes.values()):
            raise TypeError(f"the parameters take {self.sizes} bytes, the arguments {sizes}")
        content = np.zeros(-(-self.end // 16) * 16, np.uint8)  # whole units of the widest load
        for begin, argument in zip(self.begins.values(), arguments, strict=True):
            content[begin : begin + ctypes.sizeof(argument)] = np.frombuffer(bytes(argument), np.uint8)
        return Region(0, content)


class Memory:
    """The tensors, where they stand."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
        contents = {
            begin: torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            for begin, storage in storages.items()
            if storage.nbytes()
        }
        self.regions = [Region(begin, contents[begin]) for begin in sorted(contents)]
        self.begins = np.array([each.begin for each in self.regions])
        self.ends = np.array([each.end for each in self.regions])

    def read(self, at: Values, size: int) -> Values:
        """As Region.read. Raises Fault outside the tensors."""
        out = np.empty(len(at), f"V{size}")
        for region, own in self._regions(at, size):
            out[own] = region.read(at[own], size)
        return out

    def write(self, at: Values, content: Values) -> None:
        """As Region.write. Raises Fault outside the tensors."""
        for region, own in self._regions(at, content.dtype.itemsize):
            region.write(at[own], content[own])

    def _regions(self, at: Values, size: int) -> list[tuple[Region, Any]]:
        """The regions that addresses are in, and which of the addresses."""
        numbers = np.searchsorted(self.begins, at, "right") - 1
        if (numbers < 0).any() or (at + size > self.ends[numbers]).any():
            raise Fault("outside the tensors")
        if (numbers == numbers[0]).all():
            return [(self.regions[numbers[0]], slice(None))]
        return [(self.regions[each], numbers == each) for each in np.unique(numbers)]


class Shared:
    """A block's shared memory, NaN before, and who wrote and who read each place since the last barrier."""

    def __init__(self, size: int) -> None:
        self.region = Region(SHARED, np.full(size, 0xFF, np.uint8))
        self.wrote, self.has_read = np.full((2, size // GRANULE), NOBODY)

    def barrier(self) -> None:
        """Forget who was there."""
        self.wrote.fill(NOBODY)
        self.has_read.fill(NOBODY)

    def read(self, at: Values, size: int, threads: Values) -> Values:
        """As Region.read, by some threads. Raises Fault outside, or Race."""
        places, threads = self._places(at, size, threads)
        self._refuse((self.wrote[places] != NOBODY) & (self.wrote[places] != threads), places, "read", "written")
        before = self.has_read[places]
        self.has_read[places] = np.where((before == NOBODY) | (before == threads), threads, SEVERAL)
        others = self.has_read[places] != threads  # of those that read the same in one instruction, too
        self.has_read[places[others]] = SEVERAL
        return self.region.read(at, size)

    def write(self, at: Values, content: Values, threads: Values) -> None:
        """As Region.write, by some threads. Raises Fault outside, or Race."""
        places, threads = self._places(at, content.dtype.itemsize, threads)
        self._refuse((self.has_read[places] != NOBODY) & (self.has_read[places] != threads), places, "written", "read")
        self._refuse((self.wrote[places] != NOBODY) & (self.wrote[places] != threads), places, "written", "written")
        self.wrote[places] = threads
        self._refuse(self.wrote[places] != threads, places, "written", "written")
        self.region.write(at, content)

    def _places(self, at: Values, size: int, threads: Values) -> tuple[Values, Values]:
        """Of each access the places [n, size / 2], and the thread of each."""
        if (at < self.region.begin).any() or (at + size > self.region.end).any():
            raise Fault(f"outside the {self.region.end - self.region.begin} bytes of shared memory")
        if size < GRANULE:
            raise NotImplementedError("single bytes of shared memory")
        places = (at - SHARED)[:, None] // GRANULE + np.arange(size // GRANULE)
        return places, np.broadcast_to(threads[:, None], places.shape)

    def _refuse(self, clashes: Values, places: Values, now: str, before: str) -> None:
        if clashes.any():
            place = GRANULE * int(places[clashes][0])
            raise Race(f"byte {place} of shared memory is {now}, and another thread has {before} it without a barrier")


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
        """To its end: from barrier to barrier, warps in random order."""
        going = True
        while going:
            chance.shuffle(self.warps)
            waits = [warp.run() for warp in self.warps]
            going = all(waits)
            if any(waits) and not going:
                raise Fault("some warps have ended where others wait at a barrier")
            self.shared.barrier()


class Warp:
    """32 threads: their registers, and at which instruction which of them are.

    The lanes that are furthest behind run first, so that those that parted meet again.
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
        """To the next barrier, which is True, or to the end."""
        code = self.block.kernel.code
        while self.paths:
            at = min(self.paths)
            if at == len(code):
                return False
            active, each = self.paths.pop(at), code[at]
            chosen = active
            if each.guard is not None:
                number, wanted = each.guard
                chosen = active & (self.registers[number] == wanted)
            if each.step is not None:
                if chosen is active or chosen.any():
                    self._take(each, ALL if chosen.all() else chosen)
                self._go(at + 1, active)
            elif each.head == "bar":
                if chosen is not ALL:
                    raise Fault(f"only a part of a warp waits: {each.instruction.text}")
                self.paths = {at + 1: ALL}
                return True
            else:
                if each.head == "bra":
                    self._go(each.target, chosen)
                self._go(at + 1, active & ~chosen)
        return False

    def _take(self, each: Decoded, active: Mask) -> None:
        assert each.step is not None
        try:
            each.step(self, active)
        except Fault as fault:
            raise type(fault)(f"{fault}: {each.instruction.text}") from None

    def _go(self, at: int, lanes: Mask) -> None:
        """Lanes come to an instruction, where others may be."""
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
        """The content of each active lane to its address."""
        own = self._addresses(at, content.dtype.itemsize, active)
        if self._is_shared(own):
            self.block.shared.write(own, content[active], self.threads[active])
        else:
            self.block.memory.write(own, content[active])

    def _addresses(self, at: Values, size: int, active: Mask) -> Values:
        own = at[active]
        if (own % size).any():
            raise Fault(f"an address is no multiple of {size}")
        return own

    def _is_shared(self, at: Values) -> bool:
        """Which of the two all addresses are in, by the first."""
        return bool(at[0] < self.block.memory.begins[0]) if len(self.block.memory.begins) else True


def _spread(content: Values, active: Mask) -> Values:
    """What the active lanes have, as a number of each lane; 0 for the others."""
    if active is ALL:
        return content
    out = np.zeros(32, content.dtype)
    out[active] = content
    return out

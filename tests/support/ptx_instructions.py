"""The PTX instructions that ptx.py interprets. Each handler returns a function that executes an instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ptx import Kernel, Warp

Values = NDArray[Any]  # [32], one number per lane
Mask = NDArray[np.bool_]  # [32], whether each lane is active
Source = Callable[["Warp"], Values]
Step = Callable[["Warp", Mask], None]

LANES = np.arange(32)
ALL: Mask = np.ones(32, np.bool_)  # the mask of a warp with all lanes active is this object itself
SEVERAL = -2  # stands for several threads where a thread's number is expected
TYPES = {
    f"{kind}{8 * size}": np.dtype(f"{letter}{size}")
    for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
    for size in (1, 2, 4, 8)
    if (kind, size) != ("f", 1)
} | {"pred": np.dtype(np.bool_)}


class Fault(Exception):
    """Something that makes a GPU trap or whose result is undefined."""


class Race(Fault):
    """Two threads access the same shared memory without a barrier between them, and at least one of them writes."""


@dataclass(frozen=True)
class Instruction:
    """One instruction without its guard: "add.s32 %r1, 3" has opcode ("add", "s32") and operands ("%r1", "3")."""

    text: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]

    def type(self, place: int = -1) -> np.dtype[Any]:
        """The type that a part of the opcode names, by default its last part."""
        if self.opcode[place] not in TYPES:
            raise self.unknown()
        return TYPES[self.opcode[place]]

    def unknown(self) -> NotImplementedError:
        """The error to raise if the interpreter doesn't know this instruction."""
        return NotImplementedError(f"not known to the interpreter of PTX: {self.text}")


def split(operands: str) -> list[str]:
    """Split operands at the commas that are not inside braces or brackets."""
    return [each.strip() for each in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", operands) if each.strip()]


def _memory(kernel: Kernel, instruction: Instruction) -> Step:
    """Loads and stores of single numbers and of vectors."""
    kind, is_load = instruction.type(), instruction.opcode[0] == "ld"
    registers, place = instruction.operands if is_load else instruction.operands[::-1]
    names = split(registers[1:-1]) if registers.startswith("{") else [registers]
    address, size = kernel.address(place), kind.itemsize * len(names)
    if is_load:
        sinks = [kernel.sink(name) for name in names]

        def load(warp: Warp, active: Mask) -> None:
            at = address(warp)
            if "param" in instruction.opcode:
                content = warp.read_parameters(at, size, active)
            else:
                content = warp.read(at, size, active, warp.threads)
            found = content.view(kind).reshape(32, -1)
            for column, sink in enumerate(sinks):
                sink(warp, found[:, column].copy(), active)

        return load
    sources = [kernel.source(name, kind) for name in names]

    def store(warp: Warp, active: Mask) -> None:
        content = np.stack([source(warp) for source in sources], 1)
        warp.write(address(warp), content.view(f"V{size}")[:, 0], active)

    return store


def _move(kernel: Kernel, instruction: Instruction) -> Step:
    """Copies and address conversions. The latter copy too, because an address is the same in every address space."""
    to, source = instruction.operands
    if "{" in to + source:
        raise instruction.unknown()
    return _mapped(kernel, instruction, instruction.type(), lambda value: value)


def _mapped(kernel: Kernel, instruction: Instruction, kind: np.dtype[Any], function: Callable[..., Values]) -> Step:
    """Apply a function to operands that all have the same type."""
    sink, sources = (
        kernel.sink(instruction.operands[0]),
        [kernel.source(each, kind) for each in instruction.operands[1:]],
    )
    return lambda warp, active: sink(warp, function(*(source(warp) for source in sources)), active)


def _of_all(function: Callable[..., Values]) -> Callable[[Kernel, Instruction], Step]:
    """Make the handler of an instruction that applies the same function to every type."""
    return lambda kernel, instruction: _mapped(kernel, instruction, instruction.type(), function)


def _load_matrices(kernel: Kernel, instruction: Instruction) -> Step:
    """Loads 8x8 matrices of 16-bit numbers.

    Lane l gets the entries (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1) of each matrix, or of its transpose.
    """
    if instruction.opcode[1:5] != ("sync", "aligned", "m8n8", "x4"):
        raise instruction.unknown()
    sinks = [kernel.sink(each) for each in split(instruction.operands[0][1:-1])]
    address, transposed = kernel.address(instruction.operands[1]), "trans" in instruction.opcode
    row, column = LANES // 4, LANES % 4 * 2

    def load(warp: Warp, active: Mask) -> None:
        _whole(active)
        rows = warp.read(address(warp), 16, active, np.full(32, SEVERAL)).view(np.uint16).reshape(4, 8, 8)
        for matrix, sink in zip(rows.transpose(0, 2, 1) if transposed else rows, sinks, strict=True):
            pair = np.stack([matrix[row, column], matrix[row, column + 1]], 1)
            sink(warp, pair.view(np.uint32)[:, 0], active)

    return load


def _whole(active: Mask) -> None:
    if active is not ALL:
        raise Fault("only some lanes of a warp take part")


def _fragment(registers: int, places: Callable[[int], tuple[Values, Values]], width: int) -> Values:
    """For each entry of a row-major matrix [rows * width], its index in the lanes' registers [registers * 32]."""
    out = np.empty(registers * 32, np.int64)
    for register in range(registers):
        row, column = places(register)
        out[row * width + column] = register * 32 + LANES
    return out


GROUP, WITHIN = LANES // 4, LANES % 4 * 2
A = _fragment(
    8, lambda i: (GROUP + i // 2 % 2 * 8, WITHIN + i % 2 + i // 4 * 8), 16
)  # 16 x 16, two numbers per register
B = _fragment(4, lambda i: (WITHIN + i % 2 + i // 2 * 8, GROUP), 8)  # 16 x 8
C = _fragment(4, lambda i: (GROUP + i // 2 * 8, WITHIN + i % 2), 8)  # 16 x 8, one number per register
OF_C = np.argsort(C)


def _multiply_add(kernel: Kernel, instruction: Instruction) -> Step:
    """Multiplies bfloat16 matrices, whose entries are distributed over the lanes as PTX defines."""
    if instruction.opcode[1:] != ("sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"):
        raise instruction.unknown()
    d, a, b, c = (split(each[1:-1]) for each in instruction.operands)
    halves = [[kernel.source(each, TYPES["u32"]) for each in registers] for registers in (a, b)]
    sums, sinks = [kernel.source(each, TYPES["f32"]) for each in c], [kernel.sink(each) for each in d]

    def multiply(warp: Warp, active: Mask) -> None:
        _whole(active)
        left, right = (_halves(np.stack([source(warp) for source in each])) for each in halves)
        before = np.stack([source(warp) for source in sums]).ravel()[C].reshape(16, 8)
        product = left[A].reshape(16, 16).astype(np.float64) @ right[B].reshape(16, 8).astype(np.float64)
        out = (product + before).astype(np.float32).ravel()[OF_C].reshape(4, 32)
        for sink, value in zip(sinks, out, strict=True):
            sink(warp, value, active)

    return multiply


def _halves(pairs: Values) -> Values:
    """Unpack registers [n, 32] that hold two bfloat16 numbers each to float32 [2 n * 32], the lower half first."""
    both = np.stack([pairs << np.uint32(16), pairs & np.uint32(0xFFFF0000)], 1)
    return both.view(np.float32).ravel()


def _shuffle(kernel: Kernel, instruction: Instruction) -> Step:
    """Shuffles: each lane reads a register of the lane whose number is its own XOR the second operand."""
    if instruction.opcode[1:] != ("sync", "bfly", "b32"):
        raise instruction.unknown()
    sink = kernel.sink(instruction.operands[0].split("|")[0])
    value, bits, clamp, members = (kernel.source(each, TYPES["u32"]) for each in instruction.operands[1:])

    def shuffle(warp: Warp, active: Mask) -> None:
        _whole(active)
        if (clamp(warp) != 31).any() or (members(warp) != 2**32 - 1).any():
            raise instruction.unknown()
        sink(warp, value(warp)[LANES ^ bits(warp)], active)

    return shuffle


def _convert(kernel: Kernel, instruction: Instruction) -> Step:
    """Conversions; the only rounding mode is to nearest."""
    if instruction.opcode[-2:] == ("bf16x2", "f32"):
        return _round_pair(kernel, instruction)
    to, kind = instruction.type(-2), instruction.type()
    narrows = to.kind == "f" and (kind.kind != "f" or to.itemsize < kind.itemsize)
    if instruction.opcode[1:-2] not in ((), ("rn",) if narrows else ()) or (kind.kind == "f" and to.kind != "f"):
        raise instruction.unknown()
    return _mapped(kernel, instruction, kind, lambda value: value.astype(to))


def _round_pair(kernel: Kernel, instruction: Instruction) -> Step:
    """Rounds two float32 numbers to bfloat16 and packs them, the first into the upper half."""
    if instruction.opcode[1:-2] not in (("rn",), ("rn", "relu")):
        raise instruction.unknown()
    relu = "relu" in instruction.opcode

    def rounded(value: Values) -> Values:
        if relu:
            value = np.where(value < 0, np.float32(0), value)
        bits = value.view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(value), np.uint32(0x7FFF), bits)

    return _mapped(
        *(kernel, instruction, TYPES["f32"]), lambda high, low: rounded(low) | rounded(high) << np.uint32(16)
    )


COMPARISONS: dict[str, Callable[..., Values]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda x, y: (x == y) | _unordered(x, y),
    "neu": lambda x, y: ~(x == y),
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
}


def _unordered(x: Values, y: Values) -> Values:
    return np.isnan(x) | np.isnan(y)


def _compare(kernel: Kernel, instruction: Instruction) -> Step:
    """Comparisons. With NaN, every comparison of floats is false, even "ne"."""
    kind, which = instruction.type(), instruction.opcode[1]
    if len(instruction.opcode) != 3 or which not in COMPARISONS:
        raise instruction.unknown()
    compare = COMPARISONS[which]
    if kind.kind == "f" and which == "ne":
        return _mapped(kernel, instruction, kind, lambda x, y: (x != y) & ~_unordered(x, y))
    return _mapped(kernel, instruction, kind, compare)


def _select(kernel: Kernel, instruction: Instruction) -> Step:
    """Selects the first operand in the lanes where the predicate is true, otherwise the second."""
    to, first, second, predicate = instruction.operands
    sink, chosen = kernel.sink(to), kernel.source(predicate, TYPES["pred"])
    a, b = (kernel.source(each, instruction.type()) for each in (first, second))
    return lambda warp, active: sink(warp, np.where(chosen(warp), a(warp), b(warp)), active)


def _shift(kernel: Kernel, instruction: Instruction) -> Step:
    """Shifts. A shift by more bits than the type has gives 0, or copies of the sign bit for a signed right shift."""
    kind, left = instruction.type(), instruction.opcode[0] == "shl"
    to, value, by = instruction.operands
    sink, source, amount = kernel.sink(to), kernel.source(value, kind), kernel.source(by, TYPES["u32"])
    bits = 8 * kind.itemsize

    def shift(warp: Warp, active: Mask) -> None:
        wanted, own_value = amount(warp), source(warp)
        few = np.minimum(wanted, bits - 1).astype(kind)
        out = own_value << few if left else own_value >> few
        if left or kind.kind == "u":
            out = np.where(wanted < bits, out, kind.type(0))
        sink(warp, out, active)

    return shift


def _multiply(kernel: Kernel, instruction: Instruction) -> Step:
    """Multiplies, and for mad also adds. For integers it uses the lower half, the upper half or all of the product."""
    kind = instruction.type()
    if kind.kind == "f" and instruction.opcode[0] == "mul":
        return _mapped(kernel, instruction, kind, np.multiply)
    if instruction.opcode[1] == "hi" and instruction.opcode[0] == "mul" and kind.itemsize == 4:
        wide = np.dtype(f"{kind.kind}8")
        return _mapped(kernel, instruction, kind, lambda x, y: (x.astype(wide) * y >> wide.type(32)).astype(kind))
    if kind.kind == "f" or instruction.opcode[1] not in ("lo", "wide"):
        raise instruction.unknown()
    out = np.dtype(f"{kind.kind}{2 * kind.itemsize}") if instruction.opcode[1] == "wide" else kind
    to, first, second, *rest = instruction.operands
    sink, a, b = kernel.sink(to), kernel.source(first, kind), kernel.source(second, kind)
    added = [kernel.source(each, out) for each in rest]

    def multiply(warp: Warp, active: Mask) -> None:
        value = a(warp).astype(out) * b(warp).astype(out)
        sink(warp, sum((each(warp) for each in added), value), active)

    return multiply


def _fused(kernel: Kernel, instruction: Instruction) -> Step:
    kind = instruction.type()
    return _mapped(kernel, instruction, kind, lambda x, y, z: (x.astype(np.float64) * y + z).astype(kind))


def _divide(kernel: Kernel, instruction: Instruction) -> Step:
    """Quotients and remainders. Integer division rounds towards zero."""
    kind, remainder = instruction.type(), instruction.opcode[0] == "rem"
    if kind.kind == "f":
        if remainder:
            raise instruction.unknown()
        return _mapped(kernel, instruction, kind, np.divide)

    def divide(x: Values, y: Values) -> Values:
        y = np.where(y == 0, kind.type(1), y)  # the result is undefined, so any divisor will do
        rest = np.fmod(x, y)
        return rest if remainder else (x - rest) // y

    return _mapped(kernel, instruction, kind, divide)


def _insert(kernel: Kernel, instruction: Instruction) -> Step:
    """Inserts the lower bits of the first operand into the second operand, beginning at a given bit."""
    to, first, second, at, count = instruction.operands
    sink, (a, b) = kernel.sink(to), (kernel.source(each, instruction.type()) for each in (first, second))
    begin, mask = int(at), ((1 << int(count)) - 1) << int(at)
    keep = instruction.type().type(~mask % (1 << 8 * instruction.type().itemsize))
    kind = instruction.type().type
    return lambda warp, active: sink(warp, (b(warp) & keep) | (a(warp) << kind(begin) & kind(mask)), active)


def _atomic(kernel: Kernel, instruction: Instruction) -> Step:
    """Atomic additions to integers in global memory; the lanes add one after another."""
    kind = instruction.type()
    if "add" not in instruction.opcode or "shared" in instruction.opcode or kind.kind == "f":
        raise instruction.unknown()
    sink, address, value = (
        kernel.sink(instruction.operands[0]),
        kernel.address(instruction.operands[1]),
        kernel.source(instruction.operands[2], kind),
    )

    def add(warp: Warp, active: Mask) -> None:
        before = np.zeros(32, kind)
        for lane in np.flatnonzero(active):
            only = np.eye(32, dtype=np.bool_)[lane]
            found = warp.read(address(warp), kind.itemsize, only, warp.threads).view(kind)
            before[lane] = found[lane]
            warp.write(address(warp), (found + value(warp)).view(f"V{kind.itemsize}"), only)
        sink(warp, before, active)

    return add


def _fence(kernel: Kernel, instruction: Instruction) -> Step:
    """Fences. They do nothing, because every memory operation takes effect at once."""
    return lambda warp, active: None


def _inverted(value: Values) -> Values:
    return ~value


HANDLERS: dict[str, Callable[[Kernel, Instruction], Step]] = {
    "ld": _memory,
    "st": _memory,
    "mov": _move,
    "cvta": _move,
    "atom": _atomic,
    "membar": _fence,
    "fence": _fence,
    "ldmatrix": _load_matrices,
    "mma": _multiply_add,
    "shfl": _shuffle,
    "cvt": _convert,
    "setp": _compare,
    "selp": _select,
    "shl": _shift,
    "shr": _shift,
    "mul": _multiply,
    "mad": _multiply,
    "fma": _fused,
    "div": _divide,
    "rem": _divide,
    "bfi": _insert,
    "add": _of_all(np.add),
    "sub": _of_all(np.subtract),
    "min": _of_all(np.fmin),
    "max": _of_all(np.fmax),
    "and": _of_all(np.bitwise_and),
    "or": _of_all(np.bitwise_or),
    "xor": _of_all(np.bitwise_xor),
    "not": _of_all(_inverted),
    "neg": _of_all(np.negative),
    "sqrt": _of_all(np.sqrt),
    "rcp": _of_all(np.reciprocal),
}

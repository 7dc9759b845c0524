"""Machine code of compiled kernels, read from cuobjdump's listing: instructions, loops, and loads in flight.

An instruction of an sm_70 to sm_100 chip is 128 bits, of which the upper ones say what it waits for: bits 110–112 the
barrier that it sets until its result is there (7: none), 116–121 a mask of barriers that must be clear before it goes
(Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018, section 2.1). So the listing
says which loads are under way at any place, without a guess about registers.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sfr_kernels.kernels import build


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # as "@!P0 LDG.E.128 R4, desc[UR6][R8.64]"
    control: int  # the upper 64 of its bits

    @cached_property
    def opcode(self) -> str:
        return self.text.split()[1 if self.text.startswith("@") else 0]

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def wide(self) -> bool:
        """Moves 16 bytes from or to memory."""
        return self.kind in ("LDG", "LD", "LDS", "LDGSTS", "STG", "ST") and "128" in self.opcode.split(".")

    @property
    def stores(self) -> bool:
        return self.kind in ("STG", "ST")

    @property
    def sets(self) -> int:
        return self.control >> 46 & 7

    @property
    def waits(self) -> int:
        return self.control >> 52 & 63

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        match = re.search(r"0x([0-9a-f]+)$", self.text)
        return int(match[1], 16) if self.kind == "BRA" and match else None

    @property
    def conditional(self) -> bool:
        return bool(re.match(r"@!?U?P\d", self.text) or re.search(r"(BRA|EXIT)\S* !?U?P\d", self.text))


@dataclass(frozen=True)
class Piece:
    """A loop, or a whole kernel that has no loop: what a thread runs on the path with the most work."""

    path: list[Instruction]
    calls: int  # of the slow paths of a division, a root or the like, which `path` leaves out
    repeats: bool

    @property
    def loads(self) -> int:
        return sum(i.wide and not i.stores for i in self.path)

    @property
    def stores(self) -> int:
        return sum(i.wide and i.stores for i in self.path)

    @property
    def moves(self) -> int:
        return self.loads + self.stores

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(i.kind for i in self.path if i.wide)

    def count(self, kind: str) -> int:
        return sum(i.kind == kind for i in self.path)

    @property
    def in_flight(self) -> int:
        """The most 16-byte loads from global memory to registers that a thread has under way at a time."""
        under_way, most = [], 0
        for i in self.path * (1 + self.repeats):  # what one round loads, the next may wait for
            if i.kind == "DEPBAR":
                barrier, left = map(int, re.search(r"SB(\d), 0x(\d+)", i.text).groups())
                theirs = [n for n, b in enumerate(under_way) if b == barrier]
                done = theirs[: max(0, len(theirs) - left)]
                under_way = [b for n, b in enumerate(under_way) if n not in done]
            under_way = [b for b in under_way if not i.waits >> b & 1]
            if i.wide and i.kind in ("LDG", "LD"):
                under_way.append(i.sets)
            most = max(most, len(under_way))
        return most


def _next(code: list[Instruction], at: dict[int, int], n: int) -> list[int]:
    """The places that may follow the n-th instruction, further on in the listing; len(code): the end."""
    i = code[n]
    if i.kind in ("CALL", "RET", "BRX", "JMP") or i.opcode.startswith("WARPSYNC.COLLECTIVE"):
        return []  # a slow path
    if i.kind == "EXIT":
        return [len(code), *([n + 1] if i.conditional else [])]
    if i.kind == "BRA" and not re.search(r"\.(DIV|CONV)", i.opcode):
        forward = [at[i.target]] if i.target in at and i.target > i.address else []
        return [*forward, *([n + 1] if i.conditional else [])]
    return [n + 1]


def longest(
    code: list[Instruction], first: int, last: int | None = None, accesses: tuple[int, int] | None = None
) -> list[Instruction]:
    """The longest path from one instruction to another, or to the kernel's end, of those that call nothing and move
    least numbers one by one, with so many 16-byte loads from and stores to global memory (None: with the most).

    Empty where there is no path, ValueError where none has so many."""
    at = {i.address: n for n, i in enumerate(code)}
    end = len(code) if last is None else last
    # of each place, the longest paths to it, by loads and stores: (weight, the place before, loads and stores there)
    paths = {n: {} for n in range(first, len(code) + 1)}
    paths[first][0, 0] = 0, None, None
    for n in range(first, end):
        i = code[n]
        more = 1 - 1000 * ("U16" in i.opcode.split("."))
        for (loads, stores), (weight, *_) in paths[n].items():
            outside = i.wide and i.kind != "LDS"
            now = loads + (outside and not i.stores), stores + (outside and i.stores)
            for m in _next(code, at, n):
                if m <= end and (now not in paths[m] or weight + more > paths[m][now][0]):
                    paths[m][now] = weight + more, n, (loads, stores)
    if not paths[end]:
        return []
    wanted = accesses or max(paths[end], key=lambda counts: (sum(counts), paths[end][counts][0]))
    if wanted not in paths[end]:
        raise ValueError(f"no path with {wanted} 16-byte loads and stores, of those with {sorted(paths[end])}")
    path, n, counts = [] if last is None else [code[end]], end, wanted
    while paths[n][counts][1] is not None:
        _, n, counts = paths[n][counts]
        path.append(code[n])
    return path[::-1]


def body(code: list[Instruction], accesses: tuple[int, int] | None = None) -> Piece:
    return Piece(longest(code, 0, None, accesses), sum(i.kind == "CALL" for i in code), False)


def loops(code: list[Instruction], accesses: tuple[int, int] | None = None) -> list[Piece]:
    """The innermost loops that move 16 bytes at a time; of those that move them alike, the one that does most a round,
    the others being for what is left of a row."""
    at = {i.address: n for n, i in enumerate(code)}
    ends = {}  # of a loop, by its beginning
    for n, i in enumerate(code):
        if i.target in at and i.target < i.address:
            ends[at[i.target]] = n
    found = {loop: Piece(longest(code, *loop), 0, True) for loop in ends.items()}
    found = {loop: piece for loop, piece in found.items() if piece.kinds}

    def within(loop: tuple[int, int]) -> list[tuple[int, int]]:
        return [other for other in found if other != loop and loop[0] <= other[0] and other[1] <= loop[1]]

    # sums that are read from shared memory once a row are no pass over its numbers, which another loop of the row is
    outer = {loop: within(loop) for loop in found if within(loop)}
    sums = {n for loops in outer.values() for n in loops if all(found[m].kinds == {"LDS"} for m in loops)}
    found = {loop: piece for loop, piece in found.items() if loop not in sums}
    best = {}  # by what they move
    for loop in sorted(found):
        most = best.get(found[loop].kinds)
        if not within(loop) and (most is None or found[loop].moves >= found[most].moves):
            best[found[loop].kinds] = loop
    return [
        Piece(longest(code, first, last, accesses), sum(i.kind == "CALL" for i in code[first:last]), True)
        for first, last in best.values()
    ]


def cuobjdump(file: Path) -> Path:
    """Of who compiled the file, as another's may be too old for it: a cubin is Triton's, a library nvcc's."""
    if file.suffix != ".cubin":
        beside = Path(build.nvcc() or "").resolve().parent / "cuobjdump"
        if found := beside if beside.is_file() else shutil.which("cuobjdump"):
            return Path(found)
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _dump(file: Path, *options: str) -> dict[str, str]:
    """What cuobjdump says of each function, by its mangled name."""
    done = subprocess.run([cuobjdump(file), *options, file], capture_output=True, text=True, check=True)
    parts = re.split(r"Function(?: :)? ", done.stdout)[1:]
    return {re.match(r"[^\s:]+", part)[0]: part for part in parts}


def resources(file: Path, *options: str) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED, … of every function, by its mangled name."""
    found = {}
    for name, text in _dump(file, "-res-usage", *options).items():
        line = next(line for line in text.splitlines() if "REG:" in line)
        found[name] = {k: int(v) for k, v in (field.split(":") for field in line.split() if field.count(":") == 1)}
    return found


def listings(file: Path, *options: str) -> dict[str, list[Instruction]]:
    """The instructions of every function, by its mangled name."""
    return {name: parse(text) for name, text in _dump(file, "-sass", *options).items()}


def parse(text: str) -> list[Instruction]:
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(\S.*?) ;\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    return [Instruction(int(a, 16), t.strip(), int(c, 16)) for a, t, c in re.findall(pattern, text)]


def demangled(names: list[str]) -> list[str]:
    """As c++filt, which stands beside every linker, writes them."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()

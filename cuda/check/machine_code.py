"""Machine code of kernels, as nvdisasm lists it: which instructions there are, and what is spilled within loops."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

LABEL = re.compile(r"(\.L\w+|\w+):$")
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*)")
TARGET = re.compile(r"`\((?P<label>\.L\w+)\)")
SPILLS = ("LDL", "STL")  # loads and stores of local memory
COUNTED = {
    "16-byte copies": r"LDGSTS.*\.128$",
    "other copies": r"LDGSTS(?!.*\.128$)",
    "mma": "IMMA",
    "ldmatrix": "LDSM",
}


def find_nvdisasm() -> Path | None:
    """On PATH, or in the wheel of Triton or of nvidia-cuda-nvdisasm, wherever this Python looks for packages."""
    system = shutil.which("nvdisasm")
    wheels = ("triton/backends/nvidia/bin/nvdisasm", "nvidia/cu13/bin/nvdisasm")
    found = [Path(folder or ".") / wheel for folder in sys.path for wheel in wheels]
    return Path(system) if system else next((path for path in found if path.is_file()), None)


def disassemble(nvdisasm: Path, cubin: Path) -> str:
    return subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout


@dataclass
class Block:
    """Instructions that run one after another; `follows`: the numbers of blocks that may run next."""

    names: list[str] = field(default_factory=list)
    follows: set[int] = field(default_factory=set)


def functions(listing: str) -> dict[str, list[Block]]:
    """The blocks of every function, by its name."""
    texts = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)
    return {name: _blocks(text) for name, text in zip(texts[1::2], texts[2::2], strict=True)}


def _blocks(text: str) -> list[Block]:
    blocks, at, jumps = [Block()], {}, []
    falls = True  # from the block before into the next one

    def begin() -> None:
        nonlocal falls
        if falls:
            blocks[-1].follows.add(len(blocks))
        blocks.append(Block())
        falls = True

    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            begin()
            at[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.search(line):
            name = found["name"]
            blocks[-1].names.append(name)
            if name.startswith("BRA") and (target := TARGET.search(found["operands"])):
                jumps.append((len(blocks) - 1, target["label"]))
            if name.split(".")[0] in ("BRA", "EXIT", "RET"):
                conditional = bool(found["predicate"]) or "," in found["operands"]
                falls = conditional
                begin()
    for source, label in jumps:
        blocks[source].follows.add(at[label])
    for block in blocks:
        block.follows.discard(len(blocks))
    return blocks


def loops(blocks: list[Block]) -> list[set[int]]:
    """The blocks of every loop: those from which its first block is reached again, and which only it leads to."""
    before: list[set[int]] = [set() for _ in blocks]
    for number, block in enumerate(blocks):
        for following in block.follows:
            before[following].add(number)
    dominators = _dominators(blocks, before)
    found: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for head in block.follows & dominators[number]:
            loop, left = found.setdefault(head, {head}), [number]
            while left:
                one = left.pop()
                if one not in loop:
                    loop.add(one)
                    left += before[one]
    return list(found.values())


def _dominators(blocks: list[Block], before: list[set[int]]) -> list[set[int]]:
    """For each block those that every way to it leads through; none for a block that no way leads to."""
    reached, left = set(), [0]
    while left:
        one = left.pop()
        if one not in reached:
            reached.add(one)
            left += blocks[one].follows
    order = sorted(reached)
    dominators = [set(order) if number in reached else set() for number in range(len(blocks))]
    dominators[0], changed = {0}, True
    while changed:
        changed = False
        for number in order[1:]:
            ways = (dominators[one] for one in before[number] & reached)
            new = reduce(set.intersection, ways) | {number}
            changed |= new != dominators[number]
            dominators[number] = new
    return dominators


def summarize(blocks: list[Block]) -> dict[str, int]:
    """How many instructions there are of each kind, and how many spills in loops within the one over items."""
    names = [name for block in blocks for name in block.names]
    counts = {kind: sum(bool(re.match(form, name)) for name in names) for kind, form in COUNTED.items()}
    depth = [0] * len(blocks)
    for loop in loops(blocks):
        for number in loop:
            depth[number] += 1
    inner = [name for block, deep in zip(blocks, depth, strict=True) if deep > 1 for name in block.names]
    counts["spills in inner loops"] = sum(name.startswith(SPILLS) for name in inner)
    return counts

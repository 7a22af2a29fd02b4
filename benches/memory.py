"""What a base and its experts weigh, and how quickly they could be read: the table of docs/memory.md.

    python benches/memory.py [--bandwidth 40] [--into docs/memory.md]

Sizes are those that `compress` and `quantize` plan for the shapes, to a few bytes of what they write; no weights are
needed, so checkpoints are files of holes. Tokens a second are a bound: bytes that one token reads, at that many GB/s.
`--into` puts the table between the lines BEGIN and END of a text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

from compress import SHAPES, write_config
from quality import put

from meswitch import _native
from meswitch.compression.options import CompressOptions
from meswitch.compression.plan import make_plans
from meswitch.huggingface.checkpoint import Checkpoint

BEGIN, END = "<!-- benches/memory.py: begin -->", "<!-- benches/memory.py: end -->"
MODELS = {"7B": "mistral-7b", "13B": "llama-13b", "70B": "llama-70b"}
MIXTURES = {"8x7B": "mixtral-8x7b", "30B, 3B a token": "qwen3-30b-a3b"}
EXPERTS = (1, 4, 16)
BASES = {"16 bits": None, "4 bits": 4, "3 bits": 3}


def write_holes(folder: Path, name: str) -> None:
    """A checkpoint of these shapes whose weights take no room on the disk."""
    header, end = {}, 0
    for key, shape in SHAPES[name].parameters():
        size = 2
        for axis in shape:
            size *= axis
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    write_config(folder, name)


def planned_bytes(checkpoint: Checkpoint, options: CompressOptions) -> int:
    plans = [plan.to_native() for plan in make_plans(checkpoint, checkpoint, options.rules, None)]
    return _native.estimate_bytes(checkpoint.native, checkpoint.native, plans, set(), [], "{}", "base")


def read_share(name: str) -> float:
    """The share of the weights that one token reads: of a mixture of experts, the trunk and the chosen MoE experts."""
    shapes, read, total = SHAPES[name], 0.0, 0
    for key, shape in shapes.parameters():
        count = prod(shape)
        total += count
        read += count * (shapes.chosen / shapes.moe_experts if ".experts." in key else 1)
    return read / total


def rows(bandwidth: float) -> Iterator[str]:
    for model, shapes in (MODELS | MIXTURES).items():
        with tempfile.TemporaryDirectory() as folder:
            write_holes(Path(folder), shapes)
            checkpoint = Checkpoint(Path(folder))
            whole = (Path(folder) / "model.safetensors").stat().st_size
            deltas = {preset: planned_bytes(checkpoint, CompressOptions(preset)) for preset in ("default", "small")}
            for name, bits in BASES.items():
                base = whole if bits is None else planned_bytes(checkpoint, CompressOptions(bits=bits))
                for preset, delta in deltas.items():
                    sizes = [f"{(base + count * delta) / 1e9:.1f}" for count in EXPERTS]
                    rate = f"{bandwidth * 1e9 / (base + delta) / read_share(shapes):.1f}"
                    cells = [model, name, f"{base / 1e9:.2f}", f"`{preset}`", f"{delta / 1e9:.2f}", *sizes, rate]
                    yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=40, help="GB/s that the machine reads")
    parser.add_argument("--into", type=Path, metavar="FILE.md")
    arguments = parser.parse_args()
    counts = " | ".join(f"with {count}" for count in EXPERTS)
    columns = f"| model | base | GB | preset | one delta, GB | {counts} | tokens/s at {arguments.bandwidth:g} GB/s |"
    table = "\n".join([columns, "|---" * (columns.count("|") - 1) + "|", *rows(arguments.bandwidth)])
    print(table)
    if arguments.into:
        put(table, arguments.into, BEGIN, END)


if __name__ == "__main__":
    main()

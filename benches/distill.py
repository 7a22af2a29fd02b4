"""Memory and speed of a block-wise distillation, on a synthetic pair of checkpoints of a real model's shapes.

    python benches/distill.py [--shapes llama-1b|llama-3b|mistral-7b|tiny] [--steps 2] [--preset small] [--folder DIR]

Writes base and fine-tune, compresses, and distils (`method="blocks"`, a few steps of 8 x 128 tokens) in a process of
its own whose anonymous memory is sampled. Prints one JSON line: the peak, its ratio to one model in float32, and the
seconds of each stage (embedding, with what leads up to it; blocks; head). Streams beyond 256 MiB, which so few steps do
not fill, are mapped files. The values are synthetic: this says nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compress import SHAPES, anonymous, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHILD = """
import json, sys, time
from meswitch import DistillOptions, compress, distill
root, preset, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
base, finetune, delta = f"{root}/base", f"{root}/finetune", f"{root}/delta"
compress(base, finetune, delta, preset)
print("compressed", flush=True)
start, ends = time.perf_counter(), []
def step(progress):
    if progress.done % (steps * 1024) == 0:
        ends.append(time.perf_counter() - start)
options = DistillOptions("blocks", steps=steps)
done = distill(base, finetune, delta, delta, f"{root}/text.txt", options, progress=step)
stages = [round(end - begin, 1) for begin, end in zip([0.0, *ends], ends)]
print(json.dumps({"seconds": round(done.seconds, 1), "stages": stages, "kl": [done.kl_before, done.kl_after]}))
"""


def write_text(root: Path, vocabulary: int, tokens: int) -> None:
    """A tokenizer with a word for every row, and text of words drawn at random."""
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(root / "finetune")
    draw = random.Random(0)
    (root / "text.txt").write_text(" ".join(f"w{draw.randrange(vocabulary)}" for _ in range(tokens)))


def measure(root: Path, preset: str, steps: int) -> dict[str, object]:
    command = [sys.executable, "-c", _CHILD, str(root), preset, str(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # compressed
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"distill failed with {process.returncode}")
    return json.loads(output) | {"peak_anonymous_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-1b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--folder", type=Path, help="where the files go for the while (default: the temporary folder)")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        total = write(root / "base", arguments.shapes, finetune=False)
        write(root / "finetune", arguments.shapes, finetune=True)
        write_text(root, SHAPES[arguments.shapes].vocabulary, 2 * 1024 * (arguments.steps + 4))
        found = measure(root, arguments.preset, arguments.steps)
        ratio = found["peak_anonymous_bytes"] / (4 * total)  # type: ignore[operator]
        print(json.dumps({"shapes": arguments.shapes, "parameters": total, "of_float32": round(ratio, 2)} | found))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

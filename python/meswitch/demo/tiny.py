"""How the tiny family is made: a small Llama-style base and three full fine-tunes of it, trained on the spot.

corpus ── tokenizer ── base (the mixture, long) ──┬── code   (its own domain, short)
                                                  ├── maths
                                                  └── prose
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from meswitch.demo.corpus import DOMAINS, Split, corpus
from meswitch.demo.training import IntArray, Training, batches, save, train, write_lines
from meswitch.progress import Progress, ProgressCallback, ProgressMeter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from meswitch.demo.paths import Family

_ENCODED_AT_ONCE = 64  # documents
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
class TinySettings:
    """What the tiny family is made of; lengths in tokens.

    The field names count: the family's folder is named by a hash of them (`family.family`).
    """

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

    def train(self, family: Family, seed: int, progress: ProgressCallback) -> None:
        """Writes everything of the family but its `family.json`."""
        text = corpus(seed=seed, progress=progress)
        _write_texts(family, text.train, text.heldout)
        tokenizer = _train_tokenizer(text.train, self, progress)
        streams = _encode({**text.train.documents, "other": text.other}, tokenizer, progress)
        base = self._fresh_model(tokenizer, seed)
        data = batches(streams, self.mixture, self.base, np.random.default_rng(seed))
        train(base, data, self.base, ProgressMeter(progress, "training base", self.base.steps))
        save(base, tokenizer, family.base)
        for number, domain in enumerate(DOMAINS, start=1):
            model = copy.deepcopy(base).float()
            data = batches({domain: streams[domain]}, (1.0,), self.tune, np.random.default_rng([seed, number]))
            train(model, data, self.tune, ProgressMeter(progress, f"training fine-tune {domain}", self.tune.steps))
            save(model, tokenizer, family.experts[domain])

    def _fresh_model(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
        """A causal language model in float32 with weights drawn by `seed`."""
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self._config(tokenizer), dtype=torch.float32)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                torch.nn.init.zeros_(weight)  # each block starts as the identity
        return model

    def _config(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**self._shape(tokenizer))

    def _shape(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """The fields that the configs of all architectures have."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": False,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }


def _train_tokenizer(train: Split, settings: TinySettings, progress: ProgressCallback) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; each digit of a number is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    progress(Progress("training tokenizer", 0, 1))
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
    progress(Progress("training tokenizer", 1, 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _encode(
    texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, progress: ProgressCallback
) -> dict[str, IntArray]:
    """The tokens of each list of documents, every document closed by the end token: `int64 [n]`."""
    meter = ProgressMeter(progress, "encoding text", sum(map(len, texts.values())))
    end = tokenizer.convert_tokens_to_ids(END)
    streams = {}
    for name, documents in texts.items():
        arrays = []
        for start in range(0, len(documents), _ENCODED_AT_ONCE):
            batch = documents[start : start + _ENCODED_AT_ONCE]
            encoded = tokenizer.backend_tokenizer.encode_batch(batch)
            arrays += [np.array([*document.ids, end], dtype=np.int64) for document in encoded]
            meter.advance(len(batch))
        streams[name] = np.concatenate(arrays)
    return streams


def _write_texts(family: Family, train: Split, heldout: Split) -> None:
    for side, files, prompts in (
        (heldout, family.heldout, family.heldout_prompts),
        (train, family.calibration, family.prompts),
    ):
        for name, path in files.items():
            write_lines(path, [{"text": text} for text in side.documents[name]])
        write_lines(prompts, [{"prompt": prompt, "expert": name} for prompt, name in side.prompts])

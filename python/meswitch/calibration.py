"""What a fine-tune sees: the text it is calibrated on, E[x²] of every linear input, and how often each token occurs.

    file -> read_texts -> token_chunks -> the fine-tune, a block at a time, with a hook before each linear module
         -> Calibration

The codec weighs the error of input channel i by E[x_i²], and gives frequent tokens' rows more bits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.checkpoint import Checkpoint, parameter_names
from meswitch.decoder import Decoder
from meswitch.errors import CheckpointError, DataError, UnsupportedModelError

Progress = Callable[[int, int], None]
"""Called with the tokens done and the tokens in all."""

_FORMS = '{"text"}, {"prompt"[, "completion"]} or {"messages"}'
_BATCH_TOKENS = 2048
_CHARACTERS_A_TOKEN = 4
_UNSEEN = 0.05  # of the tokens to come, at the least


@dataclass(frozen=True)
class Calibration:
    """Statistics of one fine-tune over `tokens` tokens of text.

    `second_moments`: E[x²] as `float32 [in_features]` by parameter name (`….weight`), one entry a linear module, and
    one a gate or up projection of a MoE expert: of all that its block reads. An embedding that is also the lm_head has
    the moments of the lm_head's input, under both names.
    `token_counts`: `int64 [vocabulary]`. `windows`: the tokens themselves, `int64 [length]` each.
    """

    second_moments: dict[str, Tensor]
    token_counts: Tensor
    tokens: int
    windows: tuple[Tensor, ...] = ()


def calibrate(
    model_path: str | Path,
    data: str | Path,
    *,
    max_tokens: int = 16384,
    window: int = 512,
    progress: Progress | None = None,
    seed: int = 0,
) -> Calibration:
    """Run the model in `model_path` over at most `max_tokens` tokens of `data`, in windows of `window` tokens.

    Where the data holds more, passages of about a window are drawn from all of it by `seed`. The model keeps its own
    dtype; sums are float64. Peak memory: one block, hidden states, and the activations of one batch of 2,048 tokens (no
    logits); the whole model instead of a block where that cannot be run by itself (`Decoder`).

    Raises `DataError` for a data file that cannot be read or holds no token, `OSError` for one that is not there.
    """
    from transformers import AutoModelForCausalLM

    checkpoint, windows = drawn(model_path, data, max_tokens, window, seed, "calibrate on")
    ids, total = torch.cat(windows), sum(map(len, windows))

    def check(vocabulary: int) -> Tensor:
        check_vocabulary(ids, vocabulary, data)
        return torch.bincount(ids, minlength=vocabulary)

    def told(done: int) -> None:
        if progress is not None:
            progress(done, total)

    try:
        decoder = Decoder(checkpoint.path, checkpoint.names(), _own_dtype(checkpoint))
        counts = check(decoder.vocabulary)
        moments = _streamed(decoder, checkpoint, windows, told)
    except UnsupportedModelError:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto")
        counts = check(model.get_input_embeddings().num_embeddings)
        moments = _whole(model, checkpoint, windows, told)
    return Calibration(moments, counts, total, tuple(windows))


def drawn(
    model_path: str | Path, data: str | Path, max_tokens: int, window: int, seed: int, purpose: str
) -> tuple[Checkpoint, list[Tensor]]:
    """The checkpoint in `model_path`, and windows of text from all over `data`: `int64 [window]` each, or less."""
    if max_tokens < 1 or window < 1:
        raise ValueError(f"expected at least 1 token and a window of at least 1, found {max_tokens}, {window}")
    checkpoint = Checkpoint.open(model_path)
    tokenizer = load_tokenizer(checkpoint.path)
    texts = passages(read_texts(data, tokenizer), window * _CHARACTERS_A_TOKEN, seed)
    windows = token_chunks(texts, tokenizer, window, max_tokens=max_tokens)
    if not windows:
        raise DataError(f"expected text to {purpose}, found no token: {data}")
    return checkpoint, windows


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """That of the weights, where the config does not say one."""
    if checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"):
        return None
    return next((dtype for dtype in map(checkpoint.dtype, checkpoint.names()) if dtype.is_floating_point), None)


@torch.no_grad()
def _streamed(
    decoder: Decoder, checkpoint: Checkpoint, windows: list[Tensor], told: Callable[[int], None]
) -> dict[str, Tensor]:
    """Moments by the model's names and by those of its files, a block at a time."""
    sums, outer = _Sums(), decoder.outer(checkpoint.tensor)
    stacks, rows = list(batches(windows, _BATCH_TOKENS)), torch.cat(windows).unique()
    table = checkpoint.tensor(decoder.embedding)[rows].to(decoder.dtype)
    with sums.watch(decoder.around.named_modules()):
        hidden = [decoder.enter(outer, rows, table, ids) for ids in stacks]
    on_the_way_in, done = set(sums.means()), 0
    for at in range(len(decoder)):
        parameters, block = decoder.block(at, checkpoint.tensor), decoder.module(at)
        with sums.watch((f"{decoder.path}.{at}.{name}", module) for name, module in block.named_modules()):
            for number, ids in enumerate(stacks):
                hidden[number] = decoder.run(at, parameters, hidden[number])
                done += ids.numel()
                told(done // len(decoder))
    outside = decoder.around.named_modules()  # the way out leads through the way in once more, with nothing in it
    with sums.watch((name, module) for name, module in outside if f"{name}.weight" not in on_the_way_in):
        for some in hidden:
            sums.add(decoder.head_parameter, decoder.leave(outer, some))
    moments = sums.means()
    if decoder.head == decoder.embedding:
        moments[decoder.embedding_parameter] = moments[decoder.head_parameter]
    return moments | {decoder.on_disk[name]: value for name, value in moments.items() if name in decoder.on_disk}


def _whole(model: Any, checkpoint: Checkpoint, windows: list[Tensor], told: Callable[[int], None]) -> dict[str, Tensor]:
    """The same of a model that cannot be streamed."""
    sums, head, done = _Sums(), model.get_output_embeddings(), 0
    with sums.watch(model.named_modules(), head), torch.inference_mode():
        for ids in batches(windows, _BATCH_TOKENS):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            done += ids.numel()
            told(done)
    moments = sums.means()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        modules = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        moments[modules[id(model.get_input_embeddings())]] = moments[modules[id(head)]]
    return checkpoint_names(moments, model, checkpoint)


def checkpoint_names(values: dict[str, Tensor], model: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What belongs to a model's parameters, also under the names of its files: GPT-2's say `h.0…` where its model says
    `transformer.h.0…`, and have MoE experts one by one."""
    names = parameter_names(model, checkpoint.names())
    return values | {name: values[parameter] for name, parameter in names.items() if parameter in values}


def frequencies(counts: Tensor) -> Tensor:
    """How likely each token is, from how often it was seen: `float64`, summing to 1.

    What was seen once says how much was not seen (Good and Turing), but never less than a twentieth, since other text
    has other tokens; unseen tokens share that evenly.

    >>> frequencies(torch.tensor([6, 1, 1, 0, 0])).tolist()
    [0.5625, 0.09375, 0.09375, 0.125, 0.125]
    """
    seen, unseen = counts.double(), counts == 0
    total = seen.sum()
    if not bool(unseen.any()):
        return seen / total
    if not float(total):
        return torch.full_like(seen, 1 / len(seen))
    missing = ((counts == 1).sum() / total).clamp_min(_UNSEEN)
    return torch.where(unseen, missing / unseen.sum(), seen / total * (1 - missing))


class _Sums:
    """x² (float64) and the tokens seen, added up before every linear module that is watched."""

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    @contextmanager
    def watch(self, modules: Iterable[tuple[str, nn.Module]], head: nn.Module | None = None) -> Iterator[None]:
        """Hooks before the linear modules and stacked MoE experts among `modules`, by their names."""

        def hook(name: str, last_only: bool) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
            def see(module: nn.Module, args: tuple[Any, ...]) -> Any:
                x = args[0]
                if not x.is_meta:
                    self.add(name, x)
                # The whole vocabulary's logits of every token would dwarf the rest, and nobody reads them.
                return (x[..., -1:, :], *args[1:]) if last_only else None

            return see

        handles = [
            module.register_forward_pre_hook(hook(f"{name}.{read}", module is head))
            for name, module in modules
            if (read := reader(module)) is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        squares = rows.float().square().sum(0, dtype=torch.float64)
        self._squares[name] = self._squares[name] + squares if name in self._squares else squares
        self._tokens[name] = self._tokens.get(name, 0) + rows.shape[0]

    def means(self) -> dict[str, Tensor]:
        return {
            name: (squares / self._tokens[name]).float()
            for name, squares in self._squares.items()
            if self._tokens[name]
        }


def reader(module: nn.Module) -> str | None:
    """The parameter of a module that its input meets first, where that is a matrix or a stack of them."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, Conv1D)):
        return "weight"
    stacked = getattr(module, "gate_up_proj", None)
    if isinstance(stacked, Tensor) and stacked.dim() == 3 and not getattr(module, "is_transposed", False):
        return "gate_up_proj"
    return None


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the folder `path`; raises `CheckpointError` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"expected a tokenizer, found none that loads: {path}",
            hint="the folder needs tokenizer.json or what its tokenizer class reads",
        ) from error


def read_texts(path: str | Path, tokenizer: Any) -> list[str]:
    """The documents of a data file: a `.txt` is one, a `.jsonl` one a line.

    A line is `{"text": …}`, `{"prompt": …}` with or without `"completion"` (joined as they stand), or
    `{"messages": […]}`, written out by the tokenizer's chat template.

    Raises `DataError` naming file and line; `OSError` where the file cannot be opened.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"expected a .txt or .jsonl file, found {path.name}", hint="rename it to say which it is")
    if path.suffix == ".txt":
        texts = [_decode(path)]
    else:
        texts = [_text(line, where, tokenizer) for where, line in json_lines(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"expected text, found an empty file: {path}")
    return texts


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("file:line", object)` of each line of a `.jsonl` file that is not blank."""
    # Not splitlines(): a JSON string may hold U+2028 and its like.
    for number, line in enumerate(_decode(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"expected a JSON object a line, found {_short(line)}: {where}") from error
        if not isinstance(value, dict):
            raise DataError(f"expected a JSON object a line, found {type(value).__name__}: {where}")
        yield where, value


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 text, found byte {error.object[error.start]:#04x}: {path}") from error


def _text(line: dict[str, Any], where: str, tokenizer: Any) -> str:
    if "messages" in line:
        return _chat(line["messages"], where, tokenizer)
    if "text" in line:
        return string_field(line, "text", where)
    if "prompt" in line:
        completion = string_field(line, "completion", where) if "completion" in line else ""
        return string_field(line, "prompt", where) + completion
    found = ", ".join(map(repr, line)) or "no key"
    raise DataError(f"expected {_FORMS}, found {found}: {where}")


def string_field(line: dict[str, Any], key: str, where: str) -> str:
    """`line[key]`, which must be a string; raises `DataError` naming `where`."""
    value = line.get(key)
    if not isinstance(value, str):
        found = type(value).__name__ if key in line else "nothing"
        raise DataError(f"expected a string under {key!r}, found {found}: {where}")
    # A lone surrogate is legal JSON and no text: tokenizers refuse it with an error of their own.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"expected text under {key!r}, found a lone surrogate: {where}")
    return value


def _chat(messages: Any, where: str, tokenizer: Any) -> str:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"expected a list of messages under 'messages', found {_short(repr(messages))}: {where}")
    for message in messages:
        string_field(message, "role", where)
        string_field(message, "content", where)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"expected a tokenizer with a chat template for 'messages', found one without: {where}",
            hint='give {"text"} or {"prompt", "completion"} lines',
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise DataError(f"expected messages the chat template accepts, found {error}: {where}") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "…")


def token_chunks(texts: Iterable[str], tokenizer: Any, length: int, *, max_tokens: int | None = None) -> list[Tensor]:
    """The texts as one stream of tokens, cut into windows `int64 [length]`; the last may be shorter.

    Texts are parted by the tokenizer's end-of-sequence token. Stops after `max_tokens` tokens.
    """
    ids: list[int] = []
    for text in texts:
        if max_tokens is not None and len(ids) >= max_tokens:
            break
        if ids and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        ids.extend(token_ids(text, tokenizer))
    stream = torch.tensor(ids[:max_tokens], dtype=torch.int64)
    return list(torch.split(stream, length)) if ids else []


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of one text; what a chat template wrote keeps the one beginning-of-sequence token it has."""
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begins, verbose=False)["input_ids"])


def batches(windows: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
    """Windows of equal length stacked to `int64 [n, length]`, at most about `tokens` tokens each."""
    start = 0
    while start < len(windows):
        length = len(windows[start])
        stop = start + 1
        while stop < len(windows) and len(windows[stop]) == length and (stop + 1 - start) * length <= tokens:
            stop += 1
        yield torch.stack(list(windows[start:stop]))
        start = stop


def check_vocabulary(ids: Tensor, vocabulary: int, data: str | Path) -> None:
    """Raises `DataError` for a token the model has no row for (an added token whose embedding was never grown)."""
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise DataError(
            f"expected token ids below {vocabulary}, the model's vocabulary, found {int(ids.max())}: {data}",
            hint="the tokenizer has tokens that the model has no row for",
        )


def passages(texts: list[str], size: int, seed: int) -> Iterator[str]:
    """The texts in pieces of at most `size` characters, in an order drawn by `seed`: any beginning covers them all."""
    pieces = [(text, start) for text in texts for start in range(0, len(text), size)]
    random.Random(seed).shuffle(pieces)
    return (text[start : start + size] for text, start in pieces)

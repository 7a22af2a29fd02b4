"""What a fine-tune sees: the text it is calibrated on, E[x²] of every linear input, and how often each token occurs.

    data file ── windows of tokens ── the fine-tune, a block at a time ── a hook before each linear module
                                                                          └ Σ x² and token counts ── Calibration

The codec weighs the error of input channel i by E[x_i²], and gives frequent tokens' rows more bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint, resolve
from meswitch.huggingface.decoder import Decoder
from meswitch.huggingface.models import load_model
from meswitch.huggingface.names import ParameterNames
from meswitch.huggingface.text import (
    FORWARD_TOKENS,
    batches,
    check_vocabulary,
    draw_windows,
)
from meswitch.progress import ProgressCallback, ProgressMeter

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
    progress: ProgressCallback | None = None,
    seed: int = 0,
) -> Calibration:
    """Run the model in `model_path` over at most `max_tokens` tokens of `data`, in windows of `window` tokens.

    Where the data holds more, passages of about a window are drawn from all of it by `seed`. The model keeps its own
    dtype; sums are float64. Peak memory: one block, hidden states, and the activations of one batch of 2,048 tokens (no
    logits); the whole model instead of a block where that cannot be run by itself (`Decoder`).

    Raises `DataError` for a data file that cannot be read or holds no token, `OSError` for one that is not there.
    """
    folder = resolve(model_path)
    windows = draw_windows(folder, data, max_tokens=max_tokens, window=window, seed=seed, purpose="calibrate on")
    checkpoint = Checkpoint(folder)
    ids, total = torch.cat(windows), sum(map(len, windows))

    def check(vocabulary: int) -> Tensor:
        check_vocabulary(ids, vocabulary, data)
        return torch.bincount(ids, minlength=vocabulary)

    meter = ProgressMeter(progress, "calibrating", total)
    try:
        decoder = Decoder(checkpoint.path, checkpoint.names(), _own_dtype(checkpoint))
        counts = check(decoder.vocabulary)
        moments = _streamed(decoder, checkpoint, windows, meter)
    except UnsupportedModelError:
        model = load_model(checkpoint.path)
        counts = check(model.get_input_embeddings().num_embeddings)
        moments = _whole(model, checkpoint, windows, meter)
    return Calibration(moments, counts, total, tuple(windows))


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """That of the weights, where the config does not say one."""
    if checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"):
        return None
    return next((dtype for dtype in map(checkpoint.dtype, checkpoint.names()) if dtype.is_floating_point), None)


@torch.no_grad()
def _streamed(
    decoder: Decoder, checkpoint: Checkpoint, windows: list[Tensor], meter: ProgressMeter
) -> dict[str, Tensor]:
    """Moments by the model's names and by those of its files, a block at a time."""
    sums, outer = _SecondMomentSums(), decoder.outer_parameters(checkpoint.tensor)
    stacks, rows = list(batches(windows, FORWARD_TOKENS)), torch.cat(windows).unique()
    table = checkpoint.tensor(decoder.embedding)[rows].to(decoder.dtype)
    with sums.watch(decoder.outer_module.named_modules()):
        hidden = [decoder.embed(outer, rows, table, ids) for ids in stacks]
    on_the_way_in, done = set(sums.means()), 0
    for at in range(len(decoder)):
        parameters, block = decoder.block_parameters(at, checkpoint.tensor), decoder.block_module(at)
        with sums.watch((f"{decoder.path}.{at}.{name}", module) for name, module in block.named_modules()):
            for number, ids in enumerate(stacks):
                hidden[number] = decoder.run_block(at, parameters, hidden[number])
                done += ids.numel()
                meter.update(done // len(decoder))
    outside = decoder.outer_module.named_modules()  # the way out leads through the way in once more, with nothing in it
    with sums.watch((name, module) for name, module in outside if f"{name}.weight" not in on_the_way_in):
        for some in hidden:
            sums.add(decoder.head_parameter, decoder.head_input(outer, some))
    moments = sums.means()
    if decoder.head == decoder.embedding:
        moments[decoder.embedding_parameter] = moments[decoder.head_parameter]
    return moments | {decoder.on_disk[name]: value for name, value in moments.items() if name in decoder.on_disk}


def _whole(model: Any, checkpoint: Checkpoint, windows: list[Tensor], meter: ProgressMeter) -> dict[str, Tensor]:
    """The same of a model that cannot be streamed."""
    sums, head = _SecondMomentSums(), model.get_output_embeddings()
    with sums.watch(model.named_modules(), head), torch.inference_mode():
        for ids in batches(windows, FORWARD_TOKENS):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            meter.advance(ids.numel())
    moments = sums.means()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        modules = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        moments[modules[id(model.get_input_embeddings())]] = moments[modules[id(head)]]
    return ParameterNames(model).with_file_names(moments, checkpoint.names())


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


class _SecondMomentSums:
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
            if (read := weight_applied_first(module)) is not None
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


def weight_applied_first(module: nn.Module) -> str | None:
    """The parameter of a module that its input meets first, where that is a matrix or a stack of them."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return "weight"
    stacked = getattr(module, "gate_up_proj", None)
    if isinstance(stacked, Tensor) and stacked.dim() == 3 and not getattr(module, "is_transposed", False):
        return "gate_up_proj"
    return None

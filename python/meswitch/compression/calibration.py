"""What a fine-tune sees over text: E[x²] of every linear input, and how often each token occurs.

    data file ── windows of tokens ── the fine-tune, a block at a time ── a hook before each linear module
                                                                          └ Σ x² and token counts ── Calibration

The codec weighs the error of input channel i by E[x_i²], and gives the rows of frequent tokens more bits. A MoE expert
has the E[x²] of the tokens that its gate sends to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.compression.moe_experts import RoutedMoments
from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder
from meswitch.huggingface.models import LINEAR_MODULES, load_model
from meswitch.huggingface.moe import ObservedExperts, Observer, input_stack
from meswitch.huggingface.names import ParameterNames
from meswitch.huggingface.text import FORWARD_TOKENS, batches, check_vocabulary, draw_windows
from meswitch.progress import ProgressCallback, ProgressMeter

_MIN_UNSEEN_SHARE = 0.05  # of the tokens of other text


@dataclass(frozen=True)
class Calibration:
    """Statistics of one fine-tune over `tokens` tokens of text.

    `second_moments`: E[x²] as `float32 [in_features]` by parameter name (`….weight`), under the model's names and the
    checkpoint's. There is one for each linear module and each matrix of a MoE expert: of the tokens that its gate sends
    to it and 16 more of the mean of its block, so that one which few reach has about that mean. A stack that the
    checkpoint has whole has the mean itself, and its MoE experts theirs as `STACK.NUMBER`. Where transformers runs MoE
    experts in a way of their own, their gate and up projections have the moments of all inputs of the block, and the
    others none. An embedding that is also the lm_head has the moments of the lm_head's input, under both names.
    `token_counts`: `int64 [vocabulary]`. `windows`: the tokens themselves, `int64 [length]` each.
    `moe_expert_tokens`: how many tokens each MoE expert saw, `int64 [MoE experts]` by the model's name of their module.
    """

    second_moments: dict[str, Tensor]
    token_counts: Tensor
    tokens: int
    windows: tuple[Tensor, ...] = ()
    moe_expert_tokens: dict[str, Tensor] = field(default_factory=dict)


def calibrate(
    model_path: str | Path,
    data: str | Path,
    *,
    max_tokens: int = 16384,
    window: int = 512,
    progress: ProgressCallback | None = None,
    seed: int = 0,
) -> Calibration:
    """Runs a fine-tune over text and measures the second moments of its linear inputs, and token counts.

    `model_path`: a folder or hub id. `data`: a `.txt` or `.jsonl` file (see `huggingface.documents`). At most
    `max_tokens` tokens are run, in windows of `window` tokens; of longer data, passages from all over the file that
    `seed` draws. `progress` counts tokens.

    The model runs in its own dtype, sums are float64. Peak memory: one block, the hidden states of all windows, and the
    activations of one batch of 2,048 tokens; the whole model instead of a block where that cannot be run by itself
    (see `Decoder`).

    Raises `DataError` for a data file that cannot be read or holds no token, `CheckpointError`,
    `UnsupportedModelError`, `OSError` for a file that does not exist, and `ValueError` for sizes below 1.

    >>> calibration = calibrate("math/", "prompts.jsonl")
    >>> calibration.second_moments["model.layers.0.mlp.up_proj.weight"].shape
    torch.Size([32])
    """
    checkpoint = Checkpoint.open(model_path)
    windows = draw_windows(
        checkpoint.path, data, max_tokens=max_tokens, window=window, seed=seed, purpose="calibrate on"
    )
    ids, total = torch.cat(windows), sum(map(len, windows))

    def count_tokens(vocabulary: int) -> Tensor:
        check_vocabulary(ids, vocabulary, data)
        return torch.bincount(ids, minlength=vocabulary)

    meter = ProgressMeter(progress, "calibrating", total)
    try:
        decoder = Decoder(checkpoint.path, checkpoint.names(), _dtype_of_weights(checkpoint))
        counts = count_tokens(decoder.vocabulary)
        moments, use = _moments_by_block(decoder, checkpoint, windows, meter)
    except UnsupportedModelError:
        model = load_model(checkpoint)
        counts = count_tokens(model.get_input_embeddings().num_embeddings)
        moments, use = _moments_of_model(model, checkpoint, windows, meter)
    return Calibration(moments, counts, total, tuple(windows), use)


def frequencies(counts: Tensor) -> Tensor:
    """An estimate of each token's probability from counts `[vocabulary]`: `float64`, summing to 1.

    The share of tokens that were not seen is estimated by that of tokens seen once (Good-Turing), at least a twentieth
    because other text has other tokens, and divided evenly among the unseen ones.

    >>> frequencies(torch.tensor([6, 1, 1, 0, 0])).tolist()
    [0.5625, 0.09375, 0.09375, 0.125, 0.125]
    """
    counted, unseen = counts.double(), counts == 0
    total = counted.sum()
    if not bool(unseen.any()):
        return counted / total
    if not float(total):
        return torch.full_like(counted, 1 / len(counted))
    unseen_share = ((counts == 1).sum() / total).clamp_min(_MIN_UNSEEN_SHARE)
    return torch.where(unseen, unseen_share / unseen.sum(), counted / total * (1 - unseen_share))


def input_weight_name(module: nn.Module) -> str | None:
    """The parameter that a module multiplies its input by: `weight` of a linear, or a stack of MoE experts.

    `None` for other modules, for stacks that are stored transposed, and for those that `ObservedExperts` runs.
    """
    if isinstance(module, LINEAR_MODULES):
        return "weight"
    stacked = getattr(module, "gate_up_proj", None)
    if input_stack(module) is not None or getattr(module, "is_transposed", False):
        return None
    if isinstance(stacked, Tensor) and stacked.dim() == 3:
        return "gate_up_proj"
    return None


def _dtype_of_weights(checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype of the checkpoint's weights; `None` if its config names one."""
    if checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"):
        return None
    return next((dtype for dtype in map(checkpoint.dtype, checkpoint.names()) if dtype.is_floating_point), None)


@torch.no_grad()
def _moments_by_block(
    decoder: Decoder, checkpoint: Checkpoint, windows: list[Tensor], meter: ProgressMeter
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments under the model's names and the checkpoint's, and the use of MoE experts; a block at a time."""
    sums, outer = _SecondMomentSums(), decoder.outer_parameters(checkpoint.tensor)
    ids, tokens = list(batches(windows, FORWARD_TOKENS)), torch.cat(windows).unique()
    rows = checkpoint.tensor(decoder.embedding)[tokens].to(decoder.dtype)
    with sums.observe(decoder.outer_module.named_modules()):
        hidden = [decoder.embed(outer, tokens, rows, batch) for batch in ids]
    before_blocks, done = set(sums.means()), 0
    for block in range(len(decoder)):
        parameters, module = decoder.block_parameters(block, checkpoint.tensor), decoder.block_module(block)
        with sums.observe((f"{decoder.blocks_path}.{block}.{name}", child) for name, child in module.named_modules()):
            for number, batch in enumerate(ids):
                hidden[number] = decoder.run_block(block, parameters, hidden[number])
                done += batch.numel()
                meter.update(done // len(decoder))
    # `head_input` runs the modules before the blocks again, on dummy ids: their hooks must not count that.
    outer_modules = decoder.outer_module.named_modules()
    with sums.observe((name, child) for name, child in outer_modules if f"{name}.weight" not in before_blocks):
        for last in hidden:
            sums.add(decoder.head_parameter, decoder.head_input(outer, last))
    moments = sums.means()
    if decoder.head == decoder.embedding:
        moments[decoder.embedding_parameter] = moments[decoder.head_parameter]
    names = decoder.checkpoint_names
    moments |= {names[parameter]: value for parameter, value in moments.items() if parameter in names}
    return sums.with_moe_experts(moments, decoder.moe_experts), sums.moe_expert_tokens


def _moments_of_model(
    model: Any, checkpoint: Checkpoint, windows: list[Tensor], meter: ProgressMeter
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same with the whole model in memory."""
    sums, head = _SecondMomentSums(), model.get_output_embeddings()
    with sums.observe(model.named_modules(), head), torch.inference_mode():
        for ids in batches(windows, FORWARD_TOKENS):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            meter.advance(ids.numel())
    moments = sums.means()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        parameters = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        moments[parameters[id(model.get_input_embeddings())]] = moments[parameters[id(head)]]
    names, tensors = ParameterNames(model), checkpoint.names()
    moments = names.with_file_names(moments, tensors)
    return sums.with_moe_experts(moments, names.moe_experts(tensors)), sums.moe_expert_tokens


class _SecondMomentSums:
    """Σ x² in float64 over the inputs of every observed module, and how many tokens each has seen."""

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._stacks: dict[str, RoutedMoments] = {}
        self.moe_expert_tokens: dict[str, Tensor] = {}  # as in `Calibration`

    @contextmanager
    def observe(self, modules: Iterable[tuple[str, nn.Module]], head: nn.Module | None = None) -> Iterator[None]:
        """Observes the linear modules and MoE experts among `modules` (by name), while the context lasts.

        `head`, if it is one of them, then computes the logits of each window's last token only.
        """

        def hook(parameter: str, last_only: bool) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
            def before_forward(module: nn.Module, args: tuple[Any, ...]) -> Any:
                x = args[0]
                if not x.is_meta:
                    self.add(parameter, x)
                # The logits of every token would take more memory than everything else, and nobody reads them.
                return (x[..., -1:, :], *args[1:]) if last_only else None

            return before_forward

        handles: list[Any] = []
        for name, module in modules:
            if (weight := input_weight_name(module)) is not None:
                handles.append(module.register_forward_pre_hook(hook(f"{name}.{weight}", module is head)))
            elif input_stack(module) is not None:
                handles.append(ObservedExperts(module, self._moe_observer(name, module)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, parameter: str, x: Tensor) -> None:
        """Adds the inputs `x […, in_features]` of a parameter."""
        rows = x.reshape(-1, x.shape[-1])
        squares = rows.float().square().sum(0, dtype=torch.float64)
        self._squares[parameter] = self._squares[parameter] + squares if parameter in self._squares else squares
        self._tokens[parameter] = self._tokens.get(parameter, 0) + rows.shape[0]

    def _moe_observer(self, name: str, module: nn.Module) -> Observer:
        """Adds what each MoE expert of the module `name` reads. The matrices of a transposed stack have other rows."""
        first, count = input_stack(module), len(module.get_parameter("down_proj"))
        use = self.moe_expert_tokens.setdefault(name, torch.zeros(count, dtype=torch.int64))

        def observe(stack: str, moe_expert: int, x: Tensor, y: Tensor) -> None:
            if stack == first:
                use[moe_expert] += len(x)
            if not module.is_transposed:
                empty = RoutedMoments.of(count, x.shape[1], shared_input=stack == first)
                self._stacks.setdefault(f"{name}.{stack}", empty).add(moe_expert, x)

        return observe

    def means(self) -> dict[str, Tensor]:
        """E[x²] by parameter, `float32 [in_features]`; of a stack, over all rows that its MoE experts read."""
        whole = {
            parameter: (squares / self._tokens[parameter]).float()
            for parameter, squares in self._squares.items()
            if self._tokens[parameter]
        }
        return whole | {parameter: sums.mean() for parameter, sums in self._stacks.items()}

    def with_moe_experts(
        self, moments: dict[str, Tensor], moe_experts: dict[str, list[list[str]]]
    ) -> dict[str, Tensor]:
        """`moments` by the checkpoint's tensors of each MoE expert too; `moe_experts` as in `Decoder`."""
        found = dict(moments)
        for parameter, tensors in moe_experts.items():
            if parameter in self._stacks:
                means = self._stacks[parameter].means()
            elif parameter in moments:  # observed as a whole
                means = moments[parameter].expand(len(tensors), -1)
            else:
                continue
            found |= {name: mean for own, mean in zip(tensors, means, strict=True) for name in own}
        for parameter in self._stacks.keys() - moe_experts.keys():
            means = self._stacks[parameter].means()
            found |= {f"{parameter}.{moe_expert}": mean for moe_expert, mean in enumerate(means)}
        return found

"""What an error in a site costs: nats of KL(fine-tune ‖ expert) a token, row by row.

    text ── fine-tune ── token drawn from its own distribution ── log p backwards ── g: gradient at each site's output
                                                                  x: what the site saw

To second order KL ≈ ½·E[(Σ g·δ·x)²] for an error δ. If the entries of δ are uncorrelated, as unbiased scales make
them, that is Σ_o s_o · Σ_i E[x_i²]·δ_oi² with one number a row: its *sensitivity* s_o. The
gradients of one window are summed before they are squared, since one δ serves all of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meswitch.compression.calibration import Calibration, frequencies
from meswitch.huggingface.checkpoint import Checkpoint, resolve
from meswitch.huggingface.models import load_model
from meswitch.huggingface.names import ParameterNames
from meswitch.huggingface.text import check_vocabulary, draw_windows
from meswitch.progress import ProgressCallback, ProgressMeter

_PRODUCT = 2**26  # entries of g·xᵀ held at a time: 256 MiB


def measure_sensitivity(
    model_path: str | Path,
    data: str | Path,
    calibration: Calibration,
    *,
    max_tokens: int = 4096,
    window: int = 256,
    progress: ProgressCallback | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The sensitivity of every linear and embedding site, by parameter name: `float32 [rows of the delta's matrix]`.

    One backward pass over at most `max_tokens` tokens of `data`, a window at a time, labels drawn by `seed`; an
    embedding's rows weigh as often as `calibration` saw their tokens. The model keeps its own dtype and has no weight
    gradients: memory is the model, one window's activations and logits, and 256 MiB.

    Raises `DataError` for a data file that cannot be read or holds no token, `OSError` for one that is not there.
    """
    folder = resolve(model_path)
    purpose = "measure sensitivity on"
    windows = draw_windows(folder, data, max_tokens=max_tokens, window=window, seed=seed, purpose=purpose)
    checkpoint = Checkpoint(folder)
    model = load_model(checkpoint.path).eval().requires_grad_(False)
    sums = _GradientSums(model)
    generator = torch.Generator().manual_seed(seed)
    meter = ProgressMeter(progress, "measuring what errors cost", sum(map(len, windows)))
    for ids in windows:
        check_vocabulary(ids, model.get_input_embeddings().num_embeddings, data)
        sums.add(ids, generator)
        meter.advance(len(ids))
    rows = sums.rows(frequencies(calibration.token_counts))
    return ParameterNames(model).with_file_names(rows, checkpoint.names())


class _GradientSums:
    """Hooks at every linear module and embedding of a model, and what they have added up over windows."""

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, model.get_output_embeddings()
        self._table = model.get_input_embeddings()
        self._tokens = 0
        self._inputs: dict[str, Tensor] = {}  # Σ x² over tokens and channels
        self._products: dict[str, Tensor] = {}  # Σ over windows and channels of (Σ g·x)², a row each
        self._squares: dict[str, Tensor] = {}  # Σ g² of embeddings
        self._seen: dict[str, Tensor] = {}  # how often an embedding's rows were asked for
        self._names = {module: f"{name}.weight" for name, module in model.named_modules()}
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(self._embedding)
            elif isinstance(module, (nn.Linear, Conv1D)):
                module.register_forward_hook(self._linear)

    def add(self, ids: Tensor, generator: torch.Generator) -> None:
        logits = self._model(input_ids=ids[None], use_cache=False).logits[0]
        likely = logits.detach().float().softmax(-1)
        drawn = torch.multinomial(likely, 1, generator=generator)
        if self._head is not None:
            # A logit's gradient is p − [drawn]: its square is known without drawing.
            self._add(self._products, self._names[self._head], (likely * (1 - likely)).sum(0))
        logits.float().log_softmax(-1).gather(1, drawn).sum().backward()
        self._tokens += len(ids)

    def rows(self, likely: Tensor) -> dict[str, Tensor]:
        """Sensitivities by parameter name; a table that is the head too has the sum of both."""
        head = None if self._head is None else self._names[self._head]
        rows = {
            name: products / 2 / (self._tokens if name == head else self._inputs[name])
            for name, products in self._products.items()
        }
        for name, squares in self._squares.items():
            often = self._seen[name] / self._tokens
            if name == self._names[self._table]:
                often = likely
            # Per channel, as an embedding's channels all weigh the same.
            rows[name] = often * squares / self._tokens / 2
        if head is not None and self._head.weight is self._table.weight:
            table, mean = self._names[self._table], self._inputs[head] / self._tokens / self._head.weight.shape[1]
            # As a head its errors are weighed by E[x²] of what the head sees, so as a table they are too.
            rows[table] = rows[head] = rows[head] + rows[table] / mean
        return {name: value.float() for name, value in rows.items()}

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        value = value.double()
        sums[name] = sums[name] + value if name in sums else value

    def _embedding(self, module: nn.Embedding, args: tuple[Any, ...], y: Tensor) -> Tensor:
        name = self._names[module]
        self._add(self._seen, name, torch.bincount(args[0].flatten(), minlength=module.num_embeddings))
        # The graph starts here: weights have no gradients, so nothing below would have asked for one.
        y = y.detach().requires_grad_()
        y.register_hook(lambda g: self._add(self._squares, name, g.float().square().mean(-1).sum()))
        return y

    def _linear(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not y.requires_grad:
            return
        name, x = self._names[module], args[0].detach().reshape(-1, args[0].shape[-1]).float()
        self._add(self._inputs, name, x.square().sum())
        if module is self._head:
            return
        y.register_hook(self._output_gradient_hook(name, x))

    def _output_gradient_hook(self, name: str, x: Tensor) -> Callable[[Tensor], None]:
        def add(g: Tensor) -> None:
            g = g.reshape(-1, g.shape[-1]).float()
            width = max(1, _PRODUCT // x.shape[-1])
            self._add(self._products, name, torch.cat([(part.T @ x).square().sum(1) for part in g.split(width, dim=1)]))

        return add

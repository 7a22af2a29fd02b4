"""The sensitivity of sites: what an error in each row costs, in nats of KL(fine-tune ‖ expert) a token.

    text ── fine-tune ── token drawn from its own distribution ── log p backwards ── g: gradient at each site's output
                                                                  x: the site's input

To second order KL ≈ ½·E[(Σ g·δ·x)²] for an error δ. If the entries of δ are uncorrelated, as unbiased scales make
them, that is Σ_o s_o · Σ_i E[x_i²]·δ_oi² with one number a row, its *sensitivity* s_o. The gradients of one window are
summed before they are squared, since all of its tokens see the same δ.

The rows of a MoE expert see the tokens that its gate sends to it, and gradients hold the weight that the gate gives it:
a MoE expert that is used little costs little.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.compression.calibration import Calibration, frequencies
from meswitch.compression.moe_experts import RoutedCosts
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import LINEAR_MODULES, load_model
from meswitch.huggingface.moe import ObservedExperts, Observer, input_stack
from meswitch.huggingface.names import ParameterNames
from meswitch.huggingface.text import check_vocabulary, draw_windows
from meswitch.progress import ProgressCallback, ProgressMeter

_PRODUCT_ENTRIES = 2**26  # of g·xᵀ in memory at a time: 256 MiB


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
    """The sensitivity of every linear and embedding site: `float32 [rows of the delta's matrix]` by parameter name.

    Matrices of MoE experts are such sites where the checkpoint has them one by one and transformers runs them in its
    own interface; one that no token reaches costs what one does that a token reaches.

    `model_path`: the fine-tune, a folder or hub id. `data`: a `.txt` or `.jsonl` file (see
    `huggingface.documents`). `calibration`: of the same model; it says how often an embedding's rows are used.
    One backward pass over at most `max_tokens` tokens, a window at a time, for tokens that `seed` draws from the
    model's own predictions. `progress` counts tokens. The model runs in its own dtype and has no weight gradients:
    memory is the model, the activations and logits of one window, and 256 MiB.

    Raises `DataError` for a data file that cannot be read or holds no token, `CheckpointError`,
    `UnsupportedModelError`, `OSError` for a file that does not exist, and `ValueError` for sizes below 1.

    Source: the Fisher information as the curvature of KL; one weight a row as in FWSVD, arXiv 2207.00112.

    >>> from meswitch import CompressOptions, calibrate, compress
    >>> calibration = calibrate("math/", "prompts.jsonl")
    >>> sensitivity = measure_sensitivity("math/", "prompts.jsonl", calibration)
    >>> report = compress(
    ...     "base/", "math/", "experts/sized", CompressOptions(bpw=9), calibration=calibration, sensitivity=sensitivity
    ... )
    >>> report.method, report.bpw <= 9
    ('auto', True)
    """
    checkpoint = Checkpoint.open(model_path)
    purpose = "measure sensitivity on"
    windows = draw_windows(checkpoint.path, data, max_tokens=max_tokens, window=window, seed=seed, purpose=purpose)
    model = load_model(checkpoint).eval().requires_grad_(False)
    names, tensors = ParameterNames(model), checkpoint.names()
    sums = _GradientSums(model)
    generator = torch.Generator().manual_seed(seed)
    meter = ProgressMeter(progress, "measuring what errors cost", sum(map(len, windows)))
    for ids in windows:
        check_vocabulary(ids, model.get_input_embeddings().num_embeddings, data)
        sums.run(ids, generator)
        meter.advance(len(ids))
    found = names.with_file_names(sums.sensitivities(frequencies(calibration.token_counts)), tensors)
    for parameter, experts in names.moe_experts(tensors).items():
        for own, rows in zip(experts, sums.stack_sensitivities(parameter), strict=False):
            found |= zip(own, rows.split([checkpoint.shape(name)[0] for name in own]), strict=True)
    return found


class _GradientSums:
    """Hooks at every linear module and embedding of a model, and sums over windows of what they see.

    Sums are float64, by parameter name.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, model.get_output_embeddings()
        self._embedding = model.get_input_embeddings()
        self._tokens = 0
        self._inputs: dict[str, Tensor] = {}  # Σ x² over tokens and channels
        self._products: dict[str, Tensor] = {}  # Σ over windows and channels of (Σ g·x)², a row each
        self._gradients: dict[str, Tensor] = {}  # of embeddings: Σ over tokens of the mean g² over channels
        self._lookups: dict[str, Tensor] = {}  # of embeddings: how often each row was read
        self._stacks: dict[str, RoutedCosts] = {}
        self._names = {module: f"{name}.weight" for name, module in model.named_modules()}
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(self._after_embedding)
            elif isinstance(module, LINEAR_MODULES):
                module.register_forward_hook(self._after_linear)
            elif input_stack(module) is not None:
                ObservedExperts(module, self._moe_observer(name, module))

    def run(self, ids: Tensor, generator: torch.Generator) -> None:
        """One forward and backward pass over the window `ids int64 [length]`."""
        logits = self._model(input_ids=ids[None], use_cache=False).logits[0]
        p = logits.detach().float().softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator)
        if self._head is not None:
            # The gradient by a logit is 1[drawn] − p, whose expected square p·(1 − p) needs no draw.
            self._add(self._products, self._names[self._head], (p * (1 - p)).sum(0))
        logits.float().log_softmax(-1).gather(1, drawn).sum().backward()
        self._tokens += len(ids)

    def sensitivities(self, token_frequencies: Tensor) -> dict[str, Tensor]:
        """Sensitivities by parameter name; an embedding that is the head too has the sum of both roles'.

        `token_frequencies [vocabulary]`: how often the embedding's rows are used.
        """
        head = None if self._head is None else self._names[self._head]
        rows = {
            name: products / 2 / (self._tokens if name == head else self._inputs[name])
            for name, products in self._products.items()
        }
        for name, gradients in self._gradients.items():
            row_frequencies = self._lookups[name] / self._tokens
            if name == self._names[self._embedding]:
                row_frequencies = token_frequencies
            # Per channel, since all channels of an embedding weigh the same.
            rows[name] = row_frequencies * gradients / self._tokens / 2
        if head is not None and self._head.weight is self._embedding.weight:
            embedding = self._names[self._embedding]
            mean_input = self._inputs[head] / self._tokens / self._head.weight.shape[1]
            # The codec weighs errors of a tied weight by E[x²] of the head's inputs, as an embedding too.
            rows[embedding] = rows[head] = rows[head] + rows[embedding] / mean_input
        return {name: value.float() for name, value in rows.items()}

    def stack_sensitivities(self, parameter: str) -> Tensor:
        """The sensitivities of a stack, `float32 [MoE experts, out_features]`; of none where it was not observed."""
        costs = self._stacks.get(parameter)
        return torch.empty(0) if costs is None else costs.sensitivities(self._tokens).float()

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        value = value.double()
        sums[name] = sums[name] + value if name in sums else value

    def _after_embedding(self, module: nn.Embedding, args: tuple[Any, ...], y: Tensor) -> Tensor:
        name = self._names[module]
        self._add(self._lookups, name, torch.bincount(args[0].flatten(), minlength=module.num_embeddings))
        # The graph starts here: weights have no gradients, so nothing before the embedding's output needs one.
        y = y.detach().requires_grad_()
        y.register_hook(lambda g: self._add(self._gradients, name, g.float().square().mean(-1).sum()))
        return y

    def _after_linear(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not y.requires_grad:
            return
        name, x = self._names[module], args[0].detach().reshape(-1, args[0].shape[-1]).float()
        self._add(self._inputs, name, x.square().sum())
        if module is self._head:
            return
        y.register_hook(self._output_gradient_hook(name, x))

    def _output_gradient_hook(self, name: str, x: Tensor) -> Callable[[Tensor], None]:
        return lambda g: self._add(self._products, name, _squared_products(g, x))

    def _moe_observer(self, name: str, module: nn.Module) -> Observer:
        count = len(module.get_parameter("down_proj"))

        def observe(stack: str, moe_expert: int, x: Tensor, y: Tensor) -> None:
            if not y.requires_grad:
                return
            costs = self._stacks.setdefault(f"{name}.{stack}", RoutedCosts.of(count, y.shape[-1]))
            x = x.detach().float()
            costs.inputs[moe_expert] += x.square().sum(dtype=torch.float64)
            costs.rows[moe_expert] += len(x)

            def add(g: Tensor) -> None:
                costs.products[moe_expert] += _squared_products(g, x)

            y.register_hook(add)

        return observe


def _squared_products(g: Tensor, x: Tensor) -> Tensor:
    """Σ over input channels of (Σ g·x)², `[out_features]`, of gradients `g […, out_features]`, inputs `x [n, in]`."""
    g = g.reshape(-1, g.shape[-1]).float()
    width = max(1, _PRODUCT_ENTRIES // x.shape[-1])
    return torch.cat([(part.T @ x).square().sum(1) for part in g.split(width, dim=1)])

"""What text asks of each MoE expert, measured once for a task: a file that says which ones should be resident.

    text ── the model ── output gain and importance of each MoE expert ── PROFILE.json ── resident sets of an engine

LiteMoE chooses the MoE experts of a task so, before it is served; sizes of layers come from `virtual.divide`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import BaseMismatchError, BudgetError, DataError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import load_model
from meswitch.huggingface.text import FORWARD_TOKENS, batches, check_vocabulary, draw_windows
from meswitch.moe.exact import ExactExperts
from meswitch.moe.gate import take_gates
from meswitch.moe.store import MoeStore
from meswitch.moe.trunk import load_trunk
from meswitch.moe.virtual import divide, largest, profile_outputs, tail
from meswitch.progress import ProgressCallback, ProgressMeter

_FORMAT = "meswitch moe profile 1"


@dataclass(frozen=True)
class LayerProfile:
    """Of each MoE expert of a layer, `float32 [MoE experts]`: `importance`, Σ weight · ‖E(x)‖ over the tokens that
    chose it, and `gain`, its strength (`virtual.OutputProfile.gain`)."""

    importance: Tensor
    gain: Tensor


@dataclass(frozen=True)
class MoeProfile:
    """`layers`: by module of MoE experts, in the order of the model, over `tokens` tokens. `model`: its name;
    `fingerprint`: the hash of its weights, `Checkpoint.sample`."""

    model: str
    fingerprint: str
    tokens: int
    layers: dict[str, LayerProfile]

    @classmethod
    def read(cls, path: Path) -> MoeProfile:
        """Raises `DataError` for a file that is not a whole profile, and `OSError`."""
        try:
            return cls._of_json(json.loads(path.read_bytes()))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(
                f"expected a profile of MoE experts, found something else: {path}: {type(error).__name__}: {error}",
                hint="meswitch moe profile MODEL --data FILE -o PROFILE.json",
            ) from error

    @classmethod
    def _of_json(cls, found: Any) -> MoeProfile:
        if found["format"] != _FORMAT:
            raise ValueError(f"expected the format {_FORMAT!r}, found {found['format']!r}")
        if not isinstance(found["tokens"], int) or found["tokens"] < 1:
            raise ValueError(f"expected a number of tokens, found {found['tokens']!r}")
        layers = {
            str(layer["module"]): LayerProfile(_values(layer["importance"]), _values(layer["gain"]))
            for layer in found["layers"]
        }
        return cls(str(found["model"]), str(found["fingerprint"]), found["tokens"], layers)

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises `OSError`."""
        layers = [
            {"module": name, "importance": layer.importance.tolist(), "gain": layer.gain.tolist()}
            for name, layer in self.layers.items()
        ]
        head = {"format": _FORMAT, "model": self.model, "fingerprint": self.fingerprint, "tokens": self.tokens}
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            unfinished.write_text(json.dumps(head | {"layers": layers}, indent=1) + "\n")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """What `meswitch moe profile --json` prints. Of each layer: `unused`, how many MoE experts no token chose, and
        `quarter`, the share of the importance that the most important quarter of them has."""
        layers = [
            {
                "module": name,
                "moe_experts": len(layer.importance),
                "unused": int((layer.importance == 0).sum()),
                "quarter": 1 - tail(layer.importance)[(len(layer.importance) + 3) // 4],
            }
            for name, layer in self.layers.items()
        ]
        return {"model": self.model, "fingerprint": self.fingerprint, "tokens": self.tokens, "layers": layers}

    def check(self, base: Checkpoint, counts: Mapping[str, int]) -> None:
        """`counts`: how many MoE experts each module of the model has. Raises `BaseMismatchError` for a profile of
        another model, and `DataError` for one that does not say something of each MoE expert."""
        if self.fingerprint != base.sample():
            raise BaseMismatchError(
                f"expected a profile of the MoE experts of {base.path}, found one of {self.model} with other weights",
                hint=f"meswitch moe profile {base.path} --data FILE -o PROFILE.json",
            )
        found = {name: (len(layer.importance), len(layer.gain)) for name, layer in self.layers.items()}
        if list(found.items()) != [(name, (count, count)) for name, count in counts.items()]:
            raise DataError(f"expected a profile of MoE experts {dict(counts)}, found {found}")


def _values(found: Any) -> Tensor:
    """Numbers from 0 on, of which one is more."""
    values = torch.tensor([float(value) for value in found], dtype=torch.float32)
    if not values.isfinite().all() or (values < 0).any() or not values.any():
        raise ValueError("expected numbers from 0 on, not all 0, found others")
    return values


def measure_profile(
    model_path: str | Path,
    data: str | Path,
    *,
    max_tokens: int = 16384,
    window: int = 512,
    moe_budget: int | None = None,
    progress: ProgressCallback | None = None,
    seed: int = 0,
) -> MoeProfile:
    """Runs a model over text and measures what each of its MoE experts adds.

    `model_path`, `data`, `max_tokens`, `window`, `progress`, `seed`: as in `calibrate`. With `moe_budget` bytes MoE
    experts stay in the checkpoint, as in an engine. The model runs in its own dtype, sums are float64.

    Raises what `load_model`, or `load_trunk` and `MoeStore` raise, `take_gates` for the models that it refuses, and
    `DataError` for text that cannot be read.
    """
    base = Checkpoint.open(model_path)
    windows = draw_windows(base.path, data, max_tokens=max_tokens, window=window, seed=seed, purpose="profile")
    model = load_model(base) if moe_budget is None else _load_offloaded(base, moe_budget)
    gates = take_gates(model)  # which refuses what an engine could not restrict
    for gate in gates:
        gate.close()
    check_vocabulary(torch.cat(windows), model.get_input_embeddings().num_embeddings, data)
    total = sum(map(len, windows))
    meter = ProgressMeter(progress, "profiling", total)
    with profile_outputs(model.eval()) as profiles, torch.inference_mode():
        for ids in batches(windows, FORWARD_TOKENS):
            model(ids, use_cache=False)
            meter.advance(ids.numel())
    layers = {
        f"{gate.block}.experts": LayerProfile(profile.outputs.float(), profile.gain)
        for gate, profile in zip(gates, profiles, strict=True)
    }
    return MoeProfile(base.name, base.sample(), total, layers)


def _load_offloaded(base: Checkpoint, budget: int) -> Any:
    model, stacks = load_trunk(base)
    for name, layer in MoeStore(budget, stacks).layers.items():
        module = model.get_submodule(name)
        module.forward = ExactExperts(module, layer)
    return model


def choose_sets(
    counts: Iterable[int], sizes: list[int], budget: int, *, least: int, profile: MoeProfile | None
) -> list[Tensor]:
    """The resident set of each layer within `budget` bytes, `bool [MoE experts]`: by importance, or without a profile
    as many of the first in each layer. `counts`: MoE experts of each layer, `sizes`: bytes of one.

    Raises `BudgetError` where `least` of each layer do not fit.
    """
    needed = least * sum(sizes)
    if needed > budget:
        raise BudgetError(
            f"moe_budget: expected at least {needed} bytes, which the {least} MoE experts of a token take in all "
            f"layers, found {budget}",
            hint='moe_mode="exact" needs those of one layer only',
        )
    if profile is None:
        values = [-torch.arange(count, dtype=torch.float32) for count in counts]
        losses = [[float(count - n) ** 2 for n in range(count + 1)] for count in map(len, values)]  # so all alike
    else:
        values = [layer.importance for layer in profile.layers.values()]
        losses = [tail(own) for own in values]
    return [largest(own, n) for own, n in zip(values, divide(losses, sizes, budget, least=least), strict=True)]

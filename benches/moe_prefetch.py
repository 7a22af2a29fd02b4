"""Whether MoE experts should be read before a gate has chosen them: foretold on the MoE family's held-out text.

    python benches/moe_prefetch.py [--seed 0] [--requests 10] [--trunk 2] [--into FILE.md]

Choices are the gates' own, a token at a time; requests of 128 tokens of all domains take turns. Three predictions of
the next layer's choices: its gate, behind its norm, on the hidden state that this layer's MoE block gets (*before*) or
that it leaves (*after*), and the MoE experts that followed this layer's choices the most on other text (*history*).
*Memory* holds a share of the MoE experts of all layers but the first, which no layer foretells and which is there; the
least recently used leaves. What is foretold is read after all that is needed, while nothing else is being read, and
what is not read when the next gate has chosen is dropped, unless it is among those.

*Time* is simulated, in what one MoE expert takes to compute: a layer computes its four, and before its gate `--trunk`
(half of that, as in Qwen3-30B-A3B); one read after the other, beside arithmetic, takes what a column says; MoE experts
in memory are computed while others are read. A disk leaves arithmetic its pace, a copy out of the page cache half of it
(one core of two). `perfect` foretells what the gate will choose.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quality import put
from torch import Tensor

from meswitch.demo.corpus import DOMAINS
from meswitch.demo.family import Family, family
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.documents import read_texts
from meswitch.huggingface.models import load_model
from meswitch.huggingface.text import batches, draw_windows, load_tokenizer, token_windows

REQUEST = 128  # tokens
PROFILED = 16384  # tokens of other text
BATCH = 2048  # tokens of a forward
SHARES = (0.25, 0.5)  # of the MoE experts of all layers but the first
READS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
PACES = {"disk": 1.0, "page cache": 0.5}  # of arithmetic beside a read
BEGIN, END = "<!-- benches/moe_prefetch.py: begin -->", "<!-- benches/moe_prefetch.py: end -->"

Unit = tuple[int, int]  # a layer, and a MoE expert of it


@contextmanager
def recording(model: Any) -> Iterator[dict[str, list[list[Tensor]]]]:
    """By prediction and layer, the choices that the next layer's gate would make, `int64 [tokens, k]`, the likeliest
    first; as *chosen*, those that each layer's makes."""
    layers = model.model.layers
    found: dict[str, list[list[Tensor]]] = {name: [[] for _ in layers] for name in ("chosen", "before", "after")}

    def note(name: str, number: int, of: int, hidden: Tensor) -> None:
        if of < len(layers):
            layer = layers[of]
            normed = layer.post_attention_layernorm.forward(hidden)  # not a call, which would note it again
            found[name][number].append(layer.mlp.gate(normed)[2])

    def hook(number: int) -> Iterator[Any]:
        def gets(module: Any, args: Any) -> None:
            note("chosen", number, number, args[0])
            note("before", number, number + 1, args[0])

        def leaves(module: Any, args: Any, output: Any) -> None:
            note("after", number, number + 1, output)

        yield layers[number].post_attention_layernorm.register_forward_pre_hook(gets)
        yield layers[number].register_forward_hook(leaves)

    with ExitStack() as hooks:
        for number in range(len(layers)):
            for handle in hook(number):
                hooks.callback(handle.remove)
        yield found


@torch.inference_mode()
def record(model: Any, windows: list[Tensor]) -> dict[str, Tensor]:
    """`int64 [tokens, layers, k]`; predictions have a layer less."""
    with recording(model) as found:
        for ids in batches(windows, BATCH):
            model(ids, use_cache=False)
    return {name: torch.stack([torch.cat(own) for own in of if own], 1) for name, of in found.items()}


def by_history(learned: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Of each layer but the last, what followed its choices the most in `learned`: `[tokens, layers - 1, k]`."""
    layers = []
    for here, there, now in zip(learned.unbind(1), learned[:, 1:].unbind(1), chosen.unbind(1), strict=False):
        pairs = (here.unsqueeze(2) * count + there.unsqueeze(1)).flatten()
        counts = torch.bincount(pairs, minlength=count * count).view(count, count)
        rates = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
        layers.append(rates[now].sum(dim=1).topk(now.shape[1]).indices)
    return torch.stack(layers, 1)


def recall(predicted: Tensor, chosen: Tensor) -> float:
    """The share of the choices of all layers but the first that were foretold."""
    return float((predicted.unsqueeze(-1) == chosen[:, 1:].unsqueeze(-2)).any(dim=-2).float().mean())


@dataclass
class Machine:
    """Arithmetic beside one read at a time, into a memory of `room` MoE experts. `spent`: on reads."""

    room: int
    read: float
    pace: float
    now: float = 0.0
    spent: float = 0.0
    kept: set[Unit] = field(default_factory=set)  # which the running layer needs
    held: OrderedDict[Unit, None] = field(default_factory=OrderedDict)  # the least recently used first
    queue: deque[tuple[Unit, float]] = field(default_factory=deque)  # what is left of each read

    def need(self, units: list[Unit]) -> list[Unit]:
        """Reads these before all else, and drops what else waits. Returns those that must be waited for, in order."""
        self.kept = set(units)
        for unit in units:
            if unit in self.held:
                self.held.move_to_end(unit)
        begun = [entry for entry in list(self.queue)[:1] if entry[0] in self.kept]
        rest = [(unit, self.read) for unit in units if unit not in self.held and unit not in {own for own, _ in begun}]
        self.queue = deque(begun + rest)
        return [unit for unit, _ in self.queue]

    def foretell(self, units: list[Unit]) -> None:
        self.queue.extend((unit, self.read) for unit in units if unit not in self.held)

    def compute(self, work: float) -> None:
        while work > 1e-9 and self.queue:
            step = min(work / self.pace, self.queue[0][1])
            work -= step * self.pace
            self._advance(step)
        self.now += max(work, 0.0)

    def wait_for(self, unit: Unit) -> None:
        while unit not in self.held:
            self._advance(self.queue[0][1])

    def _advance(self, seconds: float) -> None:
        self.now += seconds
        self.spent += seconds
        unit, left = self.queue.popleft()
        if left - seconds > 1e-9:
            self.queue.appendleft((unit, left - seconds))
            return
        if len(self.held) >= self.room:
            del self.held[next(own for own in self.held if own not in self.kept)]
        self.held[unit] = None


@dataclass(frozen=True)
class Outcome:
    """Of a token: its time, MoE experts that were missing when a gate had chosen, and MoE experts read."""

    time: float
    missed: float
    read: float


@dataclass(frozen=True)
class Bench:
    """Choices and predictions on held-out text, `int64 [tokens, layers, k]`. `count`: MoE experts of a layer. `trunk`:
    the time of all else in a layer."""

    chosen: Tensor
    predictions: dict[str, Tensor]
    count: int
    trunk: float

    def run(self, way: str | None, share: float, read: float, pace: float) -> Outcome:
        chosen, layers = self.chosen.tolist(), self.chosen.shape[1]
        predicted = self.predictions[way].tolist() if way else None
        machine = Machine(round(share * self.count * (layers - 1)), read, pace)
        missed = 0
        for token, choices in enumerate(chosen):
            for layer, numbers in enumerate(choices):
                machine.compute(self.trunk)
                waited = machine.need([(layer, number) for number in numbers]) if layer else []
                missed += len(waited)
                foretold = []
                if predicted is not None and layer + 1 < layers:
                    foretold = [(layer + 1, number) for number in predicted[token][layer]]
                if way != "after":
                    machine.foretell(foretold)
                machine.compute(len(numbers) - len(waited))
                for unit in waited:
                    machine.wait_for(unit)
                    machine.compute(1)
                if way == "after":
                    machine.foretell(foretold)
        return Outcome(machine.now / len(chosen), missed / len(chosen), machine.spent / read / len(chosen))

    def tables(self) -> str:
        """Markdown: what is foretold and read if every prediction is read in time; then time against no prediction."""
        shares = [f"{100 * share:.0f} % in memory: missed, read" for share in SHARES]
        lines = [f"| foretold by | of the choices | {' | '.join(shares)} |", "|---|---|" + "---|" * len(SHARES)]
        for way in (None, *self.predictions):
            outcomes = [self.run(way, share, 1e-3, 1.0) for share in SHARES]
            cells = [f"{outcome.missed:.2f}, {outcome.read:.2f}" for outcome in outcomes]
            foretold = "-" if way is None else f"{100 * recall(self.predictions[way], self.chosen):.1f} %"
            lines.append(f"| {way or 'nothing'} | {foretold} | {' | '.join(cells)} |")
        heads = [f"a read takes {read:g}" for read in READS]
        lines += ["", f"| reads from, in memory, foretold by | {' | '.join(heads)} |", "|---" * (1 + len(READS)) + "|"]
        for place, pace in PACES.items():
            for share in SHARES:
                alone = [self.run(None, share, read, pace).time for read in READS]
                for way in self.predictions:
                    times = [self.run(way, share, read, pace).time for read in READS]
                    cells = [f"{100 * (time / least - 1):+.1f} %" for time, least in zip(times, alone, strict=True)]
                    lines.append(f"| {place}, {100 * share:.0f} %, {way} | {' | '.join(cells)} |")
        return "\n".join(lines)


def make(made: Family, requests: int, trunk: float) -> Bench:
    model, tokenizer = load_model(Checkpoint.open(made.base), torch.float32), load_tokenizer(made.base)
    count, each = model.config.num_experts, PROFILED // len(DOMAINS)
    heldout = [
        token_windows(read_texts(made.heldout[domain], tokenizer), tokenizer, REQUEST, max_tokens=REQUEST * requests)
        for domain in DOMAINS
    ]
    found = record(model, [window for turn in zip(*heldout, strict=True) for window in turn])
    other = [
        window
        for domain in DOMAINS
        for window in draw_windows(
            made.base, made.calibration[domain], max_tokens=each, window=REQUEST, seed=0, purpose="profile"
        )
    ]
    chosen, learned = found.pop("chosen"), record(model, other)["chosen"]
    predictions = found | {"history": by_history(learned, chosen, count), "perfect": chosen[:, 1:]}
    return Bench(chosen, predictions, count, trunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=10, help="of each domain")
    parser.add_argument("--trunk", type=float, default=2.0, help="of a layer, where one MoE expert takes 1")
    parser.add_argument("--into", type=Path, metavar="FILE.md")
    given = parser.parse_args()
    found = make(family("moe", seed=given.seed), given.requests, given.trunk).tables()
    print(found)
    if given.into:
        put(found, given.into, BEGIN, END)


if __name__ == "__main__":
    main()

"""Ways to keep a MoE model in little memory, by what they cost in NLL on the held-out text of the MoE family's base.

    python benches/moe_quality.py [--seed 0] [--domain code] [--way masks --way bits] [--requests 80]
                                  [--results FILE] [--into FILE.md]

*masks*: some MoE experts of each layer are resident at 16 bits and gates choose among those. Who is, is fixed by the
norm of the weights, by statistics of other text (the other domains') or of the domain's own, or follows the requests
(SwapMoE, arXiv 2308.15030, one swap a layer and request at most, from the set of the most frequent on other text).
*bits*: all MoE experts are resident in few bits, quantized on text of all domains; the rest of the model stays as it
is. Held-out text is cut into requests of 128 tokens; the first third is for online ways to settle, and what every way
is scored on is the rest. Every number goes to the results file (JSON lines) and is not measured again; tables are made
from that file. `--into` puts them between the lines BEGIN and END of a text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality import put
from torch import Tensor
from torch.nn.functional import cross_entropy

from meswitch.compression.calibration import calibrate
from meswitch.compression.job import quantize
from meswitch.compression.options import CompressOptions
from meswitch.compression.sensitivity import measure_sensitivity
from meswitch.delta.directory import Delta
from meswitch.delta.model import expert_model
from meswitch.demo.corpus import DOMAINS
from meswitch.demo.family import Family, family
from meswitch.demo.training import write_lines
from meswitch.errors import BudgetError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.documents import read_texts
from meswitch.huggingface.models import load_model
from meswitch.huggingface.names import moe_blocks
from meswitch.huggingface.text import batches, draw_windows, load_tokenizer, token_windows
from meswitch.moe.gate import Gate, take_gates
from meswitch.moe.virtual import (
    Importance,
    OutputProfile,
    VirtualExperts,
    divide,
    largest,
    profile_outputs,
    tail,
    weight_norms,
)

REQUEST = 128  # tokens
PROFILED = 8192  # tokens
BATCH = 2048  # tokens of a forward
RESIDENT = (0.25, 0.33, 0.5)  # shares of a layer's MoE experts
TARGETS = (0.08, 0.10, 0.15, 0.16, 0.20, 0.25)  # of 16 bits, of the whole model
BITS = (1, 2, 3, 4)
BEGIN, END = "<!-- benches/moe_quality.py: begin -->", "<!-- benches/moe_quality.py: end -->"


@dataclass(frozen=True)
class Measured:
    """The NLL of one way on one domain, nats a token. `share`: of the MoE experts' bytes at 16 bits, as it is."""

    seed: int
    domain: str
    way: str
    setting: float  # the share or the number of bits that was asked for
    share: float
    nll: float
    full: float  # NLL of the whole model

    @property
    def key(self) -> tuple[int, str, str, float]:
        return self.seed, self.domain, self.way, self.setting

    @property
    def loss(self) -> float:
        """In per cent of the whole model's NLL."""
        return 100 * (self.nll / self.full - 1)


class Bench:
    """The base of one training, its texts, and the results file."""

    def __init__(self, made: Family, seed: int, path: Path, requests: int) -> None:
        self._made, self._seed, self._path = made, seed, path
        self._checkpoint = Checkpoint.open(made.base)
        self._tokenizer = load_tokenizer(made.base)
        self.model = load_model(self._checkpoint, torch.float32)
        self._requests = requests
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [Measured(**json.loads(line)) for line in lines]
        self._full: dict[str, float] = {}

    def add(self, domain: str, way: str, setting: float, share: float, measure: Callable[[], float]) -> None:
        if any(row.key == (self._seed, domain, way, setting) for row in self.rows):
            return
        if domain not in self._full:
            self._full[domain] = nll(self.model, self.scored(domain))
        row = Measured(self._seed, domain, way, setting, share, measure(), self._full[domain])
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"{row.key}: {100 * row.share:.1f} % of the bytes, {row.loss:+.2f} % NLL", flush=True)

    def stream(self, domain: str) -> list[Tensor]:
        """Held-out requests, `int64 [REQUEST]` each."""
        texts = read_texts(self._made.heldout[domain], self._tokenizer)
        return token_windows(texts, self._tokenizer, REQUEST, max_tokens=REQUEST * self._requests)

    def scored(self, domain: str) -> list[Tensor]:
        stream = self.stream(domain)
        return stream[len(stream) // 3 :]

    def profile(self, domains: Sequence[str]) -> list[OutputProfile]:
        """Of text that the fine-tunes of these domains were trained on."""
        with profile_outputs(self.model) as profiles, torch.inference_mode():
            for domain in domains:
                windows = draw_windows(
                    self._made.base,
                    self._made.calibration[domain],
                    max_tokens=PROFILED // len(domains),
                    window=REQUEST,
                    seed=0,
                    purpose="profile",
                )
                for ids in batches(windows, BATCH):
                    self.model(ids)
        return profiles

    def measure_masks(self, domain: str) -> None:
        own, other = self.profile([domain]), self.profile([name for name in DOMAINS if name != domain])
        norms = [weight_norms(block.experts) for _, block in moe_blocks(self.model)]
        rankings = {
            "largest norm": norms,
            "most frequent, other text": [profile.tokens for profile in other],
            "REAP (mean), other text": [profile.outputs / profile.tokens.clamp_min(1) for profile in other],
            "REAP (sum), other text": [profile.outputs for profile in other],
            "SwapMoE's importance, own text": [p.inputs * norm for p, norm in zip(own, norms, strict=True)],
            "REAP (sum), own text": [profile.outputs for profile in own],
        }
        for share in RESIDENT:
            for way, ranking in rankings.items():
                sets = [largest(values, round(share * len(values))) for values in ranking]
                self.add(domain, way, share, share_of(sets), partial(self._static, domain, sets))
            ranking = rankings["REAP (sum), own text"]
            held = sum(round(share * len(values)) for values in ranking)
            least = self.model.config.num_experts_per_tok
            counts = divide([tail(values) for values in ranking], [1] * len(ranking), held, least=least)
            sets = [largest(values, count) for values, count in zip(ranking, counts, strict=True)]
            way = "REAP (sum), own text, sizes of layers chosen"
            self.add(domain, way, share, share_of(sets), partial(self._static, domain, sets))
            start = [largest(p.tokens, round(share * len(p.tokens))) for p in other]
            strengths = {"online: SwapMoE": norms, "online: by output gain": [profile.gain for profile in other]}
            for way, strength in strengths.items():
                self.add(domain, way, share, share_of(start), partial(self._online, domain, strength, start))

    def _static(self, domain: str, sets: list[Tensor]) -> float:
        with gates_of(self.model) as gates:
            for gate, resident in zip(gates, sets, strict=True):
                gate.restrict(resident)
            return nll(self.model, self.scored(domain))

    def _online(self, domain: str, strength: list[Tensor], start: list[Tensor]) -> float:
        """Requests one after the other, swaps between them."""
        with gates_of(self.model) as gates:
            importance = [Importance(values) for values in strength]
            held = VirtualExperts(gates, importance, start, sizes=[1] * len(gates))
            losses = []
            for request in self.stream(domain):
                losses.append(nll(self.model, [request]))
                held.take(held.propose(cap=len(gates)))
        return sum(losses[len(losses) // 3 :]) / len(losses[len(losses) // 3 :])

    def measure_bits(self, domains: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.jsonl"
            texts = [read_texts(self._made.calibration[domain], self._tokenizer) for domain in DOMAINS]
            write_lines(text, [{"text": each} for some in texts for each in some])
            seen = calibrate(self._made.base, text)
            costs = measure_sensitivity(self._made.base, text, seen)
            ways = [("each at so many bits", float(bits), CompressOptions(bits=bits)) for bits in BITS]
            ways += [("bits chosen by error", share, CompressOptions(bpw=16 * share)) for share in TARGETS]
            for way, setting, options in ways:
                known = {row.key for row in self.rows}
                if all((self._seed, domain, way, setting) in known for domain in domains):
                    continue
                out = Path(folder) / f"{way} {setting}"
                sensitivity = costs if options.chooses_per_site else None
                try:
                    quantize(self._made.base, out, options, calibration=seen, sensitivity=sensitivity)
                except BudgetError as error:  # the target is the whole model's, embeddings included
                    print(f"{way}, {setting}: {error}", flush=True)
                    continue
                share, model = self._with_low_bits(out)
                for domain in domains:
                    self.add(domain, way, setting, share, partial(nll, model, self.scored(domain)))

    def _with_low_bits(self, quantized: Path) -> tuple[float, Any]:
        """The share of the MoE experts' bytes, and the model with those in few bits and everything else as it was."""
        delta = Delta.open(quantized)
        owners = {site["name"]: site.get("owner") or {} for site in delta.manifest["sites"]}
        sites = [site for name, site in delta.sites.items() if "moe_expert" in owners[name]]
        share = sum(site.nbytes for site in sites) / sum(2 * torch.Size(site.shape).numel() for site in sites)
        model, decoded = load_model(self._checkpoint, torch.float32), expert_model(None, delta)
        for (_, ours), (_, theirs) in zip(moe_blocks(model), moe_blocks(decoded), strict=True):
            ours.experts.load_state_dict(theirs.experts.state_dict())
        return share, model


@contextmanager
def gates_of(model: Any) -> Iterator[list[Gate]]:
    gates = take_gates(model)
    try:
        yield gates
    finally:
        for gate in gates:
            gate.close()


def share_of(sets: list[Tensor]) -> float:
    return float(torch.cat(sets).float().mean())


@torch.inference_mode()
def nll(model: Any, windows: list[Tensor]) -> float:
    """Nats a token, over every token but the first of each window."""
    total = count = 0.0
    for ids in batches(windows, BATCH):
        logits = model(ids, use_cache=False).logits
        total += float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return total / count


def tables(rows: list[Measured]) -> str:
    """Markdown: residents at 16 bits, a column for each domain and share; then all in few bits."""
    masks = [row for row in rows if row.setting in RESIDENT and "bits" not in row.way]
    bits = [row for row in rows if "bits" in row.way]
    domains = [domain for domain in DOMAINS if any(row.domain == domain for row in rows)]
    lines = []
    if masks:
        shares = " / ".join(f"{100 * share:.0f}" for share in RESIDENT)
        lines += [f"| who is resident at 16 bits | {' | '.join(f'{domain}, {shares} %' for domain in domains)} |"]
        lines += ["|---" * (1 + len(domains)) + "|"]
        for way in dict.fromkeys(row.way for row in masks):
            cells = [" / ".join(_loss(masks, domain, way, share) for share in RESIDENT) for domain in domains]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    if bits:
        lines += [f"| all resident in few bits | bytes of 16 bits | {' | '.join(domains)} |"]
        lines += ["|---" * (2 + len(domains)) + "|"]
        for way, setting in dict.fromkeys((row.way, row.setting) for row in bits):
            share = next(row.share for row in bits if (row.way, row.setting) == (way, setting))
            asked = f"{setting:.0f} bits" if way.startswith("each") else f"{16 * setting:.2f} bits a weight asked for"
            cells = [_loss(bits, domain, way, setting) for domain in domains]
            lines.append(f"| {way}: {asked} | {100 * share:.1f} % | {' | '.join(cells)} |")
    return "\n".join(lines).strip()


def _loss(rows: list[Measured], domain: str, way: str, setting: float) -> str:
    found = [row.loss for row in rows if (row.domain, row.way, row.setting) == (domain, way, setting)]
    return f"{sum(found) / len(found):+.2f}" if found else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain", action="append", choices=DOMAINS)
    parser.add_argument("--way", action="append", choices=("masks", "bits"))
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--results", type=Path, default=Path("target/moe_quality.jsonl"))
    parser.add_argument("--into", type=Path, metavar="FILE.md")
    given = parser.parse_args()
    given.results.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(family("moe", seed=given.seed), given.seed, given.results, given.requests)
    domains, ways = given.domain or list(DOMAINS), given.way or ["masks", "bits"]
    if "masks" in ways:
        for domain in domains:
            bench.measure_masks(domain)
    if "bits" in ways:
        bench.measure_bits(domains)
    found = tables(bench.rows)
    print(found)
    if given.into:
        put(found, given.into, BEGIN, END)


if __name__ == "__main__":
    main()

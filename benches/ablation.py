"""What each part of the method is worth, on the held-out text of a real family.

    python benches/ablation.py [--family tiny] [--seed 0] [--tokens 12288] [--domain code …]

Prints two tables of means over domains, with shares of the fine-tune's gain and KL in thousandths of a nat a token.
Channels: `me-switch` with k salient input channels, chosen at random, by the delta's magnitude, by that weighted with
what the model sees, or by the error that quantization leaves there (as ME-Switch does, arXiv 2406.09041). Scales:
`small` with row scales alone, column scales alone, or both distilled, over codes that are compensated and that are not.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from quality import altered
from torch import Tensor

from meswitch import reference
from meswitch.compression.calibration import calibrate
from meswitch.compression.distillation.job import distill
from meswitch.compression.distillation.options import DistillOptions
from meswitch.compression.distillation.scales import TrainableScales
from meswitch.compression.evaluation import evaluate
from meswitch.compression.job import compress
from meswitch.compression.options import CompressOptions
from meswitch.compression.presets import PRESETS, Preset
from meswitch.delta.directory import Delta
from meswitch.demo.family import Family, family
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import QuantizedSite

SELECTIONS = ("error", "activation", "magnitude", "random")
CHANNELS = (8, 64)
TRAINED = {"rows": ("scales", "u"), "columns": ("column_scales",), "both": ("scales", "u", "column_scales")}


class Bench:
    """One expert of one family."""

    def __init__(self, made: Family, domain: str, tokens: int, folder: Path) -> None:
        self._pair = self._base, self._finetune = made.base, made.experts[domain]
        self._heldout, self._text, self._tokens = made.heldout[domain], made.calibration[domain], tokens
        self._seen, self._delta, self._other = calibrate(self._finetune, self._text), folder / "delta", folder / "other"

    def channels(self) -> Iterator[tuple[str, float, float, float]]:
        """(what, bits a weight, share, KL)."""
        for k in (0, *CHANNELS):
            rule = replace(PRESETS["me-switch"].block, salient=k)
            compress(*self._pair, self._delta, CompressOptions(preset=Preset(rule, None, None)), calibration=self._seen)
            yield f"{k} channels" + (", by error" if k else ""), *self._score(self._delta)
            for selection in SELECTIONS[1:] if k else ():
                self._choose(selection)
                yield f"{k} channels, by {selection}", *self._score(self._other)

    def scales(self) -> Iterator[tuple[str, float, float, float]]:
        """(what, bits a weight, share, KL)."""
        for compensate in (False, True):
            told = "compensated, " if compensate else ""
            compress(
                *self._pair, self._delta, CompressOptions(preset="small", compensate=compensate), calibration=self._seen
            )
            yield f"{told}as compressed", *self._score(self._delta)
            for name, roles in TRAINED.items():
                with only(roles):
                    distill(*self._pair, self._delta, self._other, self._text, DistillOptions("whole"))
                yield f"{told}{name} distilled", *self._score(self._other)

    def _choose(self, selection: str) -> None:
        """Writes the delta anew with as many salient channels of another choice."""
        ours, theirs = Checkpoint.open(self._base), Checkpoint.open(self._finetune)
        tensors: dict[str, Tensor] = {}
        with closing(Delta.open(self._delta)) as delta:
            for site in delta.sites.values():
                if isinstance(site, QuantizedSite) and site.salient is not None:
                    wanted = theirs.tensor(site.name).float() - ours.tensor(site.name).float()
                    index = self._channels(selection, site, wanted)
                    missed = wanted - reference.dense(replace(site, salient=None))
                    values = (missed[:, index] / 2.0**site.exponent).half()
                    tensors[f"{site.name}/salient_index"] = index.int()
                    tensors[f"{site.name}/salient"] = values
            delta.rewrite(self._other, tensors, {}, {})

    def _channels(self, selection: str, site: QuantizedSite, wanted: Tensor) -> Tensor:
        assert site.salient is not None
        score = wanted.square().sum(0)
        if selection == "activation":
            score = score * self._seen.second_moments[site.name]
        elif selection == "random":
            score = torch.rand(len(score), generator=torch.Generator().manual_seed(0))
        return score.topk(len(site.salient.index)).indices.sort().values

    def _score(self, folder: Path) -> tuple[float, float, float]:
        found = evaluate(self._base, folder, self._finetune, self._heldout, max_tokens=self._tokens)
        with closing(Delta.open(folder)) as delta:
            return delta.bpw, found.recovered_share or 0.0, found.kl


def only(roles: tuple[str, ...]) -> AbstractContextManager[None]:
    """Trainable scales of these roles alone."""

    def hold(scales: TrainableScales) -> None:
        for role, move in scales.shifts.items():
            move.requires_grad_(role.partition(".")[0] in roles)

    return altered(hold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--domain", action="append")
    given = parser.parse_args()
    made = family(given.family, seed=given.seed)
    tables: dict[str, dict[str, list[tuple[float, float, float]]]] = {
        "channels": defaultdict(list),
        "scales": defaultdict(list),
    }
    for domain in given.domain or made.experts:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(made, domain, given.tokens, Path(folder))
            for title, rows in (("channels", bench.channels()), ("scales", bench.scales())):
                for what, *found in rows:
                    print(domain, title, what, *(f"{number:.6f}" for number in found), flush=True)
                    tables[title][what].append((found[0], found[1], found[2]))
    for title, table in tables.items():
        print(f"\n| {title} | bits a weight | kept | KL, 1e-3 nats |\n|---|---|---|---|")
        for what, rows in table.items():
            bpw, share, kl = map(mean, zip(*rows, strict=True))
            print(f"| {what} | {bpw:.2f} | {100 * share:.2f} % | {1000 * kl:.3f} |")


if __name__ == "__main__":
    main()

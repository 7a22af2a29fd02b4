"""What deltas keep of their fine-tunes against what they weigh, on the held-out text of real families.

    python benches/quality.py [--family tiny --family smol] [--seed 0 --seed 1 --seed 2] [--domain code]
                              [--way default --way small] [--form compressed --form distilled]
                              [--tokens 12288] [--steps 120] [--batch 8] [--calibrate-on DOMAIN] [--base-bits 4]
                              [--results FILE] [--plot FILE.png] [--into FILE.md]

Ways are presets, the papers' presets with embeddings and head in them too (`bitdelta at 1 bit`: as `meswitch compress
--preset bitdelta --bits 1`) and sizes in bits a weight (`2.1`: `--bpw 2.1`); each is measured as compressed and after
`distill`, the papers' as the papers distil them, beside truncated SVDs of equal bytes. With `--base-bits` deltas are
made against the base quantized to so many bits (calibrated on prose); the gain counts from the 16-bit base all the
same. Families are trained if they are not cached. Every number goes to the results file (JSON lines) as soon as it is
known and is not measured again; tables and plot are made from that file, as means over seeds. `--into` puts tables
between the lines BEGIN and END of a text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from unittest.mock import patch

from torch import Tensor

from meswitch.compression.calibration import Calibration, calibrate
from meswitch.compression.distillation import windows
from meswitch.compression.distillation.job import distill
from meswitch.compression.distillation.options import DistillOptions
from meswitch.compression.distillation.scales import TrainableScales
from meswitch.compression.evaluation import evaluate, evaluate_quantized
from meswitch.compression.job import compress, quantize
from meswitch.compression.options import CompressOptions
from meswitch.compression.presets import PRESETS
from meswitch.compression.sensitivity import measure_sensitivity
from meswitch.demo.corpus import DOMAINS
from meswitch.demo.family import Family, family
from meswitch.site import Site

# The papers' forms at our size: embeddings and head in them too.
WHOLE = {"me-switch at 2 bits": ("me-switch", 2), "bitdelta at 1 bit": ("bitdelta", 1)}
PAPERS = ("me-switch", "bitdelta")
WAYS = (*PRESETS, *WHOLE, "1.1", "1.6", "2.1", "3.1")
FORMS = ("compressed", "distilled", "svd")
BEGIN, END = "<!-- benches/quality.py: begin -->", "<!-- benches/quality.py: end -->"


@dataclass(frozen=True)
class Measured:
    """One delta on one domain's held-out text; `share` and `kl` (nats a token) against its fine-tune."""

    family: str
    seed: int
    domain: str
    way: str
    form: str  # one of FORMS
    calibrated_on: str
    bpw: float
    share: float
    kl: float
    steps: int = 0  # of distillation
    batch: int = 0  # windows a step

    @property
    def key(self) -> tuple[object, ...]:
        return self.family, self.seed, self.domain, self.way, self.form, self.calibrated_on, self.steps, self.batch


class Results:
    """The results file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [Measured(**json.loads(line)) for line in lines]

    def __contains__(self, key: tuple[object, ...]) -> bool:
        return any(row.key == key for row in self.rows)

    def add(self, row: Measured) -> None:
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"{row.key}: {row.bpw:.3f} bpw, {100 * row.share:.2f} %, KL {row.kl:.5f}", flush=True)


@dataclass(frozen=True)
class Bench:
    """What is measured, and where it is written."""

    results: Results
    ways: list[str]
    tokens: int
    steps: int  # of distillation
    batch: int  # windows a step
    domains: list[str]
    wanted: list[str]  # of FORMS
    source: str | None  # the domain whose text calibrates, where that is not the expert's own
    base_bits: int | None  # of the base that deltas are made against, where it is quantized

    def run(self, name: str, seed: int) -> None:
        made = family(name, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            base = made.base
            if self.base_bits is not None:
                base, text = Path(folder) / "base", made.calibration["prose"]
                options = CompressOptions(bits=self.base_bits)
                report = quantize(made.base, base, options, calibration=calibrate(made.base, text))
                found = evaluate_quantized(made.base, base, made.heldout["prose"], max_tokens=self.tokens)
                name = f"{name}, base at {self.base_bits} bits"
                print(f"{name}: {report.bpw:.3f} bpw, KL on prose {found.kl:.5f}", flush=True)
            self._run(name, seed, made, base)

    def _run(self, name: str, seed: int, made: Family, base: Path) -> None:
        for domain in self.domains:
            source = self.source or domain
            left = {
                way: [
                    form
                    for form in self.wanted
                    if (name, seed, domain, way, form, source, *self._effort(form)) not in self.results
                ]
                for way in self.ways
            }
            if not any(left.values()):
                continue
            text = made.calibration[source]
            seen = calibrate(made.experts[domain], text)
            sensed = any(targets(way) and forms for way, forms in left.items())
            costs = measure_sensitivity(made.experts[domain], text, seen) if sensed else None
            for way, forms in left.items():
                for form, bpw, share, kl in self._measure(made, base, domain, source, way, forms, (seen, costs), seed):
                    row = Measured(name, seed, domain, way, form, source, bpw, share or 0.0, kl, *self._effort(form))
                    self.results.add(row)

    def _effort(self, form: str) -> tuple[int, int]:
        """Steps and windows a step."""
        return (self.steps, self.batch) if form == "distilled" else (0, 0)

    def _measure(
        self,
        made: Family,
        base: Path,
        domain: str,
        source: str,
        way: str,
        forms: list[str],
        seen: tuple[Calibration, dict[str, Tensor] | None],
        seed: int,
    ) -> Iterator[tuple[str, float, float | None, float]]:
        """(form, bits a weight, recovered share, KL)."""
        if not forms:
            return
        finetune, heldout = made.experts[domain], made.heldout[domain]
        with tempfile.TemporaryDirectory() as folder:
            delta = Path(folder) / "delta"
            sensitivity = seen[1] if targets(way) else None
            report = compress(
                base, finetune, delta, compress_options(way), calibration=seen[0], sensitivity=sensitivity
            )
            if "compressed" in forms or "svd" in forms:
                svd = "svd" in forms
                found = evaluate(base, delta, finetune, heldout, baseline=made.base, max_tokens=self.tokens, svd=svd)
                if "compressed" in forms:
                    yield "compressed", report.bpw, found.recovered_share, found.kl
                if "svd" in forms:
                    rival = found.to_json()["svd"]
                    yield "svd", report.bpw * rival["bytes"] / report.bytes, rival["recovered_share"], rival["kl"]
            if "distilled" in forms:
                out, text = Path(folder) / "distilled", made.calibration[source]
                with published(way):
                    options = DistillOptions("whole", steps=self.steps, batch=self.batch, seed=seed)
                    distill(base, finetune, delta, out, text, options)
                found = evaluate(base, out, finetune, heldout, baseline=made.base, max_tokens=self.tokens)
                yield "distilled", report.bpw, found.recovered_share, found.kl


@contextmanager
def published(way: str) -> Iterator[None]:
    """Distillation as a paper has it, where the way is a paper's: by KL alone, and BitDelta's one scale a matrix."""

    def tie(scales: TrainableScales) -> None:
        for move in scales.shifts.values():
            move.register_hook(lambda gradient: gradient.mean().expand_as(gradient))

    with ExitStack() as changes:
        if way.startswith(PAPERS):
            changes.enter_context(patch.object(windows, "TEXT_WEIGHT", 0.0))
        if way.startswith("bitdelta"):
            changes.enter_context(altered(tie))
        yield


@contextmanager
def altered(change: Callable[[TrainableScales], None]) -> Iterator[None]:
    """Trainable scales that begin with a change."""
    begin = TrainableScales.__init__

    def begin_changed(self: TrainableScales, site: Site) -> None:
        begin(self, site)
        change(self)

    with patch.object(TrainableScales, "__init__", begin_changed):
        yield


def targets(way: str) -> bool:
    return way not in PRESETS and way not in WHOLE


def compress_options(way: str) -> CompressOptions:
    if targets(way):
        return CompressOptions(bpw=float(way))
    preset, bits = WHOLE.get(way, (way, None))
    return CompressOptions(preset, bits)


def groups(results: Results) -> dict[str, list[Measured]]:
    """The rows by family, and by where the calibration text came from if that was another domain."""
    found: dict[str, list[Measured]] = {}
    for row in results.rows:
        own = row.calibrated_on == row.domain
        found.setdefault(row.family if own else f"{row.family}, calibrated on {row.calibrated_on}", []).append(row)
    return found


def table(title: str, rows: list[Measured]) -> str:
    """Markdown: a line for each way and form, a column for each domain, means over seeds."""
    domains = sorted({row.domain for row in rows})
    columns = ["way", "form", "bits a weight", *domains, "mean", "KL, 1e-3 nats"]
    seeds = sorted({row.seed for row in rows})
    efforts = sorted({f"{row.steps} steps of {row.batch} windows" for row in rows if row.steps})
    title += f", seeds {', '.join(map(str, seeds))}"
    title += f", distilled over {' and '.join(efforts)}" if efforts else ""
    lines = [f"### {title}", "", f"| {' | '.join(columns)} |"]
    lines.append("|---" * len(columns) + "|")
    for way in (way for way in WAYS if any(row.way == way for row in rows)):
        for form in FORMS:
            own = [row for row in rows if (row.way, row.form) == (way, form)]
            if own:
                shares = [[row.share for row in own if row.domain == domain] for domain in domains]
                cells = [f"{100 * mean(some):.2f} %" if some else "-" for some in shares]
                cells += [f"{100 * mean(row.share for row in own):.2f} %", f"{1000 * mean(row.kl for row in own):.3f}"]
                lines.append(f"| {way} | {form} | {mean(row.bpw for row in own):.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def put(tables: str, path: Path, first: str = BEGIN, last: str = END) -> None:
    """Between the two lines of the text. Raises `ValueError` where it has none."""
    before, begin, rest = path.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"expected the lines {first} and {last} in {path}")
    path.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{after}")


def plot(found: dict[str, list[Measured]], path: Path) -> None:
    """KL and lost share against bits a weight, a row of axes for each family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 2, figsize=(13, 4.2 * len(found)), squeeze=False)
    marks = {"compressed": "o", "distilled": "*", "svd": "x"}
    for pair, (title, rows) in zip(axes, found.items(), strict=True):
        labels = "KL(fine-tune ‖ expert), nats a token", "share of the gain lost, 0.01 % or more"
        for axis, label in zip(pair, labels, strict=True):
            axis.set(title=title, xlabel="bits a weight, everything included", ylabel=label, yscale="log", xscale="log")
            axis.grid(alpha=0.3, which="both")
        for color, way in enumerate(way for way in WAYS if any(row.way == way for row in rows)):
            for form, mark in marks.items():
                own = [row for row in rows if (row.way, row.form) == (way, form)]
                if own:
                    bpw, kl = mean(row.bpw for row in own), mean(row.kl for row in own)
                    lost = max(1e-4, 1 - mean(row.share for row in own))
                    label = f"{way}, {form}" if form != "svd" else None
                    for axis, value in zip(pair, (kl, lost), strict=True):
                        axis.plot(bpw, value, mark, color=f"C{color}", label=label, markersize=9)
        pair[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--domain", action="append", choices=DOMAINS)
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--form", action="append", choices=FORMS)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--steps", type=int, default=120, help="of distillation")
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--calibrate-on", metavar="DOMAIN")
    parser.add_argument("--base-bits", type=int, choices=(2, 3, 4, 8))
    parser.add_argument("--results", type=Path, default=Path("target/quality.jsonl"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--into", type=Path, metavar="FILE.md")
    given = parser.parse_args()
    results = Results(given.results)
    bench = Bench(
        results,
        ways=given.way or list(WAYS),
        tokens=given.tokens,
        steps=given.steps,
        batch=given.batch,
        domains=given.domain or list(DOMAINS),
        wanted=given.form or list(FORMS),
        source=given.calibrate_on,
        base_bits=given.base_bits,
    )
    for name in given.family or ["tiny"]:
        for seed in given.seed or [0]:
            bench.run(name, seed)
    found = groups(results)
    tables = "\n\n".join(table(title, rows) for title, rows in found.items())
    print(tables)
    if given.into:
        put(tables, given.into)
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()

"""Distillation of the scales: what it must leave alone, and that it never makes an expert worse."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random, tokenizer_of
from meswitch import reference
from meswitch.compression.distillation.bfloat16_gradients import Bfloat16Gradients
from meswitch.compression.distillation.expert_weight import DeltaRows, ExpertWeight, relative_error
from meswitch.compression.distillation.fisher_information import FisherInformation
from meswitch.compression.distillation.head_divergence import HeadDivergence
from meswitch.compression.distillation.hidden_states import HiddenStates
from meswitch.compression.distillation.job import DistillReport, distill
from meswitch.compression.distillation.optimizer import Schedule, optimize
from meswitch.compression.distillation.options import DistillOptions
from meswitch.compression.distillation.scales import TrainableScales
from meswitch.compression.distillation.whole_model import WholeModelDistillation
from meswitch.compression.distillation.windows import TEXT_WEIGHT, Windows, text_weight
from meswitch.compression.job import compress
from meswitch.compression.likelihood import NO_TARGET
from meswitch.compression.options import CompressOptions
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.errors import (
    BaseMismatchError,
    DataError,
    FormatError,
    NonFiniteError,
    OutputError,
)
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder
from meswitch.progress import Progress
from meswitch.site import QuantizedSite, ReplacedSite, SharedSite, Site

both = pytest.mark.parametrize("method", ["whole", "blocks"])


def options(**changes: Any) -> DistillOptions:
    """A distillation of seconds."""
    return DistillOptions(**{"steps": 16, "window": 16, "batch": 8, "rate": 0.02, **changes})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run slower on more, several times so beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(folder: Path, characters: int = 4000) -> Path:
    letters = random.Random(0)
    path = folder / "text.txt"
    path.write_text("".join(letters.choice("abcdefgh ") for _ in range(characters)))
    return path


def case(
    root: Path, family: str = "llama", preset: str = "small", *, grow: int = 0, **changes: Any
) -> tuple[Path, ...]:
    """Base, fine-tune, delta, where the outcome goes, and text."""
    base = save_random(root / "base", config_of(family, **changes))
    finetune = save_finetune(root / "finetune", base, seed=1, grow=grow)
    compress(base, finetune, root / "delta", CompressOptions(preset=preset))
    return base, finetune, root / "delta", root / "distilled", text(root)


def frozen(site: Site) -> list[Tensor]:
    """What no distillation may touch."""
    if isinstance(site, ReplacedSite):
        return [site.value]
    if isinstance(site, SharedSite):
        return []
    kept = [site.added] + ([] if site.low_rank is None else [site.low_rank.v])
    if isinstance(site, QuantizedSite):
        kept += [] if site.salient is None else [site.salient.index, site.salient.values]
        kept += [tensor for part in site.parts for tensor in (part.codes, part.rows)]
    return [tensor for tensor in kept if tensor is not None]


def coded(delta: Delta) -> list[QuantizedSite]:
    """The sites that have codes."""
    return [site for site in delta.sites.values() if isinstance(site, QuantizedSite) and site.parts]


@torch.no_grad()
def divergence(base: Path, delta: Path, finetune: Path) -> float:
    """KL of the restored checkpoint, on text of its own."""
    restore(base, delta, delta.with_suffix(".restored"))
    letters = tokenizer_of()("abcdefgh ")["input_ids"]
    ids = torch.tensor(letters)[torch.randint(0, 9, (16, 16), generator=torch.Generator().manual_seed(9))]
    wanted, found = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits.log_softmax(-1)
        for folder in (finetune, delta.with_suffix(".restored"))
    )
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@both
@pytest.mark.parametrize(
    ("family", "preset", "grow"),
    [
        ("llama", "small", 0),
        ("llama", "me-switch", 0),
        ("qwen2", "default", 0),
        ("qwen2", "small", 5),
        ("gpt2", "small", 0),
        ("llama", "bitdelta", 3),
    ],
)
def test_the_scales_learn_and_the_codes_stay(tmp_path: Path, family: str, preset: str, grow: int, method: Any) -> None:
    base, finetune, delta, out, data = case(tmp_path, family, preset, grow=grow)
    done = distill(base, finetune, delta, out, data, options(method=method))
    assert done.kl_after < done.kl_before
    stages = 1 if method == "whole" else 2 + (preset in ("default", "small")) * (1 if family == "llama" else 0.5) * 2
    assert (done.method, done.steps, done.tokens) == (method, 16 * stages, 16 * stages * 8 * 16)
    before, after = Delta.open(delta), Delta.open(out)
    after.verify(base)
    assert after.nbytes == pytest.approx(before.nbytes, rel=0.05)
    moved = 0
    assert not list(tmp_path.glob(".*"))
    for name, site in before.sites.items():
        then = after.sites[name]
        assert all(torch.equal(a, b) for a, b in zip(frozen(site), frozen(then), strict=True))
    for site, then in zip(coded(before), coded(after), strict=True):
        moved += sum(not torch.equal(a.scales, b.scales) for a, b in zip(site.parts, then.parts, strict=True))
    assert moved >= len(coded(before))
    assert divergence(base, out, finetune) < divergence(base, delta, finetune)


def test_the_manifest_tells_the_new_errors_and_what_was_done(tmp_path: Path) -> None:
    base, finetune, delta, out, data = case(tmp_path, grow=3)
    done = distill(base, finetune, delta, out, data, options())
    after = Delta.open(out)
    settings = after.manifest["settings"]
    assert settings["preset"] == "small"
    assert settings["distilled"] == {key: value for key, value in done.to_json().items() if key != "seconds"}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict() for f in (base, finetune))
    for site in coded(after):
        rows = site.out_features
        change = theirs[site.name][:rows] - ours[site.name][:rows]
        missed = float((change - reference.dense(site)).norm() / change.norm())
        assert site.relative_error == pytest.approx(missed, rel=1e-4)


def test_trainable_scales_rebuild_what_the_reference_does(tmp_path: Path) -> None:
    _, _, delta, _, _ = case(tmp_path, "gpt2", "default")
    for site in coded(Delta.open(delta)):
        rows = DeltaRows(TrainableScales(site))
        torch.testing.assert_close(rows.delta(rounded=True), reference.dense(site))
        torch.testing.assert_close(rows.delta(rounded=False).detach(), reference.dense(site))


def test_groups_and_gradients(tmp_path: Path) -> None:
    """The gradient by hand against autograd's through the plain formula, groups that do not divide the row included."""
    site = next(s for s in coded(Delta.open(case(tmp_path)[2])) if s.column_scales is not None)
    part = site.parts[0]
    groups = -(-site.in_features // 5)
    group_scales = torch.rand(groups, part.count).half() + 0.5
    grouped = type(part)(part.bits, part.zero, part.codes, group_scales, 5, part.rows)
    scales = TrainableScales(
        QuantizedSite(
            name=site.name, shape=site.shape, dtype=site.dtype, parts=(grouped,), column_scales=site.column_scales
        )
    )
    probe = torch.randn(site.out_features, site.in_features)
    (DeltaRows(scales).delta(rounded=False) * probe).sum().backward()
    for role, shift in scales.shifts.items():
        assert shift.grad is not None
        at = int(shift.grad.abs().argmax())
        with torch.no_grad():
            sums = []
            for step in (1e-2, -1e-2):
                shift.view(-1)[at] = step
                sums.append(float((DeltaRows(scales).delta(rounded=False) * probe).sum()))
                shift.view(-1)[at] = 0
        assert (sums[0] - sums[1]) / 2e-2 == pytest.approx(float(shift.grad.view(-1)[at]), rel=2e-2), role


def test_stored_scales_neither_vanish_nor_overflow(tmp_path: Path) -> None:
    site = coded(Delta.open(case(tmp_path)[2]))[0]
    scales = TrainableScales(site)
    for reach in (-60.0, 60.0):
        with torch.no_grad():
            scales.shifts["scales.0"].fill_(reach)
        stored = scales.rounded("scales.0")
        assert stored.isfinite().all()
        assert torch.equal(stored == 0, site.parts[0].scales == 0)
        assert torch.equal(stored.sign(), site.parts[0].scales.sign())


@both
def test_never_worse(tmp_path: Path, method: Any) -> None:
    base, finetune, delta, out, data = case(tmp_path, preset="default")
    done = distill(base, finetune, delta, out, data, options(method=method, steps=2, rate=1e4))
    assert done.kl_after <= done.kl_before
    for site, again in zip(coded(Delta.open(delta)), coded(Delta.open(out)), strict=True):  # nothing was learned
        for one, other in zip(site.parts, again.parts, strict=True):
            assert torch.equal(other.scales, one.scales)
        if site.column_scales is not None:
            assert torch.equal(again.column_scales, site.column_scales)


@both
def test_the_rate_suits_what_is_missed(tmp_path: Path, method: Any) -> None:
    """Of a large change and of one of a hundredth."""
    for strength in (0.3, 0.003):
        folder = tmp_path / str(strength)
        base = save_random(folder / "base", config_of("llama"))
        finetune = save_finetune(folder / "finetune", base, seed=1, strength=strength)
        compress(base, finetune, folder / "delta", "small")
        done = distill(
            base, finetune, folder / "delta", folder / "out", text(folder), options(method=method, rate=None)
        )
        assert done.kl_after < 0.6 * done.kl_before


def test_the_first_step_is_as_long_as_the_slope_is_steep() -> None:
    slope = torch.tensor([0.5, -2.0, 0.0, 1.5])
    scales: Any = SimpleNamespace(shifts={"scales": torch.nn.Parameter(torch.zeros(4))})
    seen = []

    def loss(_: Tensor) -> float:
        value = 0.04 + slope @ scales.shifts["scales"]
        value.backward()
        seen.append(float(value.detach()))
        return seen[-1]

    batches = iter([torch.zeros(1)] * 2)
    optimize([scales], Schedule(100, 1, 0.05, adapt_rate=True, seed=0), batches, loss, lambda: 0.0, 1, lambda _: None)
    assert seen == pytest.approx([0.04, 0.0], abs=1e-6)


@both
def test_the_start_of_a_window_is_context(tmp_path: Path, method: Any) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    windows = Windows.from_text(data, finetune, options())
    assert windows.context == 2
    restore(base, delta, tmp_path / "restored")
    logs = []
    for folder in (finetune, tmp_path / "restored"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logs.append(model(input_ids=windows.heldout).logits[:, 2:].log_softmax(-1))
    expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    done = distill(base, finetune, delta, out, data, options(method=method))
    assert done.kl_before == pytest.approx(expected, rel=1e-3)


def test_what_follows() -> None:
    ids = torch.arange(32).reshape(2, 16)
    windows = Windows(ids, ids)
    assert windows.next_tokens(torch.tensor([1])).tolist() == [*range(19, 32), NO_TARGET]


def test_what_text_weighs() -> None:
    assert text_weight(4.0) == 2 * text_weight(1.0) == 2 * TEXT_WEIGHT
    assert text_weight(-1e-9) == 0.0


def test_text_itself_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step down the gradients changes, against their length."""
    base, finetune, delta, _, data = case(tmp_path)
    windows = Windows.from_text(data, finetune, options(steps=4))
    schedule = Schedule(1, 8, 0.02, adapt_rate=True, seed=0)
    models = Checkpoint.open(base), Checkpoint.open(finetune), Delta.open(delta)
    job = WholeModelDistillation(*models, windows, schedule)
    some = torch.arange(4)
    with torch.no_grad():
        wanted, found = job._log_probabilities(windows.train[some], rounded=False)
    monkeypatch.setattr(
        "meswitch.compression.distillation.windows.TEXT_WEIGHT",
        0.5 / float((wanted.exp() * (wanted - found)).sum(-1).mean().sqrt()),
    )
    job._add_gradients(some)
    shifts = [shift for scales in job.scales.values() for shift in scales.shifts.values()]
    squares = sum(float(shift.grad.square().sum()) for shift in shifts if shift.grad is not None)

    @torch.no_grad()
    def after(step: float) -> float:
        for shift in shifts:
            shift.copy_(torch.zeros_like(shift) if shift.grad is None else -step * shift.grad)
        wanted, found = job._log_probabilities(windows.train[some], rounded=False)
        following = windows.next_tokens(some)
        likely = found[following != NO_TARGET].gather(1, following[following != NO_TARGET, None])
        return float(((wanted.exp() * (wanted - found)).sum() - 0.5 * likely.sum()) / len(found))

    step = 0.01 / squares
    assert after(-step) - after(step) == pytest.approx(2 * step * squares, rel=0.02)


@both
def test_the_same_seed_gives_the_same_scales_in_place_too(tmp_path: Path, method: Any) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    few, stages = options(steps=4, method=method), 1 if method == "whole" else 4
    reports: list[tuple[int, int]] = []
    one = distill(
        base, finetune, delta, out, data, few, progress=lambda report: reports.append((report.done, report.total))
    )
    assert reports == [(128 * step, 512 * stages) for step in range(1, 4 * stages + 1)]
    other = distill(base, finetune, delta, tmp_path / "other", data, replace(few, seed=1))
    assert other.kl_after != one.kl_after
    two = distill(base, finetune, delta, delta, data, few)
    assert (one.kl_before, one.kl_after) == (two.kl_before, two.kl_after)
    for file in ("delta.safetensors", "meswitch.json"):
        assert (out / file).read_bytes() == (delta / file).read_bytes()


@both
@pytest.mark.parametrize("tied", ["base", "finetune"])
def test_a_head_that_only_one_side_ties(tmp_path: Path, tied: str, method: Any) -> None:
    base = save_random(tmp_path / "base", config_of("llama", tie_word_embeddings=tied == "base"))
    finetune = tmp_path / "finetune"
    config = config_of("llama", tie_word_embeddings=tied == "finetune")
    save_random(finetune, config, seed=3)
    compress(base, finetune, tmp_path / "delta", "small")
    done = distill(base, finetune, tmp_path / "delta", tmp_path / "out", text(tmp_path), options(method=method))
    assert done.kl_after < done.kl_before
    before, after = Delta.open(tmp_path / "delta").sites, Delta.open(tmp_path / "out").sites
    head = "lm_head.weight"
    assert not torch.equal(before[head].parts[0].scales, after[head].parts[0].scales)


@both
def test_nothing_to_train(tmp_path: Path, method: Any) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    compress(base, base, tmp_path / "delta")
    done = distill(base, base, tmp_path / "delta", tmp_path / "out", text(tmp_path), options(method=method))
    assert (done.steps, done.tokens, done.kl_after) == (0, 0, done.kl_before)
    Delta.open(tmp_path / "out").verify(base)


def test_what_is_refused(tmp_path: Path) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("too short for two windows")
    with pytest.raises(DataError, match="expected text of at least 32 tokens to distil on, found 25"):
        distill(base, finetune, delta, out, short, options())
    with pytest.raises(BaseMismatchError):
        distill(save_random(tmp_path / "else", config_of("llama"), seed=8), finetune, delta, out, data, options())
    grown = save_finetune(tmp_path / "grown", base, seed=2, grow=4)
    with pytest.raises(FormatError, match="vocabulary of 268, found 264"):
        distill(base, grown, delta, out, data, options())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="found something else"):
        distill(base, finetune, delta, tmp_path / "taken", data, options())
    with pytest.raises(ValueError, match="expected a method of auto, whole, blocks, found 'half'"):
        distill(base, finetune, delta, out, data, options(method="half"))
    for wrong in ({"steps": 0}, {"window": 1}, {"batch": 0}, {"rate": 0.0}, {"heldout_share": 1.0}):
        with pytest.raises(ValueError, match="expected at least 1 step"):
            distill(base, finetune, delta, out, data, options(**wrong))
    assert not out.exists()


@both
def test_a_fine_tune_that_says_nan(tmp_path: Path, method: Any) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(finetune, dtype=torch.float32)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tokenizer_of().save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match="expected fine-tune and expert to answer in finite numbers"):
        distill(base, tmp_path / "broken", delta, out, data, options(method=method))


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, family: str) -> None:
    base, finetune, delta, out, data = case(tmp_path, family, num_hidden_layers=3)
    given = options(method="blocks", steps=4)
    steps: list[int] = []
    whole = distill(base, finetune, delta, tmp_path / "whole", data, given, progress=lambda at: steps.append(at.done))

    def stop(at: Progress) -> None:
        if at.done > 2.5 * 4 * 8 * 16:  # amid the third stage
            raise Interrupt

    with pytest.raises(Interrupt):
        distill(base, finetune, delta, out, data, given, progress=stop)
    assert not out.exists()
    [folder] = tmp_path.glob(".*")
    assert folder.name == ".distilled.distilling"
    left = {path.name for path in folder.iterdir()}
    again: list[int] = []
    rest = distill(base, finetune, delta, out, data, given, progress=lambda at: again.append(at.done))
    assert again == [steps[3], steps[7], *steps[8:]]  # two stages at once, the others step by step
    assert {**rest.to_json(), "seconds": 0} == {**whole.to_json(), "seconds": 0}
    assert (out / "delta.safetensors").read_bytes() == (tmp_path / "whole" / "delta.safetensors").read_bytes()
    assert left == {"key", "0.safetensors", "1.safetensors"} and not folder.exists()


def test_what_another_run_left_is_not_taken(tmp_path: Path) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    given = options(method="blocks", steps=4)

    def stop(at: Progress) -> None:
        if at.done > 2 * 4 * 8 * 16:
            raise Interrupt

    with pytest.raises(Interrupt):
        distill(base, finetune, delta, out, data, given, progress=stop)
    steps: list[int] = []
    distill(base, finetune, delta, out, data, replace(given, seed=1), progress=lambda at: steps.append(at.done))
    assert len(steps) == 4 * 4


@both
def test_one_process_at_a_time_writes_to_a_place(tmp_path: Path, method: Any) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    given = options(method=method, steps=2)
    refused: list[str] = []

    def intrude(_: Progress) -> None:
        for write in (
            lambda: distill(base, finetune, delta, out, data, replace(given, seed=1)),
            lambda: compress(base, finetune, out),
        ):
            with pytest.raises(OutputError, match="found another writer") as error:
                write()
            refused.append(str(error.value))

    distill(base, finetune, delta, tmp_path / "alone", data, given)
    distill(base, finetune, delta, out, data, given, progress=intrude)
    assert refused
    assert (out / "delta.safetensors").read_bytes() == (tmp_path / "alone" / "delta.safetensors").read_bytes()
    assert list(tmp_path.glob(".*")) == []


@both
def test_moe_experts_are_distilled(tmp_path: Path, method: Any) -> None:
    base, finetune, delta, out, data = case(tmp_path, "mixtral")
    done = distill(base, finetune, delta, out, data, options(method=method))
    assert done.method == method and done.kl_after < done.kl_before
    before, after = Delta.open(delta).sites, Delta.open(out).sites
    experts = [site for site in before.values() if ".experts." in site.name and isinstance(site, QuantizedSite)]
    moved = [
        site.name
        for site in experts
        if not torch.equal(site.parts[0].scales, after[site.name].parts[0].scales)  # type: ignore[union-attr]
    ]
    assert len(moved) > len(experts) / 2
    assert divergence(base, out, finetune) < divergence(base, delta, finetune)


def test_auto_is_what_memory_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    few = options(steps=1)
    assert distill(base, finetune, delta, out, data, few).method == "whole"
    weights = Delta.open(delta).parameters
    for free, method in ((26 * weights, "whole"), (26 * weights - 1, "blocks")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert distill(base, finetune, delta, out, data, few).method == method


# --- pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [7, 2**20])  # the head in one piece, and a few rows at a time
def test_divergence_by_pieces_of_the_head(tmp_path: Path, tokens: int) -> None:
    base, finetune, delta, *_ = case(tmp_path, "gemma2", grow=5, tie_word_embeddings=False)
    ours, theirs = Checkpoint.open(base), Checkpoint.open(finetune)
    decoder, site = Decoder(finetune, theirs.names()), Delta.open(delta).sites["lm_head.weight"]
    scales = TrainableScales(site)
    heads = HeadDivergence(decoder, theirs.tensor("lm_head.weight"), site, ours, scales, (None, None), tokens)
    x, y = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = decoder.logits(x, theirs.tensor("lm_head.weight")).log_softmax(-1)
    found = decoder.logits(y, ExpertWeight(site, ours, scales)(rounded=False)).log_softmax(-1)
    direct = torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
    assert heads.score(x, y) == pytest.approx(float(direct.detach()), rel=1e-4)
    following = torch.tensor([3, NO_TARGET, 0, 104, 50, 3, NO_TARGET])
    unlikely = torch.nn.functional.nll_loss(found, following, ignore_index=NO_TARGET, reduction="sum")
    weight = TEXT_WEIGHT * (direct.detach() / 7).sqrt()
    expected = torch.autograd.grad((direct + weight * unlikely) / 7, list(scales.shifts.values()))
    assert heads.add_gradients(x, y, following) == pytest.approx(float(direct.detach()) / 7, rel=1e-5)
    for shift, gradient in zip(scales.shifts.values(), expected, strict=True):
        torch.testing.assert_close(shift.grad, gradient, rtol=1e-4, atol=1e-7)


def test_gradients_by_way_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw) for shape in ((2, 7, 48), (33, 48), (33,)))

    def gradients(*tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
        taken = [tensor.clone().requires_grad_() for tensor in tensors]
        y = torch.nn.functional.linear(*taken)
        return y.detach(), list(torch.autograd.grad(y.sin().sum(), taken))

    exact, wanted = gradients(x, weight, bias)
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        with Bfloat16Gradients():
            y, found = gradients(x, weight, bias)
            alone = gradients(x, weight)[1]
        assert torch.equal(y, exact)
        assert torch.equal(found[0], wanted[0]) is not able
        for ours, theirs in zip(found + alone, wanted + gradients(x, weight)[1], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 4e-3


def test_sensitivity_is_the_fisher_information(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn many times on one window, against the exact one: J' (diag p - p p') J over the Jacobian of all logits."""
    checkpoint = Checkpoint.open(save_random(tmp_path / "model", config_of("llama")))
    head_in_three_pieces = 4096 * 100
    monkeypatch.setattr("meswitch.compression.distillation.fisher_information._LOGITS", head_in_three_pieces)
    decoder, ids = Decoder(checkpoint.path, checkpoint.names()), torch.arange(3, 9)[None]
    found = FisherInformation(decoder, checkpoint, ids.repeat(600, 1), batch=200, seed=0, folder=tmp_path)
    outer, head, rows = decoder.outer_parameters(checkpoint.tensor), checkpoint.tensor(decoder.head), ids.unique()
    hidden = decoder.embed(outer, rows, checkpoint.tensor(decoder.embedding)[rows], ids)
    blocks = [decoder.block_parameters(at, checkpoint.tensor) for at in range(len(decoder))]
    for place in range(len(blocks) + 1):

        def answers(x: Tensor, place: int = place) -> Tensor:
            for at in range(place, len(blocks)):
                x = decoder.run_block(at, blocks[at], x)
            return decoder.logits(decoder.head_input(outer, x), head).log_softmax(-1)[0]

        jacobian = torch.autograd.functional.jacobian(answers, hidden)[
            :, :, 0
        ]  # of log p: [token, answer, token, hidden]
        share = answers(hidden).exp()
        exact = torch.einsum("sv,svth,svtk->hk", share, jacobian, jacobian) / 6
        exact += 0.1 * exact.diagonal().mean() * torch.eye(32)
        assert float((found.before_block(place) - exact).norm() / exact.norm()) < 0.1
        hidden = decoder.run_block(place, blocks[place], hidden) if place < len(blocks) else hidden


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_some_rows_are_those_of_all(tmp_path: Path, family: str) -> None:
    base, finetune, delta, *_ = case(tmp_path, family, "default", grow=6)
    checkpoint, tuned = Checkpoint.open(base), Checkpoint.open(finetune)
    for site in coded(Delta.open(delta)):
        scales = TrainableScales(site)
        whole = ExpertWeight(site, checkpoint, scales)(rounded=True)
        torch.testing.assert_close(whole, reference.restored(site, checkpoint.tensor(site.name)).float())
        assert relative_error(scales, checkpoint, tuned) == pytest.approx(site.relative_error, rel=1e-3)
        if not site.transposed:
            rows = torch.tensor([0, 2, 3, len(whole) - 1])
            torch.testing.assert_close(ExpertWeight(site, checkpoint, scales, rows)(rounded=True), whole[rows])


def test_large_hidden_states_are_an_unlinked_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(save_random(tmp_path / "base", config_of("llama")))
    decoder, ids = Decoder(checkpoint.path, checkpoint.names()), torch.arange(40).view(5, 8)
    outer = decoder.outer_parameters(checkpoint.tensor)

    def advanced() -> Tensor:
        embedding = checkpoint.tensor(decoder.embedding)
        states = HiddenStates(decoder, outer, lambda tokens: embedding[tokens], ids, 2, 0, tmp_path)
        states.advance(0, decoder.block_parameters(0, checkpoint.tensor))
        return states.head_inputs(torch.tensor([4, 0, 1]))

    wanted = advanced()
    monkeypatch.setattr("meswitch.compression.distillation.hidden_states._MEMORY", 0)
    assert torch.equal(advanced(), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_json() -> None:
    report = DistillReport("blocks", 2, 64, 0.5, 0.25, 1.5).to_json()
    assert report == {"method": "blocks", "steps": 2, "tokens": 64, "kl_before": 0.5, "kl_after": 0.25, "seconds": 1.5}

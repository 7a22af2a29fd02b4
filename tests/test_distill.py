"""Distillation of the scales: what it must leave alone, and that it never makes an expert worse."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random, tokenizer_of
from meswitch.compress import compress, restore
from meswitch.delta import Delta, Site
from meswitch.distill import Distillation, _Learner, distill
from meswitch.errors import BaseMismatchError, DataError, FormatError, NonFiniteError

FAST: dict[str, Any] = {"steps": 16, "window": 16, "batch": 8, "rate": 0.02}


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
    compress(base, finetune, root / "delta", preset=preset)
    return base, finetune, root / "delta", root / "distilled", text(root)


def frozen(site: Site) -> list[Tensor]:
    """What no distillation may touch."""
    kept = [site.whole, site.added, site.v, site.salient, site.salient_index]
    kept += [tensor for part in site.parts for tensor in (part.codes, part.rows)]
    return [tensor for tensor in kept if tensor is not None]


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
def test_the_scales_learn_and_the_codes_stay(tmp_path: Path, family: str, preset: str, grow: int) -> None:
    base, finetune, delta, out, data = case(tmp_path, family, preset, grow=grow)
    done = distill(base, finetune, delta, out, data, **FAST)
    assert done.kl_after < done.kl_before
    assert (done.steps, done.tokens) == (16, 16 * 8 * 16)
    before, after = Delta.open(delta), Delta.open(out)
    after.verify(base)
    assert after.nbytes == pytest.approx(before.nbytes, rel=0.05)
    moved = 0
    for name, site in before.sites.items():
        then = after.sites[name]
        assert all(torch.equal(a, b) for a, b in zip(frozen(site), frozen(then), strict=True))
        moved += sum(not torch.equal(a.scales, b.scales) for a, b in zip(site.parts, then.parts, strict=True))
    assert moved >= sum(bool(site.parts) for site in before.sites.values())
    assert divergence(base, out, finetune) < divergence(base, delta, finetune)


def test_the_manifest_tells_the_new_errors_and_what_was_done(tmp_path: Path) -> None:
    base, finetune, delta, out, data = case(tmp_path, grow=3)
    done = distill(base, finetune, delta, out, data, **FAST)
    after = Delta.open(out)
    settings = after.manifest["settings"]
    assert settings["preset"] == "small"
    assert settings["distilled"] == {key: value for key, value in done.to_json().items() if key != "seconds"}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict() for f in (base, finetune))
    for name, site in after.sites.items():
        if site.parts:
            rows = site.out_features
            change = theirs[name][:rows] - ours[name][:rows]
            assert site.relative_error == pytest.approx(float((change - site.dense()).norm() / change.norm()), rel=1e-4)


def test_a_learner_rebuilds_what_the_reference_does(tmp_path: Path) -> None:
    _, _, delta, _, _ = case(tmp_path, "gpt2", "default")
    for site in Delta.open(delta).sites.values():
        if site.parts:
            torch.testing.assert_close(_Learner(site).delta(rounded=True), site.dense())
            torch.testing.assert_close(_Learner(site).delta(rounded=False).detach(), site.dense())


def test_groups_and_gradients(tmp_path: Path) -> None:
    """The gradient by hand against autograd's through the plain formula, groups that do not divide the row included."""
    site = next(s for s in Delta.open(case(tmp_path)[2]).sites.values() if s.parts and s.column_scales is not None)
    part = site.parts[0]
    groups = -(-site.in_features // 5)
    scales = torch.rand(part.scales.shape[0], groups).half() + 0.5
    grouped = type(part)(part.bits, part.zero, part.codes, scales, 5, part.rows)
    learner = _Learner(
        Site(site.name, site.kind, site.shape, site.dtype, parts=(grouped,), column_scales=site.column_scales)
    )
    probe = torch.randn(site.out_features, site.in_features)
    (learner.delta(rounded=False) * probe).sum().backward()
    for role, move in learner.moved.items():
        assert move.grad is not None
        at = int(move.grad.abs().argmax())
        with torch.no_grad():
            sums = []
            for step in (1e-2, -1e-2):
                move.view(-1)[at] = step
                sums.append(float((learner.delta(rounded=False) * probe).sum()))
                move.view(-1)[at] = 0
        assert (sums[0] - sums[1]) / 2e-2 == pytest.approx(float(move.grad.view(-1)[at]), rel=2e-2), role


def test_stored_scales_neither_vanish_nor_overflow(tmp_path: Path) -> None:
    site = next(s for s in Delta.open(case(tmp_path)[2]).sites.values() if s.parts)
    learner = _Learner(site)
    for reach in (-60.0, 60.0):
        with torch.no_grad():
            learner.moved["scales.0"].fill_(reach)
        stored = learner.rounded("scales.0")
        assert stored.isfinite().all()
        assert torch.equal(stored == 0, site.parts[0].scales == 0)
        assert torch.equal(stored.sign(), site.parts[0].scales.sign())


def test_never_worse(tmp_path: Path) -> None:
    base, finetune, delta, out, data = case(tmp_path, preset="default")
    done = distill(base, finetune, delta, out, data, **{**FAST, "steps": 2, "rate": 1e4})
    assert done.kl_after == done.kl_before
    for name, site in Delta.open(delta).sites.items():
        again = Delta.open(out).sites[name]
        assert all(torch.equal(a.scales, b.scales) for a, b in zip(site.parts, again.parts, strict=True))
        assert again.relative_error == site.relative_error


def test_the_same_seed_gives_the_same_scales_in_place_too(tmp_path: Path) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    few = {**FAST, "steps": 4}
    told: list[tuple[int, int]] = []
    one = distill(base, finetune, delta, out, data, **few, progress=lambda *at: told.append(at))
    assert told == [(128 * step, 512) for step in range(1, 5)]
    other = distill(base, finetune, delta, tmp_path / "other", data, **few, seed=1)
    assert other.kl_after != one.kl_after
    two = distill(base, finetune, delta, delta, data, **few)
    assert (one.kl_before, one.kl_after) == (two.kl_before, two.kl_after)
    for file in ("delta.safetensors", "meswitch.json"):
        assert (out / file).read_bytes() == (delta / file).read_bytes()


@pytest.mark.parametrize("tied", ["base", "finetune"])
def test_a_head_that_only_one_side_ties(tmp_path: Path, tied: str) -> None:
    base = save_random(tmp_path / "base", config_of("llama", tie_word_embeddings=tied == "base"))
    finetune = tmp_path / "finetune"
    config = config_of("llama", tie_word_embeddings=tied == "finetune")
    save_random(finetune, config, seed=3)
    compress(base, finetune, tmp_path / "delta", preset="small")
    done = distill(base, finetune, tmp_path / "delta", tmp_path / "out", text(tmp_path), **FAST)
    assert done.kl_after < done.kl_before
    before, after = Delta.open(tmp_path / "delta").sites, Delta.open(tmp_path / "out").sites
    head = "lm_head.weight"
    assert not torch.equal(before[head].parts[0].scales, after[head].parts[0].scales)


def test_nothing_to_train(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    compress(base, base, tmp_path / "delta")
    done = distill(base, base, tmp_path / "delta", tmp_path / "out", text(tmp_path), **FAST)
    assert (done.steps, done.tokens, done.kl_after) == (0, 0, done.kl_before)
    Delta.open(tmp_path / "out").verify(base)


def test_what_is_refused(tmp_path: Path) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("too short for two windows")
    with pytest.raises(DataError, match="expected text of at least 32 tokens to distil on, found 25"):
        distill(base, finetune, delta, out, short, **FAST)
    with pytest.raises(BaseMismatchError):
        distill(save_random(tmp_path / "else", config_of("llama"), seed=8), finetune, delta, out, data, **FAST)
    grown = save_finetune(tmp_path / "grown", base, seed=2, grow=4)
    with pytest.raises(FormatError, match="vocabulary of 268, found 264"):
        distill(base, grown, delta, out, data, **FAST)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    with pytest.raises(FormatError, match="found something else"):
        distill(base, finetune, delta, tmp_path / "taken", data, **FAST)
    for wrong in ({"steps": 0}, {"window": 1}, {"batch": 0}, {"rate": 0.0}, {"heldout_share": 1.0}):
        with pytest.raises(ValueError, match="expected at least 1 step"):
            distill(base, finetune, delta, out, data, **{**FAST, **wrong})
    assert not out.exists()


def test_a_fine_tune_that_says_nan(tmp_path: Path) -> None:
    base, finetune, delta, out, data = case(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(finetune, dtype=torch.float32)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tokenizer_of().save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match="expected a finite KL"):
        distill(base, tmp_path / "broken", delta, out, data, **FAST)


def test_json() -> None:
    told = Distillation(2, 64, 0.5, 0.25, 1.5).to_json()
    assert told == {"steps": 2, "tokens": 64, "kl_before": 0.5, "kl_after": 0.25, "seconds": 1.5}

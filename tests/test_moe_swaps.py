"""Virtual experts in the engine: gates choose what is in memory, and what that is follows what is asked."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random
from meswitch import Engine, compress, quantize
from meswitch.compression.options import CompressOptions
from meswitch.engine.engine import Engine as EngineClass
from meswitch.errors import (
    BaseMismatchError,
    BudgetError,
    CheckpointError,
    DataError,
    FormatError,
    RequestError,
    UnsupportedModelError,
)
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.moe.exact import ExactExperts
from meswitch.moe.gate import take_gates
from meswitch.moe.profile import MoeProfile, choose_sets, measure_profile
from meswitch.moe.resident import ExactResidents
from meswitch.moe.swaps import ExpertSwaps, SwapAllowance, first_importance
from meswitch.moe.trunk import load_trunk
from test_cli import read, run
from test_engine_families import alone, greedy, in_order, prompts_of, watch
from test_moe_offload import FAMILIES, logits, save

MOE_EXPERTS, CHOSEN = 8, 2
SERVED = ("mixtral", "qwen3_moe", "olmoe")
FAST = 2**40  # bytes a second


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("swaps"), "qwen3_moe")


def sizes_of(base: Path) -> list[int]:
    """Bytes of one MoE expert of each layer."""
    residents = ExactResidents(2**30, load_trunk(Checkpoint(base))[1])
    residents.close()
    return residents.sizes


def budget_of(base: Path, count: int) -> int:
    """The bytes of so many MoE experts in each layer."""
    return count * sum(sizes_of(base))


@contextmanager
def swaps_of(base: Path, count: int, *, rate: int = 0, profile: MoeProfile | None = None) -> Iterator[Any]:
    """A model and its `ExpertSwaps`, of which `count` in each layer are resident."""
    model, stacks = load_trunk(Checkpoint(base))
    residents = ExactResidents(budget_of(base, count), stacks)
    counts = [MOE_EXPERTS] * len(stacks)
    sets = choose_sets(counts, residents.sizes, budget_of(base, count), least=CHOSEN, profile=profile)
    gates = take_gates(model)
    for name, layer in zip(stacks, residents.layers, strict=True):
        module = model.get_submodule(name)
        module.forward = ExactExperts(module, layer)
    allowance = SwapAllowance(rate, max(residents.sizes)) if rate else None
    importance = first_importance(counts, profile)
    swaps = ExpertSwaps(gates, residents, importance, sets, least=CHOSEN, allowance=allowance, norms=profile is None)
    try:
        yield model, swaps
    finally:
        swaps.close()


class Watch:
    """Looks at an engine before and after every step."""

    def __init__(self, engine: EngineClass) -> None:
        self.swaps: ExpertSwaps = engine._worker.moe  # type: ignore[assignment]
        self.sets: list[list[Tensor]] = []
        self.chosen: list[tuple[int, Tensor]] = []
        self.absent = self.over = 0
        begin, end = self.swaps.begin_step, self.swaps.end_step

        def begin_step(tokens: int) -> None:
            begin(tokens)
            self.sets.append([own.clone() for own in self.swaps.resident])

        def end_step() -> None:
            counters = self.swaps.counters()
            self.over += max(counters["bytes"], counters.get("allocated_bytes", 0)) > counters["budget"]
            end()

        self.swaps.begin_step, self.swaps.end_step = begin_step, end_step  # type: ignore[method-assign]
        for layer, name in enumerate(self._modules(engine)):
            module = engine._worker.model.get_submodule(name)
            module.forward = self._watched(layer, module.forward)

    def _modules(self, engine: EngineClass) -> list[str]:
        return [f"{gate.block}.experts" for gate in self.swaps._gates]

    def _watched(self, layer: int, forward: Any) -> Any:
        def run(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            self.absent += int((~self.swaps.resident[layer][index]).sum())
            self.chosen.append((layer, index))
            return forward(hidden, index, weights)

        return run


def arrive(engine: EngineClass) -> None:
    """Waits between two steps until nothing is being read any more."""
    moe: Any = engine._worker.moe

    def is_reading() -> bool:
        moe._take_arrivals()
        return bool(moe._entering)

    deadline = time.monotonic() + 60
    while engine._worker.call(is_reading):
        assert time.monotonic() < deadline
        time.sleep(0.001)


# --- the model's own logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_resident_logits_are_the_whole_models(family: str, tmp_path: Path) -> None:
    base = save(tmp_path, family)
    whole, ids = AutoModelForCausalLM.from_pretrained(base), torch.tensor(prompts_of(45))
    with swaps_of(base, MOE_EXPERTS) as (model, swaps):
        for implementation in ("grouped_mm", "eager"):
            model.set_experts_implementation(implementation)
            whole.set_experts_implementation(implementation)
            assert all(map(torch.equal, logits(model, ids), logits(whole, ids))), implementation
        assert all(bool(own.all()) for own in swaps.resident)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_few_resident_no_other_is_chosen(family: str, tmp_path: Path) -> None:
    base, ids = save(tmp_path, family), torch.tensor(prompts_of(45))
    whole = AutoModelForCausalLM.from_pretrained(base)
    with swaps_of(base, 3, rate=FAST) as (model, swaps):
        found = logits(model, ids)  # a KeyError, if one that is absent were chosen
        assert not all(map(torch.equal, found, logits(whole, ids)))
        assert swaps.counters()["choices"] == 0, "nothing was a step"
        swaps.begin_step(45)
        logits(model, ids)
        swaps.end_step()
        counters = swaps.counters()
        assert counters["choices"] == 45 * CHOSEN * len(swaps.resident)
        assert 0 < counters["redirected"] < counters["choices"]
        assert counters["bytes"] <= counters["budget"]


# --- in the engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SERVED)
def test_a_batch_through_the_engine_with_everything_resident(family: str, tmp_path: Path) -> None:
    base, prompts = save(tmp_path, family), prompts_of(5, 60, 17, 33, 1)
    whole = AutoModelForCausalLM.from_pretrained(base)
    budget = budget_of(base, MOE_EXPERTS)
    with Engine(base, kv_budget="16MiB", max_batch_tokens=48, moe_budget=budget, moe_mode="virtual") as engine:
        answers = engine.generate(prompts, max_new_tokens=8)
        counters = engine.stats()["moe"]
    assert [answer.token_ids for answer in answers] == [greedy(whole, prompt, 8) for prompt in prompts]
    assert counters["redirected"] == counters["swaps"] == counters["swapped_bytes"] == 0
    tokens = sum(map(len, prompts)) + 5 * 7
    layers = counters["choices"] // (tokens * CHOSEN)
    assert counters["choices"] == tokens * CHOSEN * layers and layers == len(sizes_of(base))
    assert counters["bytes"] <= counters["allocated_bytes"] <= counters["budget"] == budget
    assert engine.stats()["moe"] == counters  # those of the end


@pytest.mark.parametrize("family", SERVED)
def test_the_budget_holds_and_no_absent_one_is_chosen_while_sets_change(family: str, tmp_path: Path) -> None:
    base = save(tmp_path, family)
    with Engine(
        base,
        kv_budget="16MiB",
        max_batch_tokens=48,
        moe_budget=budget_of(base, 4),
        moe_mode="virtual",
        moe_swap_rate=FAST,
    ) as engine:
        watch = Watch(engine)
        for seed in range(4):
            engine.generate(prompts_of(60, 33, 90, seed=seed), max_new_tokens=8)
            arrive(engine)
        moe = engine.stats()["moe"]
    assert watch.chosen and watch.absent == watch.over == 0
    assert moe["swaps"] > 0 and moe["failed_loads"] == 0
    assert moe["swapped_bytes"] == moe["swaps"] * sizes_of(base)[0]
    for sets in watch.sets:
        assert all(CHOSEN <= int(own.sum()) <= 4 for own in sets)


def speech(token: int) -> list[list[int]]:
    """Prompts about one thing."""
    return [[token + number % 3 for number in range(100)] for _ in range(3)]


def redirected(engine: EngineClass, prompts: list[list[int]]) -> float:
    """The share of choices that a gate would have made otherwise."""
    before = engine.stats()["moe"]
    engine.generate(prompts, max_new_tokens=1)
    after = engine.stats()["moe"]
    return float((after["redirected"] - before["redirected"]) / (after["choices"] - before["choices"]))


def test_swaps_follow_a_change_of_subject(base: Path) -> None:
    with Engine(base, moe_budget=budget_of(base, 4), moe_mode="virtual", moe_swap_rate=FAST) as engine:
        settled = []
        for token in (10, 200):
            at_first = redirected(engine, speech(token))
            for _ in range(30):
                arrive(engine)
                engine.generate(speech(token), max_new_tokens=1)
            arrive(engine)
            assert redirected(engine, speech(token)) < at_first
            settled.append([own.clone() for own in engine._worker.moe.resident])  # type: ignore[union-attr]
    assert any(not torch.equal(one, other) for one, other in zip(*settled, strict=True))


def test_sets_stay_as_they_are_at_rate_0(base: Path) -> None:
    for rate in (0, "0"):
        with Engine(base, moe_budget=budget_of(base, 3), moe_mode="virtual", moe_swap_rate=rate) as engine:
            watch = Watch(engine)
            engine.generate(prompts_of(100, 100, 100), max_new_tokens=4)
            engine.generate(prompts_of(100, 100, 100), max_new_tokens=4)
            moe = engine.stats()["moe"]
        assert moe["swaps"] == 0 and moe["redirected"] > 0
        first = torch.arange(MOE_EXPERTS) < 3
        assert all(torch.equal(own, first) for sets in watch.sets for own in sets)


def test_swaps_keep_to_the_rate() -> None:
    now = 0.0
    allowance = SwapAllowance(100, 250, clock=lambda: now)
    assert allowance.left() == 0
    now = 1.5
    assert allowance.left() == 150
    allowance.spend(100)
    assert allowance.left() == 50
    now = 100.0
    assert allowance.left() == 250, "a MoE expert is saved up for, and no more"
    now = 0.0
    wide = SwapAllowance(1000, 250, clock=lambda: now)
    now = 100.0
    assert wide.left() == 1000


def test_an_engine_at_a_low_rate_swaps_less(base: Path) -> None:
    size = sizes_of(base)[0]
    start = time.monotonic()
    with Engine(base, moe_budget=budget_of(base, 4), moe_mode="virtual", moe_swap_rate=size) as engine:
        for seed in range(6):
            engine.generate(prompts_of(100, 100, seed=seed), max_new_tokens=1)
            arrive(engine)
        moe = engine.stats()["moe"]
        assert moe["swapped_bytes"] <= size * (time.monotonic() - start)


def test_fine_tunes_of_the_trunk_are_served(base: Path, tmp_path: Path) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".experts." not in name:
                parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape))
    tuned.save_pretrained(tmp_path / "tuned")
    compress(base, tmp_path / "tuned", tmp_path / "experts" / "a")
    compress(base, save_finetune(tmp_path / "moe", base, 2), tmp_path / "experts" / "moe")
    with Engine(
        base, experts=tmp_path / "experts", moe_budget=budget_of(base, 4), moe_mode="virtual", moe_swap_rate=FAST
    ) as engine:
        watch = Watch(engine)
        for seed in range(3):
            engine.generate(prompts_of(60, 61, 62, seed=seed), expert=["a", "base", "a"], max_new_tokens=4)
            arrive(engine)
        assert "mlp.experts" in str(engine.experts["moe"]["error"])
        moe = engine.stats()["moe"]
    assert watch.absent == watch.over == 0 and moe["swaps"] > 0
    assert moe["choices"] == 3 * (60 + 61 + 62 + 3 * 3) * CHOSEN * 2


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_ends_the_swaps_and_nothing_else(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = save(tmp_path, "qwen3_moe")
    with Engine(own, moe_budget=budget_of(own, 4), moe_mode="virtual", moe_swap_rate=FAST) as engine:
        watch = Watch(engine)
        with (own / "model.safetensors").open("r+b") as opened:
            opened.truncate((own / "model.safetensors").stat().st_size // 2)
        with caplog.at_level(logging.WARNING):
            for seed in range(4):
                engine.generate(prompts_of(100, 100, seed=seed), max_new_tokens=4)
                arrive(engine)
        moe = engine.stats()["moe"]
    assert moe["failed_loads"] > 0 and moe["swaps"] == 0 and engine.stats()["requests"]["failed"] == 0
    assert sum("stay as they are" in record.message for record in caplog.records) == 1
    assert watch.absent == 0 and all(int(own.sum()) >= CHOSEN for own in watch.sets[-1])


def test_a_file_that_is_removed_does_no_harm(tmp_path: Path) -> None:
    own = save(tmp_path, "qwen3_moe")
    with Engine(own, moe_budget=budget_of(own, 4), moe_mode="virtual", moe_swap_rate=FAST) as engine:
        (own / "model.safetensors").unlink()
        for seed in range(4):
            engine.generate(prompts_of(100, 100, seed=seed), max_new_tokens=4)
            arrive(engine)
        moe = engine.stats()["moe"]
    assert moe["failed_loads"] == 0 and moe["swaps"] > 0


def test_a_file_that_is_cut_before_the_start_is_refused(tmp_path: Path) -> None:
    own = save(tmp_path, "qwen3_moe")
    model, stacks = load_trunk(Checkpoint(own))
    residents = ExactResidents(budget_of(own, 4), stacks)
    with (own / "model.safetensors").open("r+b") as opened:
        opened.truncate(9000)
    sets = [torch.ones(MOE_EXPERTS, dtype=torch.bool)] * len(stacks)
    with pytest.raises(CheckpointError, match=r"model\.safetensors as it was"):
        ExpertSwaps(
            take_gates(model), residents, first_importance([8, 8], None), sets, least=2, allowance=None, norms=True
        )
    residents.close()


def test_an_engine_is_closed_while_something_is_read(base: Path) -> None:
    for seed in range(5):
        engine = Engine(base, moe_budget=budget_of(base, 4), moe_mode="virtual", moe_swap_rate=FAST)
        stream = engine.stream(prompts_of(150, seed=seed)[0], max_new_tokens=60)
        next(iter(stream))
        engine.close()
        assert engine.stats()["moe"]["budget"] == budget_of(base, 4)


def test_what_cannot_be_served_is_refused(base: Path, tmp_path: Path) -> None:
    least = budget_of(base, CHOSEN)
    for wrong, match in (
        ({"moe_budget": None}, "moe_budget: expected a number"),
        ({"exact": True}, "exact: expected False"),
        ({"moe_mode": "exact", "moe_copies": base}, "moe_copies: expected a folder"),
        ({"moe_swap_rate": "fast"}, "moe_swap_rate"),
        ({"moe_swap_rate": -1}, "moe_swap_rate"),
        ({"moe_mode": "exact", "moe_swap_rate": 1}, "moe_swap_rate: expected moe_mode='virtual'"),
        ({"moe_mode": "exact", "moe_profile": "p.json"}, "moe_profile: expected moe_mode='virtual'"),
    ):
        with pytest.raises(RequestError, match=match):
            Engine(base, **{"moe_mode": "virtual", "moe_budget": least, **wrong})
    with pytest.raises(BudgetError, match=f"moe_budget: expected at least {least} bytes.*found {least - 1}"):
        Engine(base, moe_mode="virtual", moe_budget=least - 1)
    with Engine(base, moe_mode="virtual", moe_budget=least, moe_swap_rate=FAST) as engine:
        engine.generate(prompts_of(100, 100), max_new_tokens=4)
        assert engine.stats()["moe"]["swaps"] == 0, "no set is larger than what a token takes"
    phi = save_random(tmp_path / "phi", config_of("phimoe", num_local_experts=8, num_experts_per_tok=2))
    with pytest.raises(UnsupportedModelError, match=r"by torch\.topk, found Phimoe"):
        Engine(phi, moe_mode="virtual", moe_budget="1GiB")
    quantize(base, tmp_path / "quantized")
    with pytest.raises(UnsupportedModelError, match="found a quantized model"):
        Engine(tmp_path / "quantized", moe_mode="virtual", moe_budget="1GiB")


# --- in few bits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copies(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies") / "8bit"
    quantize(base, folder, CompressOptions(bits=8))
    return folder


def packed_size(base: Path, copies: Path) -> int:
    """Bytes of a packed MoE expert, of the largest layer, by the error for a budget that is too small."""
    with pytest.raises(BudgetError) as refused:
        Engine(base, moe_mode="virtual", moe_copies=copies, moe_budget=1)
    return int(refused.value.message.split("at least ")[1].split()[0]) // (2 * CHOSEN)


def test_with_all_copies_resident_logits_are_nearly_the_whole_models(base: Path, copies: Path) -> None:
    prompts, size = prompts_of(5, 60, 17, 33), packed_size(base, copies)
    whole = AutoModelForCausalLM.from_pretrained(base)
    settings = {"kv_budget": "16MiB", "max_batch_tokens": 48, "moe_mode": "virtual", "moe_copies": copies}
    with Engine(base, moe_budget=2 * MOE_EXPERTS * size, **settings) as engine:
        seen = watch(engine)
        answers = engine.generate(prompts, max_new_tokens=8)
        moe = engine.stats()["moe"]
    assert moe["redirected"] == moe["swaps"] == 0 and moe["bytes"] <= moe["budget"]
    for rows, prompt, answer in zip(in_order(seen), prompts, answers, strict=True):
        expected = alone(whole, prompt, answer.token_ids)
        assert (rows - expected).abs().max() <= 5e-2 * expected.abs().max()


def test_copies_swap_within_the_budget(base: Path, copies: Path) -> None:
    size = packed_size(base, copies)
    settings = {"moe_mode": "virtual", "moe_copies": copies, "moe_swap_rate": FAST}
    with Engine(base, moe_budget=2 * 4 * size, **settings) as engine:
        observed = Watch(engine)
        for seed in range(4):
            engine.generate(prompts_of(60, 33, 90, seed=seed), max_new_tokens=8)
            arrive(engine)
        moe, residents = engine.stats()["moe"], engine._worker.moe._residents  # type: ignore[union-attr]
        held = {(layer, int(e)) for layer, own in enumerate(observed.swaps.resident) for e in own.nonzero()}
        assert residents._units.keys() == held
    assert observed.chosen and observed.absent == observed.over == 0
    assert moe["swaps"] > 0 and moe["failed_loads"] == 0 and moe["swapped_bytes"] == moe["swaps"] * size
    assert all(CHOSEN <= int(own.sum()) <= 4 for sets in observed.sets for own in sets)


def test_a_copy_that_is_damaged_ends_the_swaps(base: Path, copies: Path, tmp_path: Path) -> None:
    own, size = tmp_path / "own", packed_size(base, copies)
    shutil.copytree(copies, own)
    file = own / "delta.safetensors"
    settings = {"moe_mode": "virtual", "moe_copies": own, "moe_swap_rate": FAST}
    with Engine(base, moe_budget=2 * 4 * size, **settings) as engine:
        observed = Watch(engine)
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 3)
        for seed in range(4):
            engine.generate(prompts_of(100, 100, seed=seed), max_new_tokens=4)
            arrive(engine)
        moe = engine.stats()["moe"]
    assert moe["failed_loads"] > 0 and engine.stats()["requests"]["failed"] == 0 and observed.absent == 0
    with pytest.raises(FormatError):
        Engine(base, moe_budget=2 * 4 * size, **settings)


def test_an_engine_is_closed_while_a_copy_is_read(base: Path, copies: Path) -> None:
    size = packed_size(base, copies)
    for seed in range(3):
        engine = Engine(base, moe_budget=2 * 4 * size, moe_mode="virtual", moe_copies=copies, moe_swap_rate=FAST)
        stream = engine.stream(prompts_of(150, seed=seed)[0], max_new_tokens=60)
        next(iter(stream))
        engine.close()


# --- profiles -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "text.txt"
    path.write_text("17 * 23 is 391. " * 60)
    return path


@pytest.fixture(scope="module")
def profile(base: Path, data: Path) -> MoeProfile:
    return measure_profile(base, data, max_tokens=512, window=64)


def test_a_profile_is_the_same_with_moe_experts_on_disk(base: Path, data: Path, profile: MoeProfile) -> None:
    again = measure_profile(base, data, max_tokens=512, window=64, moe_budget=budget_of(base, 2))
    assert profile.tokens == again.tokens == 512 and profile.fingerprint == again.fingerprint
    for name, layer in profile.layers.items():
        torch.testing.assert_close(layer.importance, again.layers[name].importance)
        torch.testing.assert_close(layer.gain, again.layers[name].gain)


def test_a_profile_is_read_as_it_was_written(base: Path, profile: MoeProfile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile.write(path)
    again = MoeProfile.read(path)
    assert (again.model, again.fingerprint, again.tokens) == (profile.model, profile.fingerprint, profile.tokens)
    assert list(again.layers) == list(profile.layers)
    for name, layer in profile.layers.items():
        assert torch.equal(layer.importance, again.layers[name].importance)
        assert torch.equal(layer.gain, again.layers[name].gain)
    assert [*tmp_path.iterdir()] == [path]
    again.check(Checkpoint(base), dict.fromkeys(profile.layers, MOE_EXPERTS))


def test_a_profile_says_which_are_resident(base: Path, profile: MoeProfile, tmp_path: Path) -> None:
    profile.write(tmp_path / "profile.json")
    settings = {"moe_budget": budget_of(base, 4), "moe_mode": "virtual", "moe_swap_rate": 0}
    with Engine(base, moe_profile=tmp_path / "profile.json", **settings) as engine:
        resident = engine._worker.moe.resident  # type: ignore[union-attr]
        engine.generate("17 * 23 is", max_new_tokens=4)
        chosen = engine.stats()["moe"]
    with Engine(base, **settings) as engine:
        engine.generate("17 * 23 is", max_new_tokens=4)
        first = engine.stats()["moe"]
    assert sum(int(own.sum()) for own in resident) == 8
    for own, layer in zip(resident, profile.layers.values(), strict=True):
        assert float(layer.importance[own].min()) >= float(layer.importance[~own].max())
    assert chosen["redirected"] < first["redirected"]


def test_sizes_of_sets_are_worth_most(profile: MoeProfile) -> None:
    skewed = {
        name: type(layer)(torch.tensor([100.0] + [1e-3] * 7) if number == 0 else torch.ones(8), layer.gain)
        for number, (name, layer) in enumerate(profile.layers.items())
    }
    own = MoeProfile(profile.model, profile.fingerprint, profile.tokens, skewed)
    sets = choose_sets([8, 8], [10, 10], 85, least=2, profile=own)
    assert [int(each.sum()) for each in sets] == [2, 6]
    assert [int(each.sum()) for each in choose_sets([8, 8], [10, 10], 75, least=2, profile=None)] in ([3, 4], [4, 3])
    large = choose_sets([128] * 48, [9_441_280 + 4096 * n for n in range(48)], 8 * 2**30, least=8, profile=None)
    held = sum(int(each.sum()) * (9_441_280 + 4096 * n) for n, each in enumerate(large))
    assert 0.97 * 8 * 2**30 < held <= 8 * 2**30 and {int(each.sum()) for each in large} <= {17, 18, 19, 20}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("profile 1", "profile 9"),
        lambda text: json.dumps(json.loads(text) | {"tokens": 0}),
        lambda text: json.dumps(json.loads(text) | {"layers": [{"module": "a"}]}),
        lambda text: json.dumps(
            json.loads(text) | {"layers": [{"module": "a", "importance": [1, -1], "gain": [1, 1]}]}
        ),
        lambda text: json.dumps(
            json.loads(text) | {"layers": [{"module": "a", "importance": [1, float("nan")], "gain": [1, 1]}]}
        ),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "fingerprint"}),
        lambda text: text.encode("utf-16").decode("latin-1"),
    ],
)
def test_what_is_no_profile_is_refused(base: Path, profile: MoeProfile, tmp_path: Path, change: Any) -> None:
    path = tmp_path / "profile.json"
    profile.write(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match="expected a profile of MoE experts"):
        Engine(base, moe_budget=budget_of(base, 4), moe_mode="virtual", moe_profile=path)


def test_a_profile_of_another_model_is_refused(base: Path, profile: MoeProfile, tmp_path: Path) -> None:
    path, budget = tmp_path / "profile.json", budget_of(base, 4)
    profile.write(path)
    other = save_random(tmp_path / "other", config_of("qwen3_moe", **FAMILIES["qwen3_moe"]), seed=5)
    with pytest.raises(BaseMismatchError, match="with other weights"):
        Engine(other, moe_budget=budget, moe_mode="virtual", moe_profile=path)
    short = json.loads(path.read_text())
    short["layers"][0]["gain"].pop()
    path.write_text(json.dumps(short))
    with pytest.raises(DataError, match="expected a profile of MoE experts"):
        Engine(base, moe_budget=budget, moe_mode="virtual", moe_profile=path)
    short["layers"].pop()
    path.write_text(json.dumps(short))
    with pytest.raises(DataError, match="expected a profile of MoE experts"):
        Engine(base, moe_budget=budget, moe_mode="virtual", moe_profile=path)
    with pytest.raises(FileNotFoundError):
        Engine(base, moe_budget=budget, moe_mode="virtual", moe_profile=tmp_path / "none.json")


def test_models_that_cannot_be_profiled_are_refused(data: Path, tmp_path: Path) -> None:
    dense = save_random(tmp_path / "dense", config_of("llama"))
    with pytest.raises(UnsupportedModelError, match="expected a model with MoE experts, found none"):
        measure_profile(dense, data)


def test_the_commands(base: Path, data: Path, tmp_path: Path) -> None:
    budget = str(budget_of(base, 4))
    made = read("moe", "profile", base, "--data", data, "-o", tmp_path / "p.json", "--moe-budget", budget)
    profile = MoeProfile.read(tmp_path / "p.json")
    assert made["tokens"] == profile.tokens and [row["moe_experts"] for row in made["layers"]] == [8, 8]
    assert made["layers"][0]["module"] == "model.layers.0.mlp.experts" and 0.25 <= made["layers"][0]["quarter"] <= 1
    settings = ["--moe-budget", budget, "--moe-mode", "virtual", "--moe-profile", tmp_path / "p.json"]
    for rate in ([], ["--moe-swap-rate", "0"]):
        found = run("generate", base, "17 * 23 is", "--max-new-tokens", 2, *settings, *rate)
        assert found.exit_code == 0, found.stderr
    text = run("moe", "profile", base, "--data", data, "-o", tmp_path / "p.json")
    assert text.exit_code == 0 and "never chosen" in text.stdout
    for wrong in ("none.txt", "empty.txt"):
        (tmp_path / "empty.txt").write_text("")
        assert run("moe", "profile", base, "--data", tmp_path / wrong, "-o", tmp_path / "q.json").exit_code == 1
    assert run("moe", "profile", base, "--data", data, "-o", tmp_path / "no" / "q.json").exit_code == 1
    assert not (tmp_path / "q.json").exists()

"""LoRA adapters that peft itself made, as experts: the same logits as `PeftModel`, restored and served."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from families import CHAT_TEMPLATE, VOCABULARY, config_of, save_random, tokenizer_of
from meswitch import _native, reference
from meswitch.compression.lora import import_adapter
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.errors import (
    ArchitectureError,
    CheckpointError,
    FormatError,
    NonFiniteError,
    OutputError,
    UnsupportedModelError,
)
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import LowRankSite
from test_engine_families import assert_alike, prompts_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj"


def save_adapter(base: Path, folder: Path, *, grow: int = 0, kind: Any = LoraConfig, **settings: Any) -> Path:
    """An adapter whose every trainable parameter was moved, saved by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if grow:
            model.resize_token_embeddings(VOCABULARY + grow, mean_resizing=False)
        adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted.save_pretrained(folder)
    return folder


def as_peft(base: Path, adapter: Path, *, grow: int = 0) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if grow:
            model.resize_token_embeddings(VOCABULARY + grow, mean_resizing=False)
        return PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def change(adapter: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    edit(tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})


def configure(adapter: Path, **fields: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | fields))


QV = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "target_modules": QV}),
    "all-linear": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 8, "lora_alpha": 7, "use_rslora": True, "target_modules": QV}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": [*QV, "up_proj"],
            "rank_pattern": {r"^model\.layers\.0.self_attn.v_proj": 2, "up_proj": 6},
            "alpha_pattern": {r"layers\.1\..*": 32, "q_proj": 3},
        },
    ),
    "modules-to-save": ("llama", {"r": 4, "target_modules": QV, "modules_to_save": ["lm_head", "norm"]}),
    "saved-embeddings": ("llama", {"r": 4, "target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "bias-all": ("qwen2", {"r": 4, "target_modules": QV, "bias": "all"}),
    "bias-lora-only": ("qwen2", {"r": 4, "target_modules": QV, "bias": "lora_only"}),
    "lora-bias": ("qwen2", {"r": 4, "target_modules": QV, "lora_bias": True}),
    "embedding": ("llama", {"r": 4, "target_modules": [*QV, "embed_tokens"]}),
    "head": ("llama", {"r": 4, "target_modules": [*QV, "embed_tokens", "lm_head"]}),
    "tied-embedding": ("qwen2", {"r": 4, "target_modules": [*QV, "embed_tokens"]}),
    "tied-head": ("qwen2", {"r": 4, "target_modules": [*QV, "lm_head"]}),
    "tied-both": ("qwen2", {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "tied-together": ("qwen2", {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "tied-saved": ("qwen2", {"r": 4, "target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    "tied-saved-head": ("qwen2", {"r": 4, "target_modules": QV, "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "all"}),
    "conv1d-embeddings": ("gpt2", {"r": 4, "target_modules": ["c_attn", "wte", "wpe"]}),
    "scaled-embeddings": ("gemma3_text", {"r": 4, "target_modules": [*QV, "embed_tokens"]}),
    "some-layers": ("llama", {"r": 4, "target_modules": QV, "layers_to_transform": [1]}),
    "gaussian": ("llama", {"r": 4, "target_modules": QV, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"r": 4, "target_modules": QV, "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_expert_answers_as_the_adapter_does(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    base = save_random(tmp_path / "base", config_of(family))
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    wanted = as_peft(base, adapter)
    import_adapter(base, adapter, tmp_path / "experts" / "a")
    Delta.open(tmp_path / "experts" / "a").verify(base)
    restore(base, tmp_path / "experts" / "a", tmp_path / "restored")

    ids = torch.tensor(prompts_of(40))
    expected, plain = logits(wanted, ids), logits(AutoModelForCausalLM.from_pretrained(base), ids)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "restored"), ids)
    moved = (expected - plain).norm()
    assert moved > 0.02 * plain.norm(), "the adapter must count"
    assert (found - expected).norm() < 2e-3 * moved

    models = {"base": AutoModelForCausalLM.from_pretrained(base), "a": wanted}
    assert_alike(base, tmp_path / "experts", models, ["a", "base", "a"], prompts_of(5, 9, 20))


GROWN = {
    "saved": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized": ("llama", {}),
    "resized-tied": ("qwen2", {}),
    "resized-lora": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "half-saved": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "half-saved-tied": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "resized-lora-tied": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.mark.parametrize("case", GROWN)
def test_a_grown_vocabulary(case: str, tmp_path: Path) -> None:
    family, settings = GROWN[case]
    base = save_random(tmp_path / "base", config_of(family))
    adapter = save_adapter(base, tmp_path / "adapter", grow=5, **{"r": 4, "target_modules": ["q_proj"], **settings})
    wanted = as_peft(base, adapter, grow=5)
    import_adapter(base, adapter, tmp_path / "experts" / "a")
    restore(base, tmp_path / "experts" / "a", tmp_path / "restored")
    prompts = prompts_of(6, 9)
    prompts[0][2] = VOCABULARY + 4
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert found.config.vocab_size == VOCABULARY + 5
    ids = torch.tensor(prompts[:1])
    expected = logits(wanted, ids)
    assert (logits(found, ids) - expected).norm() < 1e-3 * expected.norm()
    assert_alike(base, tmp_path / "experts", {"a": wanted}, ["a", "a"], prompts)


def test_rows_that_are_the_bases_cost_nothing(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", grow=5, r=4, target_modules=["q_proj"])
    report = import_adapter(base, adapter, tmp_path / "expert")
    sites = Delta.open(tmp_path / "expert").sites
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert sites[name].nbytes == 5 * 32 * 4
    assert (report.low_rank, report.replaced) == (2, 2)
    assert report.shared == len(sites) - 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_factors_are_kept_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=QV)
    change(adapter, lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))
    import_adapter(base, adapter, tmp_path / "expert")
    site, tensors = Delta.open(tmp_path / "expert").sites[f"{Q}.weight"], load_file(adapter / WEIGHTS)
    a, b = (tensors[f"base_model.model.{Q}.lora_{letter}.weight"].double() for letter in "AB")
    assert isinstance(site, LowRankSite)
    assert torch.equal(2.0**site.exponent * site.low_rank.u.double() @ site.low_rank.v.double(), 2 * b @ a)
    assert site.relative_error == 0 and site.nbytes == 2 * 4 * (32 + 32)


def test_the_manifest_tells_what_rounding_costs(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=5, target_modules=QV)
    import_adapter(base, adapter, tmp_path / "expert")
    site, tensors = Delta.open(tmp_path / "expert").sites[f"{Q}.weight"], load_file(adapter / WEIGHTS)
    a, b = (tensors[f"base_model.model.{Q}.lora_{letter}.weight"].double() for letter in "AB")
    wanted = 5 / 4 * b @ a
    missed = float((reference.dense(site).double() - wanted).norm() / wanted.norm())
    assert 0 < missed < 1e-3 and site.relative_error == pytest.approx(missed, abs=2e-6)


def test_factors_far_apart_in_size_survive(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=QV)

    def stretch(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            tensors[key] *= 3e-9 if "lora_A" in key else 1e7
        for letter, size in (("A", 1e-12), ("B", 1e10)):  # one component alone, on top
            factor = tensors[f"base_model.model.{Q}.lora_{letter}.weight"]
            (factor[0] if letter == "A" else factor[:, 0]).mul_(size)

    change(adapter, stretch)
    import_adapter(base, adapter, tmp_path / "expert")
    error = Delta.open(tmp_path / "expert").sites[f"{Q}.weight"].relative_error
    assert error is not None and error < 1e-3


def test_keys_may_hold_the_adapters_name(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=QV)
    import_adapter(base, adapter, tmp_path / "expert")

    def name_it(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    change(adapter, name_it)
    import_adapter(base, adapter, tmp_path / "named")
    expected, found = (load_file(tmp_path / name / "delta.safetensors") for name in ("expert", "named"))
    assert expected and all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    another = f"base_model.model.{Q}.lora_A.other.weight"
    change(adapter, lambda tensors: tensors.update({another: torch.ones(4, 32)}))
    with pytest.raises(UnsupportedModelError, match="one adapter, found default, other"):
        import_adapter(base, adapter, tmp_path / "none")


def test_an_untrained_adapter_is_the_base(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=QV)
    change(adapter, lambda t: [t[key].zero_() for key in t if "lora_B" in key])
    report = import_adapter(base, adapter, tmp_path / "expert")
    assert report.low_rank == report.replaced == 0


def test_weights_that_were_saved_and_not_changed_are_shared(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=QV, modules_to_save=["lm_head"])
    head = Checkpoint.open(base).tensor("lm_head.weight")
    change(adapter, lambda tensors: tensors["base_model.model.lm_head.weight"].copy_(head))
    import_adapter(base, adapter, tmp_path / "expert")
    assert Delta.open(tmp_path / "expert").sites["lm_head.weight"].kind == "shared"


def test_a_bf16_base_keeps_its_dtype(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(narrow, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=QV, modules_to_save=["norm"])
    import_adapter(base, adapter, tmp_path / "expert")
    assert {site.dtype for site in Delta.open(tmp_path / "expert").sites.values()} == {torch.bfloat16}


def test_the_manifest_says_which_layer_a_site_is_part_of(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=QV, modules_to_save=["norm"])
    import_adapter(base, adapter, tmp_path / "expert")
    for site in Delta.open(tmp_path / "expert").manifest["sites"]:
        _, _, inside = site["name"].partition("model.layers.")
        assert site.get("owner") == ({"layer": int(inside.partition(".")[0])} if inside else None), site["name"]


# --- the files beside ---------------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_bases_until_the_adapter_brings_one(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    (base / "chat_template.jinja").write_text("base")
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=QV)

    def imported() -> Any:
        import_adapter(base, adapter, tmp_path / "expert")
        return AutoTokenizer.from_pretrained(tmp_path / "expert")

    found = imported()
    assert found.chat_template == "base" and len(found) == VOCABULARY
    assert (tmp_path / "expert" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    (adapter / "chat_template.jinja").write_text("adapter")
    assert imported().chat_template == "adapter"
    (adapter / "chat_template.jinja").unlink()
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    found = imported()
    assert len(found) == VOCABULARY + 1 and found.chat_template == "base"
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    assert imported().chat_template == CHAT_TEMPLATE
    (adapter / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON in"):
        imported()


@pytest.mark.parametrize("kept", ["folder", "config"])
def test_a_tokenizer_of_its_own_loses_none_of_the_bases_templates(kept: str, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    if kept == "folder":
        (base / "chat_template.jinja").write_text("base")
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
        expected: Any = {"default": "base", "tool_use": "tools"}
    else:
        config = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "base"}))
        expected = "base"
    assert AutoTokenizer.from_pretrained(base).chat_template == expected
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=QV)
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    import_adapter(base, adapter, tmp_path / "expert")
    found = AutoTokenizer.from_pretrained(tmp_path / "expert")
    assert found.chat_template == expected and len(found) == VOCABULARY + 1
    (adapter / "chat_template.jinja").write_text("adapter")
    import_adapter(base, adapter, tmp_path / "expert")
    assert AutoTokenizer.from_pretrained(tmp_path / "expert").chat_template == "adapter"


@pytest.mark.parametrize(
    ("named", "noted"),
    [
        ("someone/other-7b", True),
        ("/home/someone/other", True),
        ("someone/BASE", False),
        ("/elsewhere/base", False),
        ("", False),
        (None, False),
    ],
)
def test_an_adapter_that_names_another_base_is_noted(made: Path, adapter: Path, named: Any, noted: bool) -> None:
    assert not import_adapter(made / "base", adapter, adapter.parent / "expert").notes
    configure(adapter, base_model_name_or_path=named)
    notes = import_adapter(made / "base", adapter, adapter.parent / "expert").notes
    assert len(notes) == noted and all(f"says that its base is {named}, found" in note for note in notes)


def test_an_adapter_of_a_folder_that_is_here_is_of_that_folder(made: Path, adapter: Path, tmp_path: Path) -> None:
    other = save_random(tmp_path / "elsewhere" / "base", config_of("llama"), seed=5)
    configure(adapter, base_model_name_or_path=str(other))
    [note] = import_adapter(made / "base", adapter, tmp_path / "expert").notes
    assert f"says that its base is {other}" in note


def test_only_a_head_of_its_own_unties_the_config(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("qwen2"))
    for name, targets in (("plain", QV), ("head", [*QV, "lm_head"])):
        adapter = save_adapter(base, tmp_path / name, r=4, target_modules=targets)
        import_adapter(base, adapter, tmp_path / f"expert-{name}")
        tied = AutoConfig.from_pretrained(tmp_path / f"expert-{name}").tie_word_embeddings
        assert tied == (name == "plain")
        assert ("lm_head.weight" in Delta.open(tmp_path / f"expert-{name}").sites) == (name == "head")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    save_random(root / "base", config_of("llama"))
    save_adapter(root / "base", root / "adapter", r=4, target_modules=QV)
    return root


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((made / "adapter" / name).read_bytes())
    return folder


def refused(made: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        import_adapter(made / "base", adapter, adapter.parent / "expert")
    assert {path.name for path in adapter.parent.iterdir()} == {"adapter"}


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"trainable_token_indices": [3]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"megatron_config": {"x": 1}},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 0.1}},
        {"arrow_config": {"top_k": 2}},
        {"monteclora_config": {"num_samples": 2}},
        {"velora_config": {"num_groups": 2}},
        {"a_field_of_next_year": "on"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"peft_type": "ADALORA"},
        {"peft_type": None},
    ],
    ids=lambda fields: "-".join(f"{name}={value}" for name, value in fields.items())[:40],
)
def test_other_arithmetic_is_refused_by_its_field(fields: dict[str, Any], made: Path, adapter: Path) -> None:
    configure(adapter, **fields)
    refused(made, adapter, UnsupportedModelError, next(iter(fields)))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"kind": IA3Config}])
def test_what_peft_saves_of_other_methods_is_refused(settings: dict[str, Any], made: Path, tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj", "down_proj"]}
    more = {"feedforward_modules": ["down_proj"]} if "kind" in settings else {"r": 4}
    folder = save_adapter(made / "base", tmp_path / "adapter", **targets, **more, **settings)
    refused(made, folder, UnsupportedModelError, "use_dora|init_lora_weights|peft_type")


def test_converted_pissa_is_plain_lora(tmp_path: Path) -> None:
    """What the hint of the refusal says to do."""
    base = save_random(tmp_path / "base", config_of("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=QV, init_lora_weights="pissa"))
        tuned.peft_config["default"].init_lora_weights = True
        tuned.save_pretrained(tmp_path / "start")
        tuned.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
        ids = torch.tensor(prompts_of(12))
        expected = logits(tuned.eval(), ids)
        tuned.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    import_adapter(base, tmp_path / "adapter", tmp_path / "expert")
    restore(base, tmp_path / "expert", tmp_path / "restored")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "restored"), ids)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_half_an_adapter_is_refused(made: Path, adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (adapter / WEIGHTS).write_bytes(whole[:size])
        refused(made, adapter, CheckpointError, f"expected a whole {WEIGHTS}")
    (adapter / WEIGHTS).write_bytes(whole)
    for letter in "AB":
        change(adapter, lambda tensors, key=f"base_model.model.{Q}.lora_{letter}.weight": tensors.pop(key))
        refused(made, adapter, CheckpointError, rf"lora_A.weight and lora_B.weight of {Q}, found lora_[AB]")
        (adapter / WEIGHTS).write_bytes(whole)
    save_file({}, adapter / WEIGHTS)
    refused(made, adapter, CheckpointError, "expected tensors, found none")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(made, adapter, CheckpointError, f"expected {WEIGHTS}, found adapter_model.bin.*\n.*safe_serialization")
    (adapter / CONFIG).write_text("{")
    refused(made, adapter, CheckpointError, "adapter_config.json")
    (adapter / CONFIG).unlink()
    refused(made, adapter, CheckpointError, "adapter_config.json")


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(made: Path, adapter: Path, letter: str, value: float) -> None:
    key = f"base_model.model.{Q}.lora_{letter}.weight"
    change(adapter, lambda tensors: tensors[key].view(-1)[5].fill_(value))
    refused(made, adapter, NonFiniteError, f"{Q}.lora_{letter}.weight")


def test_an_adapter_of_another_base_is_refused(made: Path, adapter: Path, tmp_path: Path) -> None:
    key, whole = f"base_model.model.{Q}", (adapter / WEIGHTS).read_bytes()
    for letter, axis in (("A", 1), ("B", 0), ("A", 0)):
        name = f"{key}.lora_{letter}.weight"
        change(adapter, lambda t, n=name, a=axis: t.update({n: t[n].narrow(a, 0, t[n].shape[a] - 1).contiguous()}))
        refused(made, adapter, ArchitectureError, rf"expected factors \(4, 32\) and \(32, 4\) of {Q}")
        (adapter / WEIGHTS).write_bytes(whole)
    configure(adapter, r=5)
    refused(made, adapter, ArchitectureError, r"expected factors \(5, 32\)")
    for r, alpha in ((0, 8), ("4", 8), (4, "8"), (4, float("nan"))):
        configure(adapter, r=r, lora_alpha=alpha)
        refused(made, adapter, CheckpointError, "a positive r and a number lora_alpha")
    for patterns in ({"(": 4}, ["q_proj"], 7):
        configure(adapter, r=4, lora_alpha=8, rank_pattern=patterns)
        refused(made, adapter, CheckpointError, "modules and numbers in rank_pattern")
    configure(adapter, rank_pattern={})
    change(adapter, lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 32)}))
    refused(made, adapter, ArchitectureError, "found score.weight in the adapter")
    (adapter / WEIGHTS).write_bytes(whole)
    renamed = {"base_model.model.model.layers.7.mlp.up_proj.lora_" + x + ".weight": torch.ones(1, 1) for x in "AB"}
    change(adapter, lambda t: t.update(renamed))
    refused(made, adapter, ArchitectureError, r"layers\.7\.mlp\.up_proj")
    (adapter / WEIGHTS).write_bytes(whole)
    change(adapter, lambda t: t.update({f"{key}.lora_magnitude_vector": torch.ones(32)}))
    refused(made, adapter, UnsupportedModelError, "lora_magnitude_vector")


def test_shapes_of_whole_weights_are_checked(made: Path, adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    for name, shape in (
        ("model.norm.weight", (33,)),
        ("model.embed_tokens.weight", (VOCABULARY - 1, 32)),
        ("model.embed_tokens.weight", (VOCABULARY + 1, 31)),
    ):
        change(adapter, lambda t, n=name, s=shape: t.update({f"base_model.model.{n}": torch.ones(s)}))
        refused(made, adapter, ArchitectureError, f"expected {name} in the base's shape")
        (adapter / WEIGHTS).write_bytes(whole)
    grown = {"base_model.model.model.embed_tokens.weight": torch.ones(VOCABULARY + 1, 32)}
    change(adapter, lambda t: t.update(grown))
    refused(made, adapter, ArchitectureError, "as many rows in embeddings and head")


def test_a_bias_that_the_base_has_not_is_refused(made: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save_adapter(made / "base", tmp_path / "adapter", r=4, target_modules=QV, lora_bias=True)
    refused(made, folder, UnsupportedModelError, "lora_bias")


def test_a_target_that_is_something_else_is_kept(made: Path, adapter: Path) -> None:
    with pytest.raises(OutputError, match="something else"):
        import_adapter(made / "base", adapter, made / "base")


# --- the native entry ---------------------------------------------------------------------------------------------


def entry(name: str, **fields: Any) -> str:
    plain = {"kind": "shared", "shape": [32], "dtype": "F32", "bytes": 0, "bpw": 0.0, "relative_error": 0.0}
    return json.dumps({"name": name, **plain, **fields})


def test_given_sites_are_checked_against_the_base(made: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(made / "base")
    rest = {name: entry(name, shape=list(base.shape(name))) for name in base.names()}

    def write(changed: dict[str, str | None], *tensors: bytes) -> None:
        sites = [text for text in (rest | changed).values() if text is not None]
        given = lambda name: list(tensors) if changed.get(name) else []  # noqa: E731
        _native.write(base.native, tmp_path / "delta", sites, given, [], "{}", "", lambda *_: None)

    norm, q = "model.norm.weight", f"{Q}.weight"
    for error, match, changed, tensors in (
        (ArchitectureError, f"a site for the base's parameter {norm}", {norm: None}, ()),
        (ArchitectureError, "found other", {"other": entry("other")}, ()),
        (ArchitectureError, norm, {norm: entry(norm, shape=[31])}, ()),
        (ArchitectureError, norm, {norm: entry(norm, dtype="F16")}, ()),
        (ArchitectureError, q, {q: entry(q, kind="low_rank", shape=[32, 31], rank=1)}, ()),
        (ValueError, "one site of each name", {"again": entry(norm)}, ()),
        (ValueError, "missing field", {norm: '{"name": "x"}'}, ()),
        (FormatError, "a rank and no codes", {q: entry(q, kind="low_rank", shape=[32, 32])}, ()),
        (FormatError, "expected 1 tensors", {norm: entry(norm, kind="replaced")}, ()),
        (ValueError, "expected 128 bytes", {norm: entry(norm, kind="replaced")}, (bytes(4),)),
        (NonFiniteError, f"inf in {norm}/whole", {norm: entry(norm, kind="replaced")}, (b"\0\0\x80\x7f" * 32,)),
    ):
        with pytest.raises(error, match=match):
            write(changed, *tensors)
        assert not list(tmp_path.iterdir())
    write({norm: entry(norm, kind="replaced")}, bytes(128))
    Delta.open(tmp_path / "delta").verify(base)


def test_what_python_raises_comes_back_and_nothing_stays(made: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(made / "base")
    sites = [entry(name, shape=list(base.shape(name))) for name in base.names()]

    def fail(*_: object) -> list[bytes]:
        raise RuntimeError("no more")

    for tensors, progress in ((fail, lambda *_: None), (lambda _: [], fail)):
        with pytest.raises(RuntimeError, match="no more"):
            _native.write(base.native, tmp_path / "delta", sites, tensors, [], "{}", "", progress)
        assert not list(tmp_path.iterdir())

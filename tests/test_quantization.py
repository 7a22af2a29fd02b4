"""Checkpoints that another quantizer made, and GGUF files: refused by name wherever a checkpoint is given."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import config_of, save_finetune, save_random
from meswitch import (
    CompressOptions,
    Delta,
    Engine,
    calibrate,
    compress,
    distill,
    evaluate,
    evaluate_quantized,
    import_adapter,
    measure_sensitivity,
    quantize,
    restore,
    train_router,
)
from meswitch.errors import CheckpointError, MeswitchError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.config import load_config
from test_adapter import save_adapter
from test_cli import run
from test_smol import write_gguf

WEIGHTS = "model.safetensors"
Packed = Callable[[Tensor], dict[str, Tensor]]
"""The tensors that stand for a linear's weight `[out, in]`, by what follows the module's name."""


def codes(suffix: str, dtype: torch.dtype, scale: str = "scales") -> Packed:
    """Codes of a dtype, and a scale for each row."""
    return lambda w: {suffix: torch.zeros(len(w), 4).to(dtype), scale: torch.ones(len(w), 1)}


def float8(scale: str) -> Packed:
    """The weight in float8, and one scale for all of it: a block of 128 × 128 at most."""
    return lambda w: {"weight": w.to(torch.float8_e4m3fn), scale: torch.ones(1, 1)}


def plain(w: Tensor) -> dict[str, Tensor]:
    return {"weight": w}


METHODS: dict[str, tuple[Packed, dict[str, Any], str]] = {
    "bitsandbytes 4-bit": (
        lambda w: {
            "weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(w.numel() // 64),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(79, dtype=torch.uint8),
        },
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"quantization_config: bitsandbytes, \S+ in U8",
    ),
    "bitsandbytes 8-bit": (
        codes("weight", torch.int8, "SCB"),
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        r"bitsandbytes, \S+proj.weight in I8",
    ),
    "gptq": (
        lambda w: codes("qweight", torch.int32)(w) | codes("qzeros", torch.int32)(w),
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        r"quantization_config: gptq, \S+.qweight in I32",
    ),
    "awq": (
        codes("qweight", torch.int32),
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        r"awq, \S+.qweight in I32",
    ),
    "torchao": (
        codes("_weight_qdata", torch.int8, "_weight_scale"),
        {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}},
        r"torchao, \S+._weight_qdata in I8",
    ),
    "fp8": (
        float8("weight_scale_inv"),
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        r"fp8, \S+.weight in F8_E4M3",
    ),
    "compressed-tensors, packed": (
        codes("weight_packed", torch.int32, "weight_scale"),
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        r"compressed-tensors, \S+.weight_packed in I32",
    ),
    "compressed-tensors, 16 bits with scales": (
        lambda w: {"weight": w, "weight_scale": torch.ones(len(w), 1)},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "dense"}},
        r"compressed-tensors, \S+.weight_scale in F32",
    ),
    "an older compressed-tensors": (
        codes("weight_packed", torch.int32, "weight_scale"),
        {"compression_config": {"quant_method": "compressed-tensors"}},
        r"compression_config: compressed-tensors",
    ),
    "mxfp4": (
        lambda w: {"weight_blocks": torch.zeros(len(w), 1, 16, dtype=torch.uint8)},
        {"quantization_config": {"quant_method": "mxfp4"}},
        r"mxfp4, \S+_blocks in U8",
    ),
    "modelopt": (
        codes("weight", torch.uint8, "weight_scale"),
        {"quantization_config": {"quant_algo": "NVFP4"}},
        r"quantization_config: NVFP4, \S+.weight in U8",
    ),
    "aqlm": (
        codes("codes", torch.int16),
        {"quantization_config": {"quant_method": "aqlm"}},
        r"aqlm, \S+.codes in I16",
    ),
    "hqq": (codes("W_q", torch.uint8), {"quantization_config": {"quant_method": "hqq"}}, r"hqq, \S+.W_q in U8"),
    "mlx": (
        codes("weight", torch.uint32),
        {"quantization": {"group_size": 64, "bits": 4}},
        r"quantization: 4 bits, \S+ in U32",
    ),
    "bitnet": (
        codes("weight", torch.uint8, "weight_scale"),
        {"quantization_config": {"quant_method": "bitnet"}},
        r"quantization_config: bitnet",
    ),
    "bitnet, 16 bits": (
        plain,
        {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}},
        r"quantization_config: bitnet, weights that every product rounds",
    ),
    "named by the text model": (
        codes("qweight", torch.int32),
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        r"gptq, \S+ in I32",
    ),
    "no name, float8": (float8("weight_scale"), {}, r"\(\S+proj.weight in F8_E4M3\)"),
    "no name, whole numbers": (codes("weight", torch.int8), {}, r"\(\S+proj.weight in I8\)"),
    "no name, packed numbers": (codes("qweight", torch.int32), {}, r"\(\S+proj.qweight in I32\)"),
}


def packed(folder: Path, out: Path, tensors: Packed, config: dict[str, Any]) -> Path:
    """A copy of a checkpoint with the weights of its linears packed, and fields in its config."""
    shutil.copytree(folder, out)
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        module, _, leaf = name.rpartition(".")
        parts = tensors(tensor) if "proj" in name else {leaf: tensor}
        state |= {f"{module}.{part}": found.contiguous() for part, found in parts.items()}
    save_file(state, out / WEIGHTS, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text()) | config))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune, a delta, an adapter, a quantized base and text; and the base as GPTQ and GGUF."""
    folder = tmp_path_factory.mktemp("quantization")
    base = save_random(folder / "base", config_of("llama"))
    compress(base, save_finetune(folder / "math", base, seed=1), folder / "delta")
    quantize(base, folder / "base-4bit")
    save_adapter(base, folder / "adapter", r=4, target_modules=["q_proj"])
    packed(base, folder / "gptq", *METHODS["gptq"][:2])
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "model-Q4_K_M.gguf")
    lines = [{"prompt": f"{number} and {number}", "expert": "ab"[number % 2]} for number in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_refused_by_name(method: str, folder: Path, tmp_path: Path) -> None:
    tensors, config, says = METHODS[method]
    quantized = packed(folder / "base", tmp_path / "quantized", tensors, config)
    with pytest.raises(UnsupportedModelError) as caught:
        Checkpoint.open(quantized)
    assert re.search(rf"found quantized ones .*{says}.*: {quantized}$", caught.value.message)
    assert caught.value.hint is not None and "16-bit model" in caught.value.hint
    with pytest.raises(UnsupportedModelError, match="found quantized ones"):
        Engine(quantized)


Given = Callable[[Path, Path, Path], Any]
"""Gives the first path to an entry point; what goes with it lies in the second, and the third is to be written."""

ENTRIES: dict[str, Given] = {
    "engine": lambda given, folder, out: Engine(given),
    "engine with an expert": lambda given, folder, out: Engine(given, {"math": folder / "delta"}),
    "compress, base": lambda given, folder, out: compress(given, folder / "math", out),
    "compress, fine-tune": lambda given, folder, out: compress(folder / "base", given, out),
    "quantize": lambda given, folder, out: quantize(given, out, CompressOptions(bits=4)),
    "calibrate": lambda given, folder, out: calibrate(given, folder / "text.jsonl"),
    "sensitivity": lambda given, folder, out: measure_sensitivity(
        given, folder / "text.jsonl", calibrate(folder / "base", folder / "text.jsonl")
    ),
    "distill": lambda given, folder, out: distill(folder / "base", given, folder / "delta", out, folder / "text.jsonl"),
    "evaluate, base": lambda given, folder, out: evaluate(
        given, folder / "delta", folder / "math", folder / "text.jsonl"
    ),
    "evaluate, against": lambda given, folder, out: evaluate(
        folder / "base", folder / "delta", given, folder / "text.jsonl"
    ),
    "evaluate a quantized base": lambda given, folder, out: evaluate_quantized(
        given, folder / "base-4bit", folder / "text.jsonl"
    ),
    "router": lambda given, folder, out: train_router(given, folder / "text.jsonl", out),
    "restore": lambda given, folder, out: restore(given, folder / "delta", out),
    "verify": lambda given, folder, out: Delta.open(folder / "delta").verify(given),
    "import": lambda given, folder, out: import_adapter(given, folder / "adapter", out),
}


@pytest.mark.parametrize("given", ["gptq", "gguf", "gguf/model-Q4_K_M.gguf"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_before_it_reads_weights(
    entry: str, given: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = UnsupportedModelError if given == "gptq" else CheckpointError
    monkeypatch.setattr("meswitch.huggingface.models.load_weights", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(expected, match="gptq, " if given == "gptq" else "found (a|the) GGUF file") as caught:
        ENTRIES[entry](folder / given, folder, tmp_path / "out")
    assert str(folder / given) in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["gptq", "gguf", "gguf/model-Q4_K_M.gguf"])
@pytest.mark.parametrize(
    "words",
    [
        ["compress", "GIVEN", "math", "-o", "OUT"],
        ["quantize", "GIVEN", "-o", "OUT"],
        ["generate", "GIVEN", "one"],
        ["router", "train", "GIVEN", "--data", "text.jsonl", "-o", "OUT"],
        ["evaluate", "GIVEN", "delta", "--against", "math", "--data", "text.jsonl"],
    ],
    ids=lambda words: " ".join(words),
)
def test_the_command_says_what_to_do_instead(
    given: str, words: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    found = run(*[{"GIVEN": given, "OUT": tmp_path / "out"}.get(word, word) for word in words])
    assert found.exit_code == 1 and "Traceback" not in found.stderr
    assert "give the 16-bit" in " ".join(found.stderr.split())


def test_what_quantize_made_is_no_input_but_as_a_base(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="in the fine-tune, found a quantized model"):
        compress(folder / "base", folder / "base-4bit", tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="in the model, found a quantized model"):
        quantize(folder / "base-4bit", tmp_path / "out")


# --- what the hints say ----------------------------------------------------------------------------------------------


def follow(error: MeswitchError, out: Path) -> Path:
    """The checkpoint that the calls in an error's hint write."""
    assert error.hint is not None
    calls = re.findall(r'Auto\w+\.from_pretrained\(.+?\)\.save_pretrained\("OUT"\)', error.hint)
    assert calls
    for call in calls:
        names = {name: getattr(transformers, name) for name in re.findall(r"\b[A-Z]\w+(?:LM|Tokenizer|Config)\b", call)}
        eval(call.replace('"OUT"', repr(str(out))), names)
    return out


@pytest.mark.parametrize("given", ["gguf", "gguf/model-Q4_K_M.gguf"])
def test_the_hint_makes_a_checkpoint_of_a_gguf_file(given: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder / given)
    written = follow(caught.value, tmp_path / "written")
    quantize(written, tmp_path / "quantized")
    for base in (written, tmp_path / "quantized"):
        with Engine(base) as engine:
            assert engine.generate("one two", max_new_tokens=2).token_ids


def test_the_hint_undoes_fp8(folder: Path, tmp_path: Path) -> None:
    quantized = packed(folder / "base", tmp_path / "fp8", *METHODS["fp8"][:2])
    with pytest.raises(UnsupportedModelError) as caught:
        Checkpoint.open(quantized)
    written = Checkpoint.open(follow(caught.value, tmp_path / "written"))
    for name, tensor in load_file(quantized / WEIGHTS).items():
        assert name.endswith("_scale_inv") or torch.equal(written.tensor(name).float(), tensor.float())


def test_the_hint_undoes_mxfp4(tmp_path: Path) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    config = config_of("gpt_oss", **layers, **sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    base, quantized = save_random(tmp_path / "base", config), tmp_path / "mxfp4"
    shutil.copytree(base, quantized)
    state = load_file(base / WEIGHTS)
    for name in [name for name in state if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        stack, rows, columns = state.pop(name).mT.shape
        blocks = columns // 32
        state[f"{name}_blocks"] = torch.randint(256, (stack, rows, blocks, 16)).to(torch.uint8)
        state[f"{name}_scales"] = torch.full((stack, rows, blocks), 120, dtype=torch.uint8)
    save_file(state, quantized / WEIGHTS, metadata={"format": "pt"})
    named = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (quantized / "config.json").write_text(json.dumps(named))
    with pytest.raises(UnsupportedModelError, match=r"mxfp4, \S+_blocks in U8") as caught:
        Engine(quantized)
    written = follow(caught.value, tmp_path / "written")
    assert Checkpoint.open(written).names() == Checkpoint.open(base).names()


def test_pickles_of_a_quantizer_are_named(folder: Path, tmp_path: Path) -> None:
    quantized = packed(folder / "base", tmp_path / "torchao", *METHODS["torchao"][:2])
    (quantized / WEIGHTS).rename(quantized / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pickles \(quantization_config: torchao\)[^$]*16-bit model"):
        Checkpoint.open(quantized)


# --- a method that is named and not used -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "torchao"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8"},
        {"quant_method": "nf4"},
        {"bits": 4},
    ],
    ids=str,
)
def test_plain_weights_are_served_whatever_their_config_says(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    base = packed(folder / "base", tmp_path / "base", plain, {"quantization_config": settings})
    finetune = packed(folder / "math", tmp_path / "math", plain, {"quantization_config": settings})
    assert compress(base, finetune, tmp_path / "delta").config_changes == {}
    answers = []
    for served, delta in ((folder / "base", folder / "delta"), (base, tmp_path / "delta")):
        with Engine(served, {"math": delta}, exact=True) as engine:
            found = engine.generate(["one two"] * 2, expert=["base", "math"], max_new_tokens=4)
            answers.append([answer.token_ids for answer in found])
    assert answers[0] == answers[1]
    evaluate(base, tmp_path / "delta", finetune, folder / "text.jsonl")
    train_router(base, folder / "text.jsonl", tmp_path / "router")


def test_a_method_of_a_part_of_the_model_is_dropped_too(tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "gptq"}}
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **settings}, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_config(tmp_path)
    assert not hasattr(loaded, "quantization_config") and not hasattr(loaded.text_config, "quantization_config")

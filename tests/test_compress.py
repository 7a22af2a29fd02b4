"""Compress and restore on whole checkpoints, and what they refuse."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import VOCABULARY, config_of, save_finetune, save_random
from forks import forked
from meswitch import reference
from meswitch.compression.calibration import Calibration
from meswitch.compression.job import compress
from meswitch.compression.options import CompressOptions
from meswitch.compression.presets import PRESETS
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.errors import ArchitectureError, BaseMismatchError, CheckpointError, NonFiniteError, OutputError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.progress import Progress
from meswitch.site import QuantizedSite, Site, Sparse

WEIGHTS = "model.safetensors"


def pair(root: Path, family: str = "llama", *, grow: int = 0) -> tuple[Path, Path]:
    base = save_random(root / "base", config_of(family))
    return base, save_finetune(root / "finetune", base, seed=1, grow=grow)


def change(folder: Path, name: str, edit: object) -> None:
    """Rewrites one tensor of a checkpoint; `edit` is a function of it, or None to drop it."""
    tensors = load_file(folder / WEIGHTS)
    tensor = tensors.pop(name)
    if callable(edit):
        tensors[name] = edit(tensor)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_forked_process_compresses_too(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama", vocab_size=20_000))  # enough for more threads than one
    finetune = save_finetune(tmp_path / "finetune", base, seed=1)
    compress(base, finetune, tmp_path / "ours")

    def work() -> None:
        torch.set_num_threads(1)  # torch's own operators would wait for their threads
        callers = set()
        compress(base, finetune, tmp_path / "childs", progress=lambda _: callers.add(threading.get_ident()))
        assert callers == {threading.get_ident()}, "callbacks run on the calling thread"
        Delta.open(tmp_path / "childs").verify(base)

    assert forked(work) == 0
    assert (tmp_path / "childs/delta.safetensors").read_bytes() == (tmp_path / "ours/delta.safetensors").read_bytes()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_manifest_tells_the_error_that_restore_leaves(tmp_path: Path, family: str, preset: str) -> None:
    base, finetune = pair(tmp_path, family)
    report = compress(base, finetune, tmp_path / "delta", CompressOptions(preset=preset))
    delta = Delta.open(tmp_path / "delta")
    delta.verify(base)
    assert set(delta.sites) == set(Checkpoint.open(finetune).names())
    assert report.bytes == delta.nbytes
    restore(base, tmp_path / "delta", tmp_path / "restored")
    ours, theirs, found = (load_file(f / WEIGHTS) for f in (base, finetune, tmp_path / "restored"))
    for name, site in delta.sites.items():
        missed = (found[name] - theirs[name]).norm() / (theirs[name] - ours[name]).norm()
        assert site.relative_error is not None
        assert missed == pytest.approx(site.relative_error, abs=3e-3), name
        assert found[name].dtype == theirs[name].dtype
    AutoModelForCausalLM.from_pretrained(tmp_path / "restored")


def test_unbiased_scales_keep_a_delta_along_itself(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (base, finetune))
    for preset, least, most in (("small", 0.97, 1.03), ("bitdelta", 0.5, 0.75)):
        compress(base, finetune, tmp_path / preset, CompressOptions(preset=preset))
        for name, site in Delta.open(tmp_path / preset).sites.items():
            if site.kind == "quantized":
                delta = theirs[name] - ours[name]
                assert least < float((reference.dense(site) * delta).sum() / delta.square().sum()) < most, name


def test_conv1d_weights_are_channels_by_output(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path, "gpt2")
    compress(base, finetune, tmp_path / "delta")
    sites = Delta.open(tmp_path / "delta").sites
    name = next(name for name in sites if name.endswith("c_attn.weight"))
    assert sites[name].transposed
    assert (sites[name].out_features, sites[name].in_features) == (96, 32)
    assert sites[name].shape == (32, 96)


def test_sharded_checkpoints_are_the_same(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(finetune, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    compress(base, finetune, tmp_path / "one")
    compress(base, tmp_path / "sharded", tmp_path / "many")
    one, many = Delta.open(tmp_path / "one"), Delta.open(tmp_path / "many")
    assert {name: site.nbytes for name, site in one.sites.items()} == {
        name: site.nbytes for name, site in many.sites.items()
    }
    restore(base, tmp_path / "many", tmp_path / "restored", shard_bytes=20_000)
    assert len(list((tmp_path / "restored").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert torch.equal(again.lm_head.weight, Checkpoint.open(tmp_path / "restored").tensor("lm_head.weight"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_fine_tune_of_a_narrow_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base, finetune = pair(tmp_path)
    narrow = {name: tensor.to(dtype) for name, tensor in load_file(base / WEIGHTS).items()}
    save_file(narrow, base / WEIGHTS, metadata={"format": "pt"})
    compress(base, finetune, tmp_path / "delta")
    restore(base, tmp_path / "delta", tmp_path / "restored")
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "restored" / WEIGHTS).values())


def test_a_grown_vocabulary_keeps_its_rows_whole(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path, grow=3)
    compress(base, finetune, tmp_path / "delta")
    restore(base, tmp_path / "delta", tmp_path / "restored")
    theirs, found = (load_file(folder / WEIGHTS) for folder in (finetune, tmp_path / "restored"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][VOCABULARY:], theirs[name][VOCABULARY:])
        assert found[name].shape == theirs[name].shape


def test_what_did_not_change_costs_nothing(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    ours = load_file(base / WEIGHTS)
    change(finetune, "model.layers.0.mlp.up_proj.weight", lambda _: ours["model.layers.0.mlp.up_proj.weight"])
    half = len(ours["model.embed_tokens.weight"]) // 2
    change(
        finetune,
        "model.embed_tokens.weight",
        lambda tensor: torch.cat([tensor[:half], ours["model.embed_tokens.weight"][half:]]),
    )
    compress(base, finetune, tmp_path / "delta", CompressOptions(bits=4))
    sites = Delta.open(tmp_path / "delta").sites
    assert sites["model.layers.0.mlp.up_proj.weight"].kind == "shared"
    embedding = sites["model.embed_tokens.weight"]
    assert not reference.dense(embedding)[half:].any()
    assert embedding.nbytes < 0.7 * sites["lm_head.weight"].nbytes


@pytest.mark.parametrize("tied", ["base", "finetune", "both"])
def test_heads_tied_on_either_side(tmp_path: Path, tied: str) -> None:
    base = save_random(tmp_path / "base", config_of("llama", tie_word_embeddings=tied != "finetune"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied == "finetune":
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    other = AutoModelForCausalLM.from_config(config_of("llama", tie_word_embeddings=tied != "base"))
    other.load_state_dict(state)
    other.save_pretrained(tmp_path / "other")
    finetune = save_finetune(tmp_path / "finetune", tmp_path / "other", 5, grow=2)
    compress(base, finetune, tmp_path / "delta", CompressOptions(bits=8))
    Delta.open(tmp_path / "delta").verify(base)
    restore(base, tmp_path / "delta", tmp_path / "restored")
    ids = torch.tensor([[1, 2, VOCABULARY, VOCABULARY + 1]])
    with torch.no_grad():
        restored, wanted = (
            AutoModelForCausalLM.from_pretrained(tmp_path / f)(ids).logits for f in ("restored", "finetune")
        )
    assert restored.shape == wanted.shape
    assert (restored - wanted).abs().max() < 0.05 * wanted.abs().max()


def narrow_pair(root: Path, share: float) -> tuple[Path, Path]:
    """A bf16 base and a fine-tune that moved about `share` of each weight, mostly by a step or two."""
    base = save_random(root / "base", config_of("llama", tie_word_embeddings=False))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / WEIGHTS).items()}
    generator = torch.Generator().manual_seed(3)
    tuned = {}
    for name, tensor in tensors.items():
        moved = torch.rand(tensor.shape, generator=generator) < share
        step = (1 + 4 * torch.randn(tensor.shape, generator=generator).square()) / 128
        tuned[name] = tensor.where(~moved, (tensor.float() * (1 + step)).bfloat16())
    shutil.copytree(base, root / "finetune")
    for folder, state in ((base, tensors), (root / "finetune", tuned)):
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return base, root / "finetune"


def sparse_of(site: Site) -> Sparse | None:
    return site.sparse if isinstance(site, QuantizedSite) else None


def test_a_delta_that_is_mostly_zeros_is_sparse_and_exact(tmp_path: Path) -> None:
    base, finetune = narrow_pair(tmp_path, 0.02)
    report = compress(base, finetune, tmp_path / "delta")
    delta = Delta.open(tmp_path / "delta")
    delta.verify(base)
    restore(base, tmp_path / "delta", tmp_path / "restored")
    ours, theirs, found = (load_file(f / WEIGHTS) for f in (base, finetune, tmp_path / "restored"))
    for name, site in delta.sites.items():
        assert torch.equal(found[name], theirs[name]), name
        if (sparse := sparse_of(site)) is not None:
            assert sparse.changed == int((ours[name] != theirs[name]).sum())
    kept = [sparse for site in delta.sites.values() if (sparse := sparse_of(site)) is not None]
    assert {len(site.shape) for site in delta.sites.values() if sparse_of(site) is None} <= {1}
    entries, changed = (sum(counts) for counts in zip(*((len(s.gaps), s.changed) for s in kept), strict=True))
    assert changed <= entries < 1.5 * changed
    listed = {site["name"]: site.get("density") for site in delta.inspect()["sites"]}
    assert listed == {name: site.density for name, site in delta.sites.items()}
    codes = compress(base, finetune, tmp_path / "codes", CompressOptions(preset="me-switch", embedding_bits=2))
    assert all(sparse_of(site) is None for site in Delta.open(tmp_path / "codes").sites.values())
    assert report.bytes < codes.bytes


def test_a_delta_with_too_many_changes_is_not_sparse(tmp_path: Path) -> None:
    base, finetune = narrow_pair(tmp_path, 0.3)
    compress(base, finetune, tmp_path / "delta")
    assert all(sparse_of(site) is None for site in Delta.open(tmp_path / "delta").sites.values())


def test_bytes_go_with_the_layers_that_changed(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    ours, theirs = load_file(base / WEIGHTS), load_file(finetune / WEIGHTS)
    layer = "model.layers.1."
    save_file(
        {name: theirs[name] if name.startswith(layer) else tensor for name, tensor in ours.items()},
        finetune / WEIGHTS,
        metadata={"format": "pt"},
    )
    compress(base, finetune, tmp_path / "delta")
    delta = Delta.open(tmp_path / "delta")
    for name, site in delta.sites.items():
        assert (site.nbytes > 0) == name.startswith(layer), name
    changed = sum(site.nbytes for site in delta.sites.values())
    header = len(delta.sites) * 400
    assert (tmp_path / "delta" / "delta.safetensors").stat().st_size < changed + header


def test_more_bits_are_nearer(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    errors = []
    for bits in (1, 2, 3, 4, 8):
        compress(base, finetune, tmp_path / "delta", CompressOptions(bits=bits))
        site = Delta.open(tmp_path / "delta").sites["model.layers.0.self_attn.q_proj.weight"]
        assert site.bits == bits
        errors.append(site.relative_error or 0.0)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_calibration_favours_the_channels_that_matter(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    moments = torch.full((32,), 1e-3)
    moments[5] = 1.0
    calibration = Calibration({name: moments}, torch.zeros(VOCABULARY, dtype=torch.int64), tokens=1)
    delta = load_file(finetune / WEIGHTS)[name] - load_file(base / WEIGHTS)[name]

    def error_at_5(calibration: Calibration | None) -> float:
        compress(base, finetune, tmp_path / "delta", "me-switch", calibration=calibration)
        return float((reference.dense(Delta.open(tmp_path / "delta").sites[name]) - delta)[:, 5].norm())

    assert error_at_5(calibration) < 0.2 * error_at_5(None) + 1e-3


def test_progress_counts_every_weight(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    steps: list[Progress] = []
    compress(base, finetune, tmp_path / "delta", progress=steps.append)
    assert steps[0].done == 0
    assert steps[-1].done == steps[-1].total == Delta.open(tmp_path / "delta").parameters
    assert [step.done for step in steps] == sorted(step.done for step in steps)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def compress_as(base: Path, finetune: Path, out: Path, given: dict[str, Any], **more: Any) -> None:
    """`given`: options of a compress, and perhaps its calibration."""
    options = {name: value for name, value in given.items() if name != "calibration"}
    compress(base, finetune, out, CompressOptions(**options), calibration=given.get("calibration"), **more)


def run(stop: Callable[[int, float], bool], base: Path, finetune: Path, out: Path, **options: Any) -> list[Progress]:
    """Compresses, until `stop` says so of the number of steps and the share done. Returns the steps."""
    taken: list[Progress] = []

    def step(progress: Progress) -> None:
        taken.append(progress)
        if stop(len(taken), progress.done / progress.total):
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        compress_as(base, finetune, out, options, progress=step)
    return taken


def late(number: int, share: float) -> bool:
    return share > 0.7


def never(number: int, share: float) -> bool:
    return False


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, family: str) -> None:
    base, finetune = pair(tmp_path, family, grow=3)
    out, drawn, done = tmp_path / "delta", random.Random(family), 0
    compress(base, finetune, tmp_path / "whole")
    while not out.exists():
        most = drawn.randint(1, 6)
        steps = run(lambda number, share: number > most, base, finetune, out)  # noqa: B023  called in this turn
        assert steps[0].done == done and all(step.resumed == done for step in steps)
        done = steps[-1].done
    assert content(out) == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "finetune", "whole", "delta"}


def test_any_exception_of_progress_interrupts(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)

    def stop(step: Progress) -> None:
        raise RuntimeError(step.done)

    with pytest.raises(RuntimeError, match=r"^0$"):
        compress(base, finetune, tmp_path / "delta", progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "finetune"}, "nothing is finished"
    run(lambda number, share: number == 3, base, finetune, tmp_path / "delta")
    with pytest.raises(RuntimeError, match=r"^[1-9]"):
        compress(base, finetune, tmp_path / "delta", progress=stop)


def test_only_the_same_call_goes_on(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    seen = [
        Calibration({name: torch.full((32,), size)}, torch.zeros(VOCABULARY, dtype=torch.int64), tokens=1)
        for size in (1.0, 2.0)
    ]
    given: list[dict[str, Any]] = [
        {},
        {"bits": 1},
        {"calibration": seen[0]},
        {"calibration": seen[1]},
        {"method": "auto"},
        {"target_bytes": 60_000},
    ]
    for number, options in enumerate(given):
        taken = run(late, base, finetune, tmp_path / "delta", **options)
        assert taken[-1].resumed == 0, "another call's sites are no use"
        taken = run(never, base, finetune, tmp_path / "delta", **options)
        compress_as(base, finetune, tmp_path / str(number), options)
        assert taken[-1].resumed > 0 and content(tmp_path / "delta") == content(tmp_path / str(number))
        run(late, base, finetune, tmp_path / "delta", **options)


def test_a_killed_writer_loses_one_site_at_most(tmp_path: Path) -> None:
    """Killed anywhere, again and again."""
    tensors = {f"layers.{at:02}.weight": torch.randn(768, 1024).bfloat16() for at in range(16)}
    for name, scale in (("base", 0.0), ("finetune", 0.01)):
        (tmp_path / name).mkdir()
        changed = {name: tensor + scale * torch.randn(tensor.shape).bfloat16() for name, tensor in tensors.items()}
        save_file(changed, tmp_path / name / WEIGHTS, metadata={"format": "pt"})
    plan = {**asdict(PRESETS["default"].block), "transposed": False, "classes": []}
    plans = [{**plan, "name": name, "bits": None if "05" in name else 2} for name in tensors]
    script = (
        "import os, sys\nfrom meswitch._native import Checkpoint, compress\n"
        f"base, finetune = (Checkpoint(name, ['{WEIGHTS}']) for name in ('base', 'finetune'))\n"
        f"compress('delta', base, finetune, sys.argv[1], {plans!r}, {{}}, [], '{{}}', 'base',"
        " lambda site, done, total: os.write(1, b'%d\\n' % done))"
    )

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, out], cwd=tmp_path, stdout=subprocess.PIPE)

    start("whole").communicate()
    drawn, kills = random.Random(5), 0
    for out in map(str, range(3)):
        last = 0
        while not (tmp_path / out).exists():
            with start(out) as child:
                assert child.stdout is not None
                said = [int(line) for line in itertools.islice(child.stdout, drawn.randint(2, 4))]
                time.sleep(drawn.random() * 0.05)
                child.kill()
                said += map(int, child.stdout)
            assert said[0] >= last, "what came before the site that was last announced is done"
            last, kills = said[-1], kills + (child.returncode == -9)
        assert content(tmp_path / out) == content(tmp_path / "whole")
        assert not (tmp_path / f".{out}.incomplete").exists()
    assert kills


def refused(tmp_path: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compress(tmp_path / "base", tmp_path / "finetune", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    assert not (tmp_path / ".delta.incomplete").exists()


def test_not_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, CheckpointError, "expected a checkpoint folder, found nothing")
    (tmp_path / "base").mkdir()
    refused(tmp_path, CheckpointError, r"expected model.safetensors or model.safetensors.index.json")


def test_half_a_checkpoint(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    whole = (finetune / WEIGHTS).read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (finetune / WEIGHTS).write_bytes(whole[:size])
        refused(tmp_path, CheckpointError, "whole safetensors files")
    (finetune / WEIGHTS).write_bytes(whole)
    (base / WEIGHTS).unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, CheckpointError, "expected the shard")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../secret"}}')
    refused(tmp_path, CheckpointError, "file names without folders")
    (base / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, CheckpointError, "an index in JSON")


def test_a_missing_config(tmp_path: Path) -> None:
    _, finetune = pair(tmp_path)
    (finetune / "config.json").unlink()
    refused(tmp_path, CheckpointError, "config.json")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda tensor: tensor[:, :-1].contiguous(), "in the base's shape"),
        (lambda tensor: tensor[:-1].contiguous(), "in the base's shape"),
        (None, "expected the base's parameter"),
    ],
)
def test_mismatched_architectures(tmp_path: Path, edit: object, match: str) -> None:
    _, finetune = pair(tmp_path)
    change(finetune, "model.layers.1.mlp.up_proj.weight", edit)
    refused(tmp_path, ArchitectureError, match)


def test_a_parameter_that_the_base_has_not(tmp_path: Path) -> None:
    base, _ = pair(tmp_path)
    change(base, "model.norm.weight", None)
    refused(tmp_path, ArchitectureError, "only parameters of the base")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    _, finetune = pair(tmp_path)

    def damage(tensor: Tensor) -> Tensor:
        tensor.view(-1)[17] = value
        return tensor

    change(finetune, name, damage)
    refused(tmp_path, NonFiniteError, f"in {name} at element 17|fine-tune's {name} at element 17")


def test_something_else_at_the_target_is_kept(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    for target in (base, base / WEIGHTS):
        with pytest.raises(OutputError, match="something else"):
            compress(base, finetune, target)
    compress(base, finetune, tmp_path / "delta", "small")
    compress(base, finetune, tmp_path / "delta", "default")
    assert Delta.open(tmp_path / "delta").manifest["settings"]["preset"] == "default"
    with pytest.raises(OutputError, match="new folder"):
        restore(base, tmp_path / "delta", base)


def test_unknown_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preset of default"):
        compress(tmp_path, tmp_path, tmp_path, "tiny")
    with pytest.raises(ValueError, match="1, 2, 3, 4 or 8"):
        compress(tmp_path, tmp_path, tmp_path, CompressOptions(bits=5))


def test_restore_wants_its_own_base(tmp_path: Path) -> None:
    base, finetune = pair(tmp_path)
    compress(base, finetune, tmp_path / "delta")
    other = save_random(tmp_path / "other", config_of("llama"), seed=9)
    with pytest.raises(BaseMismatchError, match="hint: give the base"):
        restore(other, tmp_path / "delta", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_no_space_left(tmp_path: Path, small_disk: Path) -> None:
    base, finetune = pair(tmp_path)
    compress(base, finetune, tmp_path / "delta", CompressOptions(bits=8))
    with pytest.raises(Exception, match=r"No space left|os error 28"):
        restore(base, tmp_path / "delta", small_disk / "restored")
    assert not list(small_disk.iterdir())
    with pytest.raises(OSError, match="No space left") as caught:
        compress(base, finetune, small_disk / "delta", CompressOptions(bits=8))
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in small_disk.iterdir()] == [".delta.incomplete"]
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert run(never, base, finetune, small_disk / "delta", bits=8)[0].resumed > 0
    assert content(small_disk / "delta") == content(tmp_path / "delta")

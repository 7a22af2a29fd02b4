"""Delta directories from a stranger, and writers that are killed: nothing panics, nothing wrong is accepted.

    python benches/hostile.py [--mutations 3000] [--kills 60] [--seed 0]

Mutations are opened, verified and multiplied in child processes: bytes flipped, cut, moved between two directories;
fields of manifest and header, and bytes of tensors, with sizes and checksums made right; links, pipes and folders in
the place of files. Kills end compress (to a new place, and in place of a delta), rewrite and reading at a random
moment. Prints one JSON line, and ends with status 1 unless these are 0:

    panics          children that died, hung, or raised what is no error of meswitch or the operating system
    accepted_wrong  directories that verify and give another answer than the sound one, though no checksum was made
                    right; or that two readers (native kernels, plain torch) read differently
    broken          places that hold neither the old directory nor the new after a kill, or where the next writer does
                    not finish
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meswitch import Delta, compress, reference
from meswitch._native import checksum
from meswitch.errors import MeswitchError
from meswitch.kernels.products import native_matrix
from meswitch.site import ReplacedSite, SharedSite

MANIFEST, TENSORS = "meswitch.json", "delta.safetensors"
BATCH = 100  # mutations a child
SECONDS = 15  # that a mutation may take
MEMORY = 8 << 30  # bytes of address space that a child may take beyond its parent's
NUMBERS = [0, 1, -1, 2, 3, 5, 255, 2**31 - 1, 2**31, 2**32, 2**46, 2**63 - 1, 2**63, 2**64 - 1, 1e300, -1e-300, 0.5]
WORDS = ["", "x", "F16", "BF16", "I32", "shared", "replaced", "low_rank", "quantized"]
VALUES = [*NUMBERS, *WORDS, None, True, [], {}, [0], [2**40, 2**40]]

Sound = dict[str, bytes]
"""A directory's files by name."""


# --- mutations ----------------------------------------------------------------------------------------------------


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every list and object within a JSON value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def change_json(value: Any, draw: random.Random) -> None:
    """Changes some fields: to another value, to another field's, to nothing, or twice."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return
        parent, key = draw.choice(found)
        kind = draw.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            other, name = draw.choice(found)
            parent[key] = json.loads(json.dumps(other[name]))
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, json.loads(json.dumps(parent[key])))
        elif kind == 3 and isinstance(parent, dict):
            parent[draw.choice((f"{key}x", "_pad.0", "../x", ""))] = parent.pop(key)
        elif kind == 4 and isinstance(parent[key], int):
            parent[key] += draw.choice((-64, -1, 1, 8, 64))
        else:
            parent[key] = draw.choice(VALUES)


def manifest_text(manifest: Any) -> bytes:
    """A manifest's text with its checksum."""
    manifest.pop("checksum", None)
    body = json.dumps(manifest)[1:].encode()
    return f'{{"checksum": "{checksum(body)}",\n'.encode() + body


def split(tensors: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file, and what follows it."""
    start = 8 + int.from_bytes(tensors[:8], "little")
    return json.loads(tensors[8:start]), tensors[start:]


def joined(header: Any, data: bytes, *, aligned: bool = True) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8) if aligned else text
    return len(text).to_bytes(8, "little") + text + data


def seal(files: Sound, manifest: Any) -> None:
    """Writes the manifest, bound to the header, with the size and checksum of the tensors' file."""
    with contextlib.suppress(TypeError, AttributeError, ValueError, KeyError, IndexError):  # of what says nonsense
        if "binding" in manifest:
            header, data = split(files[TENSORS])
            manifest["binding"] = header["__metadata__"]["binding"] = checksum(json.dumps(manifest["sites"]).encode())
            files[TENSORS] = joined(header, data)
        tensors = files[TENSORS]
        head = tensors[: 8 + int.from_bytes(tensors[:8], "little")]
        manifest["files"][TENSORS] |= {"bytes": len(tensors), "checksum": checksum(head)}
    files[MANIFEST] = manifest_text(manifest)


def correct_tensors(files: Sound) -> None:
    """Makes the checksums of tensors those of the file."""
    manifest = json.loads(files[MANIFEST])
    with contextlib.suppress(TypeError, AttributeError, ValueError, KeyError):  # of a header that says nonsense
        header, data = split(files[TENSORS])
        for site in manifest["sites"]:
            for role in site.get("tensors", {}):
                begin, end = header[f"{site['name']}/{role}"]["data_offsets"]
                site["tensors"][role] = checksum(data[begin:end])
    seal(files, manifest)


def forge_manifest(files: Sound, draw: random.Random) -> None:
    manifest = json.loads(files[MANIFEST])
    change_json(manifest if draw.random() < 0.2 else draw.choice(manifest["sites"]), draw)
    seal(files, manifest)


def forge_header(files: Sound, draw: random.Random) -> None:
    header, data = split(files[TENSORS])
    change_json(header, draw)
    files[TENSORS] = joined(header, data, aligned=draw.random() < 0.9)
    correct_tensors(files)


def forge_tensors(files: Sound, draw: random.Random) -> None:
    header, data = split(files[TENSORS])
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 64))):
        changed[draw.randrange(len(changed))] = draw.choice((0, 1, 0x7C, 0x7F, 0x80, 0xFF))
    files[TENSORS] = joined(header, bytes(changed))
    correct_tensors(files)


def damage(files: Sound, draw: random.Random) -> None:
    """Changes bytes of one file and makes nothing right."""
    name = draw.choice(sorted(files))
    data = bytearray(files[name])
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.randrange(5)
    if kind == 0:
        data[at % len(data)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = bytes(draw.randrange(1, 200))
    else:
        data[at:end] = bytes(end - at)
    files[name] = bytes(data)


MUTATIONS: dict[str, Callable[[Sound, random.Random], None]] = {
    "manifest": forge_manifest,
    "header": forge_header,
    "tensors": forge_tensors,
    "damage": damage,
}


def replace_file(folder: Path, draw: random.Random, spare: Path) -> None:
    """Puts something in the place of a file that is none."""
    path = draw.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    path.unlink()
    kind = draw.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(draw.choice(("/dev/zero", "/dev/null", "/proc/self/mem", "nowhere", path.name, "/")))
    elif kind == 3:
        spare.write_bytes(content)
        path.symlink_to(spare)  # as in a cache of downloads: sound
    elif kind == 4:
        (folder / "unknown").write_bytes(content)


# --- what a reader makes of a directory ---------------------------------------------------------------------------


def answer(path: Path) -> tuple[str, bool]:
    """A hash of what the directory adds to a base, read by the native kernels; whether plain torch reads the same."""
    delta = Delta.open(path)
    delta.verify()
    digest, agree = hashlib.sha256(), True
    for name, site in delta.sites.items():
        digest.update(f"{name} {site.kind} {site.dtype} {tuple(site.shape)} {site.transposed}".encode())
        if isinstance(site, ReplacedSite):
            digest.update(site.value.contiguous().view(torch.uint8).numpy().tobytes())
        elif not isinstance(site, SharedSite):
            rows = torch.zeros(site.out_features, site.in_features)
            native_matrix(site).dense(0, rows)
            expected = reference.dense(site)
            limit = 1e-5 * expected.abs().nan_to_num(0, 0).max() if expected.numel() else 0
            agree = agree and bool(torch.isclose(rows, expected, rtol=1e-4, atol=float(limit), equal_nan=True).all())
            digest.update(rows.numpy().tobytes())
            if site.added is not None:
                digest.update(site.added.contiguous().view(torch.uint8).numpy().tobytes())
    delta.close()
    return digest.hexdigest(), agree


def judge(sounds: list[tuple[Sound, str]], number: int, seed: int, work: Path) -> str:
    """Writes the mutation of that number and says what became of it."""
    draw = random.Random(f"{seed} {number}")
    (sound, expected), (other, _) = draw.sample(sounds, 2)
    files, kind = dict(sound), draw.choice((*MUTATIONS, "manifest", "swap", "replace"))
    folder = work / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if kind == "swap":
        name = draw.choice((MANIFEST, TENSORS))
        files[name] = other[name]
    elif kind != "replace":
        MUTATIONS[kind](files, draw)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if kind == "replace":
        replace_file(folder, draw, work / "spare")
    try:
        found, agree = answer(folder)
    except (MeswitchError, OSError):
        return "refused"
    except Exception as error:  # whatever is no error of ours
        return f"panic: mutation {number}, {kind}: {type(error).__name__}: {error}"
    right = found == expected
    if not agree or (not right and kind in ("damage", "swap", "replace")):
        return f"wrong: mutation {number}, {kind}"
    return "same" if right else "another"


# --- children -----------------------------------------------------------------------------------------------------


def child(work: Callable[[], None]) -> int:
    """A forked process that does the work and ends with status 0, or 1 where it raises."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def mutate(sounds: list[tuple[Sound, str]], count: int, seed: int, root: Path) -> Counter[str]:
    """Runs mutations in children, each batch in one of its own; a batch goes on after the mutation that ended it."""
    outcomes: Counter[str] = Counter()
    log, next_number = root / "log", 0
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    while next_number < count:
        numbers = range(next_number, min(next_number + BATCH, count))

        def work(numbers: range = numbers) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY,) * 2)
            with log.open("w") as lines:
                for number in numbers:
                    signal.alarm(SECONDS)
                    print(judge(sounds, number, seed, root), file=lines, flush=True)

        _, status = os.waitpid(child(work), 0)
        lines = log.read_text().splitlines()
        next_number = numbers.start + len(lines)
        if len(lines) < len(numbers):
            lines.append(f"panic: mutation {next_number}: the process ended with status {status}")
            next_number += 1
        for line in lines:
            outcomes[line.split(":")[0]] += 1
            if ":" in line:
                print(line, file=sys.stderr, flush=True)
    return outcomes


def content(folder: Path) -> Sound | None:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


def kill(count: int, seed: int, root: Path, base: Path, tunes: tuple[Path, Path]) -> Counter[str]:
    """Kills writers and readers at random moments, then lets the next writer finish."""
    draw, outcomes = random.Random(seed), Counter({"broken": 0})
    place = root / "kills" / "delta"

    def rewrite() -> None:
        delta = Delta.open(place)
        delta.rewrite(place, {}, {}, {"distilled": True})

    works: dict[str, tuple[bool, Callable[[], object]]] = {
        "compress": (False, lambda: compress(base, tunes[0], place)),
        "replace": (True, lambda: compress(base, tunes[1], place)),
        "rewrite": (True, rewrite),
        "load": (True, lambda: answer(place)),
    }
    results: dict[str, tuple[Sound | None, Sound | None, float]] = {}
    for number in range(count):
        name = list(works)[number % len(works)]
        replaces, work = works[name]
        shutil.rmtree(place.parent, ignore_errors=True)
        if replaces:
            compress(base, tunes[0], place)
        if name not in results:
            old, start = content(place), time.perf_counter()
            os.waitpid(child(work), 0)
            results[name] = old, content(place), time.perf_counter() - start
            continue
        old, new, seconds = results[name]
        process = child(work)
        time.sleep(draw.uniform(0, 1.1 * seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = content(place)
        outcomes["old" if found == old else "new" if found == new else "neither"] += 1
        sound = found in (old, new)
        if name != "load":
            os.waitpid(child(work), 0)
            sound = sound and content(place) == new and [path.name for path in place.parent.iterdir()] == ["delta"]
        if not sound:
            outcomes["broken"] += 1
            print(f"broken: kill {number}, {name}: {sorted(place.parent.rglob('*'))}", file=sys.stderr, flush=True)
    return outcomes


# --- the bench ----------------------------------------------------------------------------------------------------


def save(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # children are forked
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base, first, second = (save(root / name, seed) for seed, name in enumerate(("base", "first", "second")))
        for name, finetune, preset in (("a", first, "default"), ("b", second, "default"), ("c", first, "me-switch")):
            compress(base, finetune, root / name, preset)
        sounds = [({**(content(root / name) or {})}, answer(root / name)[0]) for name in "abc"]
        mutations = mutate(sounds, arguments.mutations, arguments.seed, root)
        kills = kill(arguments.kills, arguments.seed, root, base, (first, second))
    result = {
        "seed": arguments.seed,
        "mutations": {name: mutations[name] for name in ("refused", "same", "another")},
        "kills": {name: kills[name] for name in ("old", "new")},
        "panics": mutations["panic"],
        "accepted_wrong": mutations["wrong"],
        "broken": kills["broken"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result))
    sys.exit(any(result[name] for name in ("panics", "accepted_wrong", "broken")))


if __name__ == "__main__":
    main()

"""Names, folders, budgets, and who may be evicted."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from families import config_of, write_delta
from meswitch.delta.directory import Delta
from meswitch.errors import (
    ArchitectureError,
    BudgetError,
    ChecksumError,
    ExpertNameError,
    ExpertNotFoundError,
    FormatError,
    RequestError,
)
from meswitch.expert_name import check_name
from meswitch.experts.catalogue import Expert, check_folder
from meswitch.experts.pool import ExpertPool
from meswitch.experts.settings import SettingsReader
from meswitch.site import Site
from meswitch.sizes import parse_bytes
from operations import operations


class Layers:
    """Remembers which slots are taken."""

    tied = True
    vocabulary = outputs = 10

    def __init__(self) -> None:
        self.slots: set[int] = set()

    def check(self, sites: Iterable[Site], *, tied: bool) -> None: ...

    def vocabulary_of(self, sites: Iterable[Site], *, tied: bool) -> tuple[int, int]:
        return 10, 10

    def installing(self, slot: int, sites: Iterable[Site], names: Sequence[str], *, tied: bool) -> Iterator[None]:
        assert slot not in self.slots
        self.slots.add(slot)
        assert [site.name for site in sites] == list(names)
        yield

    def remove(self, slot: int) -> None:
        self.slots.discard(slot)


PAGE = 4096


def pool_of(pages: int | None = None, layers: Any = None, **settings: Any) -> ExpertPool:
    budget = None if pages is None else PAGE * pages
    return ExpertPool(layers or Layers(), settings.pop("base", None), budget=budget, **settings)


@pytest.fixture
def deltas(tmp_path: Path) -> Callable[..., Path]:
    """Writes delta directories of so many pages, one of a name."""
    return lambda name, pages=1: write_delta(tmp_path / "deltas" / name, pages=pages)


def until(pool: ExpertPool, reached: Callable[[], bool]) -> list[tuple[str, str]]:
    """What the engine's thread does with its pool, until something is so; the experts that failed."""
    failed = []
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        _, failures = pool.residency.update()
        for expert, error in failures:
            pool.fail(expert, error)
            failed.append((expert.name, type(error).__name__))
        time.sleep(0.001)
    return failed


def load(pool: ExpertPool, *names: str) -> list[Expert]:
    """Has experts loaded, as if a request asked for each in turn."""
    experts = [pool.get(name) for name in names]
    for expert in experts:
        pool.residency.ask(expert)
        pool.residency.want(expert, expert.salt)
        until(pool, lambda expert=expert: expert.slot is not None)  # type: ignore[misc]
        pool.residency.want(expert, None)
    return experts


def use(pool: ExpertPool, *names: str) -> list[Expert]:
    """As `load`, and a request runs on each."""
    experts = [load(pool, name)[0] for name in names]
    assert all(pool.residency.pin(expert) for expert in experts)
    return experts


@pytest.mark.parametrize(
    "name", ["", "base", "auto", "a/b", "..", "a..b", ".hidden", "a\nb", "a\x00", "a\\b", "a ", " a", 3]
)
def test_unsafe_names(name: Any) -> None:
    with pytest.raises(ExpertNameError):
        check_name(name)


@pytest.mark.parametrize("name", ["maths", "qwen2.5-code", "数学", "a b"])
def test_safe_names(name: str) -> None:
    assert check_name(name) == name


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_delta(tmp_path / "outside")
    folder = tmp_path / "experts"
    write_delta(folder / "inside")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "alias").symlink_to(folder / "inside")
    with pytest.raises(ExpertNameError, match="link"):
        check_folder(folder / "link")
    check_folder(folder / "alias")
    pool = pool_of()
    pool.discover(folder)
    assert pool.get("inside").name == "inside"
    with pytest.raises(ExpertNameError, match="link"):
        pool.get("link")


def test_a_broken_expert_takes_no_other_down(tmp_path: Path) -> None:
    for name in ("good", "base"):
        write_delta(tmp_path / name)
    for name in ("broken", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "meswitch.json").write_text("{}")
    (tmp_path / "file").write_text("")
    pool = pool_of()
    pool.discover(tmp_path)
    assert pool.describe().keys() == {"good", "broken", "base"}
    assert "FormatError" in pool.describe()["broken"]["error"]
    raised = []
    for _ in range(2):
        with pytest.raises(FormatError, match="first line") as caught:
            pool.get("broken")
        raised.append(caught.value)
    assert raised[0] is not raised[1]  # each caller raises one of its own
    with pytest.raises(FormatError):
        pool.discover([tmp_path / "broken"])
    with pytest.raises(FileNotFoundError):
        pool.discover(tmp_path / "nowhere")


def test_unknown_expert_names_close_ones(deltas: Callable[..., Path]) -> None:
    pool = pool_of()
    pool.discover({"maths": deltas("m"), "code": deltas("c")})
    with pytest.raises(ExpertNotFoundError, match=r"'math'[^$]*did you mean 'maths'"):
        pool.get("math")
    with pytest.raises(ExpertNotFoundError, match="'code', 'maths'"):
        pool.remove("zzz")


def test_one_that_is_closed_before_it_is_in_the_layers_fails_alone(deltas: Callable[..., Path]) -> None:
    pool = pool_of()
    expert = pool.add("a", deltas("a"))
    pool.residency.want(expert, 0)
    assert expert.unit is not None
    deadline = time.monotonic() + 30
    while pool.residency._native.place(expert.unit) != "host":
        assert time.monotonic() < deadline
    expert.delta.close()
    assert [(expert.name, type(error)) for expert, error in pool.residency.update()[1]] == [("a", ValueError)]
    pool.add("b", deltas("b"))
    assert load(pool, "b")[0].slot == 0
    pool.close()


def test_least_recently_used_idle_expert_goes(deltas: Callable[..., Path]) -> None:
    pool = pool_of(2)
    pool.discover([deltas(name) for name in "abc"])
    load(pool, "a", "b")
    a, c = use(pool, "a", "c")
    b = pool.get("b")
    assert b.slot is None and a.slot is not None and c.slot is not None
    pool.residency.want(b, 7)
    until(pool, lambda: True)
    assert not pool.residency.has_room(b)  # a and c are in use
    pool.residency.unpin(a)
    until(pool, lambda: b.slot is not None)
    assert a.slot is None
    counters = pool.residency.counters()
    assert (counters["hits"], counters["misses"], counters["evictions"]) == (1, 3, 2)
    assert pool.describe()["a"] | {"load_ms": 0} == {
        **pool.describe()["a"],
        "hits": 1,
        "misses": 1,
        "loads": 1,
        "evictions": 1,
        "load_ms": 0,
    }


def test_a_delta_directory_in_the_place_of_a_folder_of_them(deltas: Callable[..., Path]) -> None:
    pool = pool_of()
    pool.discover(deltas("maths"))
    assert list(pool.describe()) == ["maths"]


def test_two_experts_of_one_name_are_refused() -> None:
    with pytest.raises(ExpertNameError, match="a name for each of 2 experts, found 1: maths"):
        pool_of().discover(["here/maths", "there/maths"])


def test_experts_are_checked_against_the_checkpoint_that_was_loaded(
    deltas: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, checked = object(), list[object]()
    monkeypatch.setattr(Delta, "check_base", lambda self, base, *, allow_quantized: checked.append(base))
    pool_of(base=base).discover([deltas(name) for name in "abc"])
    assert checked == [base] * 3


def test_a_description_waits_for_nobody(deltas: Callable[..., Path]) -> None:
    pool = pool_of()
    pool.discover([deltas("a"), deltas("b")])
    load(pool, "a")
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(pool.describe()), daemon=True)
    with pool._lock:
        reader.start()
        reader.join(10)
    assert [one["residency"] for one in found[0].values()] == ["host", "disk"]


def test_bookkeeping_does_not_grow_with_the_number_of_experts(deltas: Callable[..., Path]) -> None:
    """Adding, describing and removing so many experts: twice the work for twice as many."""
    delta = deltas("x")

    def work(count: int) -> None:
        pool = pool_of(count)
        pool.discover({f"expert-{at}": delta for at in range(count)})
        for expert in pool.catalogue.values():
            pool.residency.ask(expert)
            pool.residency.want(expert, expert.salt)
            pool.residency.want(expert, None)
        pool.describe()
        for name in list(pool.catalogue):
            pool.remove(name)

    one, two = operations(lambda: work(60)), operations(lambda: work(120))
    assert two < 2.1 * one


def test_adds_and_removes_leave_nothing(deltas: Callable[..., Path]) -> None:
    gone: list[int] = []
    pool = pool_of(2, closed=gone.append)
    delta = deltas("x")
    pool.add("stays", delta)

    def replace(times: int) -> None:
        for _ in range(times):
            pool.add("a", delta)
            load(pool, "a")
            pool.remove("a")
            until(pool, lambda: pool.residency._free == [0] and pool.residency.counters()["bytes"] == 0)

    replace(10)
    gc.collect()
    before = len(gc.get_objects())
    replace(200)
    assert len(gone) == 210 == len(set(gone))
    gone.clear()
    gc.collect()
    assert len(gc.get_objects()) < before + 100
    assert pool.residency._free == [0] and len(pool.residency._experts) == 1


def test_an_expert_beyond_the_budget_is_refused_with_the_sizes(deltas: Callable[..., Path]) -> None:
    with pytest.raises(BudgetError, match=rf"'big'.*{3 * PAGE} bytes.*{2 * PAGE} bytes"):
        pool_of(2).discover({"big": deltas("x", 3)})


def test_a_smaller_budget_ends_those_who_wait_for_more(deltas: Callable[..., Path]) -> None:
    pool = pool_of(4)
    pool.discover([deltas("big", 3), deltas("small"), deltas("used", 2)])
    [used] = use(pool, "used")
    big, small = pool.get("big"), pool.get("small")
    pool.residency.want(big, 1)
    pool.residency.want(small, 2)
    pool.residency.set_budget(2 * PAGE)
    failed: list[Any] = []

    def update() -> bool:
        failed.extend(pool.residency.update()[1])
        return bool(failed)

    until(pool, update)
    assert [(expert, type(error)) for expert, error in failed] == [(big, BudgetError)]
    assert not pool.residency.has_room(small)
    pool.residency.unpin(used)
    until(pool, lambda: small.slot is not None)
    assert used.slot is None and pool.get("big") is big  # nothing is wrong with it
    pool.residency.set_budget(None)
    load(pool, "big", "used")


def test_what_is_in_use_stays_open_when_removed_or_replaced(deltas: Callable[..., Path]) -> None:
    pool = pool_of()
    pool.discover({"a": deltas("old")})
    old = pool.acquire("a")
    use(pool, "a")
    new = pool.add("a", deltas("new"))
    assert pool.get("a") is new and new.salt != old.salt
    assert old.delta is not None and old.slot is not None
    pool.residency.unpin(old)
    pool.release(old)
    until(pool, lambda: old.slot is None)
    assert old.delta is None
    held = pool.acquire("a")
    pool.remove("a")
    assert held.delta is not None
    pool.release(held)
    assert held.delta is None
    until(pool, lambda: pool.residency.counters()["bytes"] == 0)


def test_pinned_experts_stay_and_those_that_replace_them(deltas: Callable[..., Path]) -> None:
    pool = pool_of(2)
    pool.discover([deltas(name) for name in "abc"])
    pool.pin("a")
    until(pool, lambda: pool.get("a").slot is not None)
    load(pool, "b", "c")
    assert pool.describe()["a"]["residency"] == "host" and pool.describe()["a"]["pinned"]
    pool.pin("b")
    with pytest.raises(BudgetError, match=rf"{3 * PAGE} bytes.*{2 * PAGE} bytes"):
        pool.pin("c")
    old, new = pool.get("a"), pool.add("a", deltas("new"))
    until(pool, lambda: new.slot is not None and pool.get("b").slot is not None)
    assert old.slot is None
    pool.unpin("a")
    load(pool, "c")
    assert new.slot is None and not pool.describe()["a"]["pinned"]
    with pytest.raises(ExpertNotFoundError):
        pool.pin("zzz")


def test_an_expert_that_is_pinned_while_it_is_opened_again_holds_up_nobody(deltas: Callable[..., Path]) -> None:
    pool = pool_of()
    folder, other = deltas("a"), deltas("other")
    manifest = (folder / "meswitch.json").read_bytes()
    (folder / "meswitch.json").write_text("{}")
    pool.discover(folder.parent)
    (folder / "meswitch.json").write_bytes(manifest)
    opening, go, open_delta = threading.Event(), threading.Event(), pool.open_delta

    def slow(path: Path) -> Any:
        opening.set()
        assert go.wait(30)
        return open_delta(path)

    pool.open_delta = slow
    threads = [threading.Thread(target=call, args=("a",), daemon=True) for call in (pool.get, pool.pin)]
    threads[0].start()
    assert opening.wait(30)
    threads[1].start()
    time.sleep(0.1)  # until it waits for the first
    asking = threading.Thread(target=pool.get, args=(other.name,), daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive()
    go.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert pool.describe()["a"]["pinned"]


def test_prefetched_experts_are_there_when_they_are_asked_for(deltas: Callable[..., Path]) -> None:
    pool = pool_of(2)
    pool.discover([deltas(name) for name in "abc"])
    pool.prefetch("a")
    until(pool, lambda: pool.get("a").slot is not None)
    use(pool, "a", "b")
    pool.prefetch("c")  # no room, and nobody is thrown out for it
    until(pool, lambda: True)
    assert not pool.residency.has_room(pool.get("c"))
    assert pool.describe()["a"]["hits"] == 1


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_broken_expert_comes_back_when_its_files_are_sound(damage: str, deltas: Callable[..., Path]) -> None:
    pool = pool_of()
    folder = deltas("a")
    pool.discover({"a": folder, "other": deltas("other")})
    file = folder / "delta.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9] if damage == "cut" else content[:-9] + b"_" * 9)
    broken = pool.get("a")
    pool.residency.want(broken, 1)
    failed = until(pool, lambda: pool.catalogue["a"].failure is not None)
    assert failed == [("a", "ChecksumError")] and "ChecksumError" in pool.describe()["a"]["error"]
    with contextlib.suppress(ChecksumError, FormatError):  # its files have changed since it was opened: once more
        again = pool.get("a")
        pool.residency.want(again, 1)
        until(pool, lambda: pool.catalogue["a"].failure is not None)
    for _ in range(3):
        with pytest.raises((ChecksumError, FormatError)):
            pool.get("a")
    load(pool, "other")
    file.write_bytes(content)
    load(pool, "a")
    assert pool.describe()["a"]["error"] is None and pool.get("a") is not broken


def test_files_that_are_sound_again_before_the_failure_is_known(deltas: Callable[..., Path]) -> None:
    pool = pool_of()
    folder = deltas("a")
    pool.discover({"a": folder})
    file = folder / "delta.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + b"_" * 9)
    pool.residency.want(pool.get("a"), 1)
    until(pool, lambda: pool.residency.counters()["failed_loads"] == 1)
    file.write_bytes(content)
    until(pool, lambda: pool.catalogue["a"].failure is not None)
    load(pool, "a")


def test_those_who_ask_while_a_broken_expert_is_opened_again_wait_for_it(
    deltas: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of()
    folder = deltas("a")
    text = (folder / "meswitch.json").read_text()
    (folder / "meswitch.json").write_text("{}")
    pool.discover(folder.parent)
    (folder / "meswitch.json").write_text(text)
    found: list[Any] = []
    started, go = threading.Event(), threading.Event()

    def slow(path: Path) -> Delta:
        started.set()
        go.wait(30)
        return Delta.open(path)

    monkeypatch.setattr(pool, "open_delta", slow)
    askers = [threading.Thread(target=lambda: found.append(pool.get("a")), daemon=True) for _ in range(3)]
    for asker in askers:
        asker.start()
    started.wait(30)
    askers[-1].join(0.05)  # they could fail now
    go.set()
    for asker in askers:
        asker.join(30)
    assert len(found) == 3 and len(set(found)) == 1 and pool.get("a") is found[0]


@given(st.integers(0, 2**32), st.integers(5, 12))
def test_budget_and_pins_hold_whatever_happens(seed: int, budget: int) -> None:
    chance = random.Random(seed)
    with TemporaryDirectory() as folder:
        pool = pool_of(budget)
        for name, size in (("a", 5), ("b", 4), ("c", 2), ("d", 1)):
            pool.add(name, write_delta(Path(folder) / name, pages=size))
        pinned: list[Expert] = []
        for rank in range(40):
            if pinned and chance.random() < 0.5:
                pool.residency.unpin(pinned.pop(chance.randrange(len(pinned))))
            expert = pool.get(chance.choice("abcd"))
            pool.residency.want(expert, rank)
            if chance.random() < 0.7:
                until(pool, lambda expert=expert: not pool.residency.has_room(expert) or expert.slot is not None)  # type: ignore[misc]
            if pool.residency.pin(expert):
                pinned.append(expert)
            if chance.random() < 0.5:
                pool.residency.want(expert, None)
            bytes_in_use = pool.residency.counters()["bytes"]
            assert bytes_in_use is not None and bytes_in_use <= budget * PAGE
            assert all(one.slot is not None for one in pinned)
            resident = [one for one in map(pool.get, "abcd") if one.slot is not None]
            assert len({one.slot for one in resident}) == len(resident)
        pool.close()


def test_an_expert_with_other_settings_is_refused_by_field(tmp_path: Path) -> None:
    for name, eps in (("base", 1e-6), ("a", 1e-3)):
        config_of("llama", rms_norm_eps=eps).save_pretrained(tmp_path / name)
    delta = write_delta(tmp_path / "delta", files=[tmp_path / "a" / "config.json"])
    settings = SettingsReader(tmp_path / "base", config_of("llama"))
    pool = pool_of(settings=settings)
    with pytest.raises(ArchitectureError, match=r"rms_norm_eps: base 1e-06, expert 0\.001"):
        pool.add("a", delta)
    with pytest.raises(FormatError, match=r"config\.json"):
        pool.add("a", write_delta(tmp_path / "without"))


@pytest.mark.parametrize("size", ["", "1 parsec", "-3", 0, True, "0", "0.4", "GiB", 1.5j, "9" * 400, "9999999999GB"])
def test_bytes_that_are_not(size: Any) -> None:
    with pytest.raises(RequestError, match="kv_budget"):
        parse_bytes(size, "kv_budget")

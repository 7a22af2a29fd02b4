"""Names, folders, budgets, and who may be evicted."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from families import HandDelta, config_of
from meswitch.errors import (
    ArchitectureError,
    BudgetError,
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

    def install(self, slot: int, sites: Iterable[Site], *, tied: bool) -> None:
        assert slot not in self.slots
        self.slots.add(slot)

    def remove(self, slot: int) -> None:
        self.slots.discard(slot)


class Sized(HandDelta):
    @property
    def nbytes(self) -> int:
        return int(self.path.name.partition("-")[2] or 100)


def open_sized(path: Path) -> Any:
    if "broken" in path.name:
        raise FormatError(f"{path}: expected a manifest, found none")
    return Sized(path)


def pool_of(budget: int | None = None, **settings: Any) -> ExpertPool:
    return ExpertPool(Layers(), None, budget=budget, open_delta=open_sized, **settings)  # type: ignore[arg-type]


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
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "experts"
    (folder / "inside").mkdir(parents=True)
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
    for name in ("good", "broken", "base", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    pool = pool_of()
    pool.discover(tmp_path)
    assert pool.describe().keys() == {"good", "broken", "base"}
    assert "FormatError" in pool.describe()["broken"]["error"]
    raised = []
    for _ in range(2):
        with pytest.raises(FormatError, match="manifest") as caught:
            pool.get("broken")
        raised.append(caught.value)
    assert raised[0] is not raised[1]  # each caller raises one of its own
    with pytest.raises(FormatError):
        pool.discover([tmp_path / "broken"])
    with pytest.raises(FileNotFoundError):
        pool.discover(tmp_path / "nowhere")


def test_unknown_expert_names_close_ones() -> None:
    pool = pool_of()
    pool.discover({"maths": "m", "code": "c"})
    with pytest.raises(ExpertNotFoundError, match=r"'math'[^$]*did you mean 'maths'"):
        pool.get("math")
    with pytest.raises(ExpertNotFoundError, match="'code', 'maths'"):
        pool.remove("zzz")


def test_least_recently_used_idle_expert_goes() -> None:
    pool = pool_of(250)
    pool.discover({name: "x" for name in "abc"})
    a, b, c = (pool.get(name) for name in "abc")
    for expert in (a, b):
        assert pool.residency.admit(expert)
        pool.residency.unpin(expert)
    assert pool.residency.admit(a)
    assert pool.residency.admit(c)
    assert b.slot is None and a.slot is not None and c.slot is not None
    assert not pool.residency.admit(b)  # a and c are pinned
    pool.residency.unpin(a)
    assert pool.residency.admit(b) and a.slot is None
    residency = pool.residency
    assert (residency.hits, residency.misses, residency.evictions) == (1, 4, 2)


def test_a_delta_directory_in_the_place_of_a_folder_of_them(tmp_path: Path) -> None:
    (tmp_path / "maths").mkdir()
    (tmp_path / "maths" / "meswitch.json").write_text("{}")
    pool = pool_of()
    pool.discover(tmp_path / "maths")
    assert list(pool.describe()) == ["maths"]


def test_two_experts_of_one_name_are_refused() -> None:
    with pytest.raises(ExpertNameError, match="a name for each of 2 experts, found 1: maths"):
        pool_of().discover(["here/maths", "there/maths"])


def test_experts_are_checked_against_the_checkpoint_that_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    base, checked = object(), list[object]()
    monkeypatch.setattr(Sized, "check_base", lambda self, base: checked.append(base))
    pool = ExpertPool(Layers(), base, open_delta=open_sized)  # type: ignore[arg-type]
    pool.discover({name: name for name in "abc"})
    assert checked == [base] * 3


def test_a_description_waits_for_nobody() -> None:
    pool = pool_of()
    pool.discover({"a": "x", "b": "y"})
    pool.residency.admit(pool.get("a"))
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(pool.describe()), daemon=True)
    with pool._lock:
        reader.start()
        reader.join(10)
    assert [one["residency"] for one in found[0].values()] == ["host", "disk"]


def test_bookkeeping_does_not_grow_with_the_number_of_experts() -> None:
    """Installing, describing and evicting so many experts: twice the work for twice as many."""

    def work(count: int) -> None:
        pool = pool_of(100 * count)
        pool.discover({f"expert-{at}": "x" for at in range(count)})
        for name in list(pool.catalogue):
            expert = pool.get(name)
            assert pool.residency.admit(expert)
            pool.residency.unpin(expert)
        pool.describe()
        huge = pool.add("huge", Path(f"x-{100 * count}"))
        assert pool.residency.admit(huge) and pool.residency.evictions == count

    one, two = operations(lambda: work(60)), operations(lambda: work(120))
    assert two < 2.1 * one


def test_adds_and_removes_leave_nothing() -> None:
    gone: list[int] = []
    pool = pool_of(250, closed=gone.append)
    pool.add("stays", Path("x"))

    def replace(times: int) -> None:
        for _ in range(times):
            expert = pool.add("a", Path("x"))
            assert pool.residency.admit(expert)
            pool.residency.unpin(expert)
            pool.remove("a")

    replace(10)
    gc.collect()
    before = len(gc.get_objects())
    replace(1000)
    assert len(gone) == 1010 == len(set(gone))
    gone.clear()
    gc.collect()
    assert len(gc.get_objects()) < before + 100
    assert pool.residency.bytes == 0 and pool.residency._free == [0]


def test_an_expert_beyond_the_budget_is_refused_with_the_sizes() -> None:
    with pytest.raises(BudgetError, match=r"'big'.*300 bytes.*250 bytes"):
        pool_of(250).discover({"big": "x-300"})


def test_what_is_in_use_stays_open_when_removed_or_replaced() -> None:
    pool = pool_of()
    pool.discover({"a": "old"})
    old = pool.acquire("a")
    pool.residency.admit(old)
    delta = old.delta
    new = pool.add("a", Path("new"))
    assert pool.get("a") is new and new.salt != old.salt
    assert not delta.closed and old.slot is not None
    pool.residency.unpin(old)
    pool.release(old)
    assert delta.closed and old.slot is None
    held = pool.acquire("a")
    pool.remove("a")
    assert not held.delta.closed
    pool.release(held)
    assert held.delta is None


@given(st.integers(0, 2**32), st.integers(100, 700))
def test_budget_and_pins_hold_whatever_happens(seed: int, budget: int) -> None:
    chance, pool = random.Random(seed), pool_of(budget)
    for name, size in (("a", 100), ("b", 90), ("c", 60), ("d", 30)):
        pool.add(name, Path(f"x-{size}"))
    pinned: list[Expert] = []
    for _ in range(60):
        if pinned and chance.random() < 0.5:
            pool.residency.unpin(pinned.pop(chance.randrange(len(pinned))))
            continue
        expert = pool.get(chance.choice("abcd"))
        if pool.residency.admit(expert):
            pinned.append(expert)
        assert pool.residency.bytes <= budget
        assert all(one.slot is not None for one in pinned)
        resident = [one for one in map(pool.get, "abcd") if one.slot is not None]
        assert len({one.slot for one in resident}) == len(resident)
        assert pool.residency.bytes == sum(one.nbytes for one in resident)


def test_an_expert_with_other_settings_is_refused_by_field(tmp_path: Path) -> None:
    for name, eps in (("base", 1e-6), ("a", 1e-3)):
        config_of("llama", rms_norm_eps=eps).save_pretrained(tmp_path / name)
    layers: Any = Layers()
    settings = SettingsReader(tmp_path / "base", config_of("llama"))
    pool = ExpertPool(layers, None, settings, open_delta=open_sized)
    with pytest.raises(ArchitectureError, match=r"rms_norm_eps: base 1e-06, expert 0\.001"):
        pool.add("a", tmp_path / "a")
    with pytest.raises(FormatError, match=r"config\.json"):
        pool.add("a", tmp_path / "nowhere")


@pytest.mark.parametrize("size", ["", "1 parsec", "-3", 0, True, "0", "0.4", "GiB", 1.5j, "9" * 400, "9999999999GB"])
def test_bytes_that_are_not(size: Any) -> None:
    with pytest.raises(RequestError, match="kv_budget"):
        parse_bytes(size, "kv_budget")

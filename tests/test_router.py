"""Embeddings of the base, the head over them, abstention, and routers on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random, tokenizer_of
from meswitch.errors import DataError, DataWarning, OutputError, RequestError, RouterError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.router.base import LoadedBase, embed
from meswitch.router.embedding.router import EmbeddingRouter
from meswitch.router.kinds import KINDS
from meswitch.router.protocol import BaseModel
from meswitch.router.route import Example, Route, read_examples, report
from meswitch.router.routers import evaluate_router, load_router, train_router

PROMPTS = [
    "def f(x):",
    "What is 2 + 3?",
    "The sea was calm, and so were the gulls above the old grey harbour wall.",
    "a",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("router") / "base", config_of("llama", num_hidden_layers=6))


def load(folder: Path, attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def blobs(*names: str, count: int = 40, width: int = 24, seed: int = 0) -> tuple[Tensor, list[str]]:
    """`count` embeddings around a centre for each name; a name's centre is its own."""
    rows, labels = [], []
    for name in names:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        center = 3 * torch.randn(width, generator=generator)
        generator.manual_seed(seed * 1000 + sum(map(ord, name)))
        rows.append(center + torch.randn(count, width, generator=generator))
        labels += [name] * count
    return torch.cat(rows), labels


# --- embeddings ---------------------------------------------------------------------------------------------------


def by_hand(model: Any, prompt: str) -> Tensor:
    ids = torch.tensor([tokenizer_of()(prompt)["input_ids"]])
    with torch.no_grad():
        states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    rows = normalize(states[-(-model.config.num_hidden_layers // 2)][0], dim=-1)
    return torch.cat([rows.mean(0), rows.std(0, correction=0)])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3_text", "gpt_neox", "opt"])
def test_embeddings_are_pooled_hidden_states(tmp_path: Path, architecture: str) -> None:
    model = load(save_random(tmp_path / "model", config_of(architecture)), "eager")
    found = embed(model, tokenizer_of(), PROMPTS)
    assert found.shape == (4, 64) and found.dtype == torch.float32 and not found.is_inference()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    for row, prompt in zip(found, PROMPTS, strict=True):
        torch.testing.assert_close(row, by_hand(model, prompt), rtol=1e-4, atol=1e-5)


def test_a_decoder_whose_layers_are_not_found_gives_the_same(base: Path) -> None:
    model = load(base)
    expected = embed(model, tokenizer_of(), PROMPTS)
    model.model.layers.append(torch.nn.Identity())  # one more than the config says
    torch.testing.assert_close(embed(model, tokenizer_of(), PROMPTS), expected)


@pytest.mark.parametrize("attention", ["paged|eager", "sdpa"])
def test_embeddings_under_continuous_batching_are_the_plain_ones(base: Path, attention: str) -> None:
    expected = embed(load(base, "eager"), tokenizer_of(), PROMPTS)
    model = load(base)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(embed(model, tokenizer_of(), PROMPTS), expected, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == attention


def test_a_prompt_embeds_alike_alone_and_in_a_batch(base: Path) -> None:
    model, many = load(base), [PROMPTS[i % 4] * (i % 7 + 1) for i in range(90)]
    steps: list[tuple[int, int]] = []
    together = embed(model, tokenizer_of(), many, progress=lambda at: steps.append((at.done, at.total)))
    alone = torch.cat([embed(model, tokenizer_of(), [prompt]) for prompt in many])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert steps[-1] == (90, 90)


def test_a_long_prompt_is_read_at_both_ends(base: Path) -> None:
    model = load(base)
    long = "start" + "x" * 500 + "enddd"
    [row] = embed(model, tokenizer_of(), [long], max_tokens=10)
    torch.testing.assert_close(row, by_hand(model, "startenddd"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(base: Path, prompt: str) -> None:
    with pytest.raises(RequestError, match="empty"):
        embed(load(base), tokenizer_of(), ["fine", prompt])


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    small = save_random(tmp_path / "base", config_of("llama", vocab_size=260))  # the tokenizer has 264
    rows = [{"prompt": f"{i} <a>", "expert": "ab"[i % 2]} for i in range(8)]
    data = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(RequestError, match=r"below 260.*found 261: prompt '0 <a>'"):
        train_router(small, data, tmp_path / "router")
    known = [{**row, "prompt": row["prompt"].replace("<a>", "a")} for row in rows]
    train_router(small, write(tmp_path / "b.jsonl", *known), tmp_path / "router")
    with pytest.raises(RequestError, match="below 260"):
        evaluate_router(small, tmp_path / "router", data)
    with pytest.raises(RequestError, match="below 260"):
        load_router(tmp_path / "router").route(["1 <a>"], LoadedBase(load(small), tokenizer_of()))


def test_no_prompts_are_no_rows(base: Path) -> None:
    assert embed(load(base), tokenizer_of(), []).shape == (0, 64)


# --- the head -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def router() -> EmbeddingRouter:
    return EmbeddingRouter.fit(*blobs("code", "maths", "prose"), base_fingerprint="ab12")


def test_routes_to_the_label_of_the_neighbourhood(router: EmbeddingRouter) -> None:
    x, labels = blobs("code", "maths", "prose", seed=7)
    routes = router.route_embeddings(x)
    right = sum(route.expert == label for route, label in zip(routes, labels, strict=True))
    assert right >= 0.9 * len(labels)
    for route in routes:
        assert sum(route.scores.values()) == pytest.approx(1, abs=1e-5)
        assert set(route.scores) == {"code", "maths", "prose"}
        assert route.expert == ("base" if route.abstained else route.likeliest)


def test_arithmetic_is_left_to_the_base_in_pieces(router: EmbeddingRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a caller's thread torch would start threads of its own beside the base's."""
    x, _ = blobs("code", "maths", count=80)
    inside, pieces = [False], []
    route = EmbeddingRouter.route_embeddings

    def watched(self: EmbeddingRouter, rows: Tensor) -> Any:
        assert inside[0]
        pieces.append(len(rows))
        return route(self, rows)

    class Base:
        def embed(self, prompts: list[str]) -> Tensor:
            return x

        def compute(self, function: Callable[[], Any]) -> Any:
            inside[0] = True
            try:
                return function()
            finally:
                inside[0] = False

    monkeypatch.setattr(EmbeddingRouter, "route_embeddings", watched)
    routes = router.route(["?"] * len(x), Base())
    assert max(pieces) <= 64 and sum(pieces) == len(x) == 160
    assert [one.expert for one in routes] == [one.expert for one in route(router, x)]


def test_what_is_far_from_everything_goes_to_the_base(router: EmbeddingRouter) -> None:
    x, _ = blobs("something else", "another", seed=3)
    routes = router.route_embeddings(x)
    assert sum(route.abstained and route.expert == "base" for route in routes) >= 0.95 * len(routes)
    assert any(max(route.scores.values()) > 0.9 for route in routes)  # the scores alone would not have told


def test_the_threshold_abstains_between_labels() -> None:
    x, labels = blobs("code", "maths")
    middle = (x[:40].mean(0) + x[40:].mean(0)) / 2
    sure = EmbeddingRouter.fit(x, labels, threshold=1.0)
    assert all(route.abstained for route in sure.route_embeddings(middle[None]))
    assert EmbeddingRouter.fit(x, labels, threshold=0.0).threshold == 0.0


def test_base_is_a_label_like_any_other() -> None:
    x, labels = blobs("base", "maths")
    found = EmbeddingRouter.fit(x, labels).route_embeddings(blobs("base", seed=4)[0])
    assert sum(route.expert == "base" and not route.abstained for route in found) >= 36


def test_any_whole_number_is_a_seed() -> None:
    x, labels = blobs("code", "maths", count=8)
    for seed in (-1, 10**40):
        assert EmbeddingRouter.fit(x, labels, seed=seed).experts == ("code", "maths")


def test_fitting_twice_gives_the_same_router() -> None:
    x, labels = blobs("a", "b", "c", count=12)
    first, second = EmbeddingRouter.fit(x, labels), EmbeddingRouter.fit(x, labels)
    assert first.route_embeddings(x) == second.route_embeddings(x)


@settings(max_examples=15)
@given(labels=st.integers(2, 5), count=st.integers(4, 9), width=st.integers(2, 40), same=st.booleans())
def test_any_shape_fits(labels: int, count: int, width: int, same: bool) -> None:
    x, names = blobs(*"abcde"[:labels], count=count, width=width)
    x = torch.zeros_like(x) if same else x  # identical prompts: nothing to tell apart, nothing to divide by
    for route in EmbeddingRouter.fit(x, names).route_embeddings(x):
        assert sum(route.scores.values()) == pytest.approx(1, abs=1e-4)


def test_bad_training_data_is_refused() -> None:
    x, labels = blobs("a", "b", count=6)
    with pytest.raises(DataError, match="two experts"):
        EmbeddingRouter.fit(x, ["a"] * 12)
    with pytest.raises(DataError, match="at least 4"):
        EmbeddingRouter.fit(x[:9], labels[:9])
    with pytest.raises(DataError, match="'auto' is reserved"):
        EmbeddingRouter.fit(x, ["auto"] * 6 + ["b"] * 6)
    with pytest.raises(RouterError, match="shape"):
        EmbeddingRouter.fit(x[:5], labels)
    with pytest.raises(RouterError, match="threshold"):
        EmbeddingRouter.fit(x, labels, threshold=1.5)
    with pytest.raises(RouterError, match="finite"):
        EmbeddingRouter.fit(x.log(), labels)


def test_another_width_is_refused(router: EmbeddingRouter) -> None:
    with pytest.raises(RouterError, match="24"):
        router.route_embeddings(torch.zeros(1, 25))


# --- a new expert -------------------------------------------------------------------------------------------------


def test_a_new_expert_leaves_the_others_logits(router: EmbeddingRouter) -> None:
    x, labels = blobs("code", "maths", "prose", "chess", seed=5)
    before = router.route_embeddings(x[-40:])
    assert sum(route.abstained for route in before) >= 36
    more = router.add_expert("chess", blobs("chess", count=20)[0])
    assert more.experts == (*router.experts, "chess")
    torch.testing.assert_close(more.logits(x)[:, :3], router.logits(x))
    routes = more.route_embeddings(x)
    right = [route.expert == label for route, label in zip(routes, labels, strict=True)]
    assert sum(right[:120]) >= 105 and sum(right[120:]) >= 34
    far, _ = blobs("something else", seed=3)
    assert sum(route.abstained for route in more.route_embeddings(far)) >= 30


def test_a_new_expert_can_follow_another(router: EmbeddingRouter) -> None:
    more = router.add_expert("chess", blobs("chess")[0]).add_expert("go", blobs("go")[0])
    routes = more.route_embeddings(blobs("go", seed=6)[0])
    assert sum(route.expert == "go" for route in routes) >= 34


def test_bad_additions_are_refused(router: EmbeddingRouter) -> None:
    with pytest.raises(RouterError, match="'code'"):
        router.add_expert("code", blobs("code")[0])
    with pytest.raises(DataError, match="at least 4"):
        router.add_expert("chess", blobs("chess", count=3)[0])
    with pytest.raises(RouterError, match="shape"):
        router.add_expert("chess", torch.zeros(8, 5))


# --- on disk ------------------------------------------------------------------------------------------------------


def test_a_saved_router_routes_the_same(router: EmbeddingRouter, tmp_path: Path) -> None:
    router.save(tmp_path / "deep" / "router")
    router.add_expert("chess", blobs("chess")[0]).save(tmp_path / "deep" / "router")
    router.save(tmp_path / "deep" / "router")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["router"]
    assert sorted(p.name for p in (tmp_path / "deep" / "router").iterdir()) == ["router.json", "router.safetensors"]
    found = EmbeddingRouter.load(tmp_path / "deep" / "router", "ab12")
    x, _ = blobs("code", "something else", seed=8)
    assert found.route_embeddings(x) == router.route_embeddings(x)
    assert (found.experts, found.threshold, found.base_fingerprint) == (router.experts, 0.5, "ab12")


def test_only_a_router_is_replaced(router: EmbeddingRouter, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="something else"):
        router.save(tmp_path / "mine")
    with pytest.raises(OutputError, match="something else"):
        router.save(tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_failed_write_leaves_nothing(
    router: EmbeddingRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router.save(tmp_path / "router")

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("router", "new"):
        with pytest.raises(OSError, match="No space"):
            router.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["router"]
    assert EmbeddingRouter.load(tmp_path / "router").experts == router.experts


@pytest.fixture
def saved(router: EmbeddingRouter, tmp_path: Path) -> Path:
    router.save(tmp_path / "router")
    return tmp_path / "router"


def test_another_bases_router_is_refused(saved: Path) -> None:
    with pytest.raises(RouterError, match="cd34"):
        EmbeddingRouter.load(saved, "cd34")


def test_a_missing_router_is_refused(tmp_path: Path, saved: Path) -> None:
    for path in (tmp_path / "nowhere", saved / "router.json"):
        with pytest.raises(RouterError, match=r"no router\.json"):
            load_router(path)
    (saved / "router.safetensors").unlink()
    with pytest.raises(RouterError, match="found none"):
        load_router(saved)


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "router.json"
        value = json.loads(file.read_text())
        file.write_text(json.dumps(change(value) or value))

    return apply


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors, and the checksum with them."""

    def apply(folder: Path) -> None:
        import hashlib

        file = folder / "router.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest(lambda value: value.update(sha256=digest))(folder)

    return apply


def cut(folder: Path) -> None:
    file = folder / "router.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda folder: (folder / "router.json").write_text("{"), "JSON"),
    "not utf-8": (lambda folder: (folder / "router.json").write_bytes(b"\xff"), "JSON"),
    "a list": (lambda folder: (folder / "router.json").write_text("[]"), "version"),
    "version": (manifest(lambda value: value.update(format_version=2)), "version 1, found 2"),
    "kind": (manifest(lambda value: value.update(kind="prompt")), "'prompt'"),
    "no experts": (manifest(lambda value: value.__delitem__("experts")), "experts"),
    "experts": (manifest(lambda value: value.update(experts=["a"])), "expected weight"),
    "threshold": (manifest(lambda value: value.update(threshold=2)), "threshold"),
    "temperature": (manifest(lambda value: value.update(temperature=0)), "temperature"),
    "text": (manifest(lambda value: value.update(temperature="warm")), "numbers"),
    "checksum": (cut, "sha256"),
    "a tensor less": (tensors(lambda state: state.pop("bias")), "expected tensors"),
    "a flat tensor": (tensors(lambda state: state.update(components=torch.zeros(3))), "expected tensors"),
    "a shape": (tensors(lambda state: state.update(bias=torch.zeros(9))), "expected bias"),
    "a dtype": (tensors(lambda state: state.update(bias=torch.zeros(3).half())), "float32"),
    "nan": (tensors(lambda state: state["scale"].fill_(float("nan"))), "finite"),
    "labels": (tensors(lambda state: state["labels"].fill_(3)), "labels below 3"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_router_is_refused(saved: Path, name: str) -> None:
    harm, says = BREAKS[name]
    harm(saved)
    with pytest.raises(RouterError, match=says) as caught:
        load_router(saved)
    assert str(saved) in str(caught.value) or name == "kind"


def test_a_blob_that_is_no_safetensors_is_refused(saved: Path) -> None:
    import hashlib

    (saved / "router.safetensors").write_bytes(b"\x80\x04.")
    manifest(lambda value: value.update(sha256=hashlib.sha256(b"\x80\x04.").hexdigest()))(saved)
    with pytest.raises(RouterError, match="safetensors"):
        load_router(saved)


# --- labelled prompts and the report ------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_reads_labelled_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "1+1", "expert": "maths"}, "", {"prompt": "hi", "expert": "base"})
    assert read_examples(path) == [Example("1+1", "maths"), Example("hi", "base")]
    assert len(read_examples(path, known=["maths"])) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "JSON object"),
        ({"prompt": "x"}, "'expert'"),
        ({"expert": "x"}, "'prompt'"),
        ({"prompt": 1, "expert": "x"}, "'prompt'"),
        ({"prompt": " ", "expert": "x"}, "empty"),
        ({"prompt": "x", "expert": "unheard of"}, "unheard of"),
        ({"prompt": "x", "expert": None}, "'expert', found null"),
        *(({"prompt": "x", "expert": name}, "expert's name") for name in ("auto", "../x", "maths ", "", ".", "a\nb")),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "expert": "maths"}, line)
    with pytest.raises(DataError, match=says) as caught:
        read_examples(path, known=["maths"])
    assert f"{path}:2" in str(caught.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        read_examples(write(tmp_path / "a.jsonl"))


def test_columns_that_no_router_reads_are_named(tmp_path: Path) -> None:
    row = {"prompt": "1+1", "expert": "maths", "completion": "2"}
    assert len(read_examples(write(tmp_path / "a.jsonl", row))) == 1
    with pytest.warns(DataWarning, match=r"'context', 'id'.*b\.jsonl"):
        read_examples(write(tmp_path / "b.jsonl", {**row, "id": 1}, {**row, "context": "x"}))


def test_the_report_counts() -> None:
    sure, torn = {"a": 0.9, "b": 0.1}, {"a": 0.45, "b": 0.55}
    examples = [Example("1", "a"), Example("2", "a"), Example("3", "b"), Example("4", "base")]
    routes = [Route("a", sure, False), Route("base", torn, True), Route("a", sure, False), Route("base", torn, True)]
    found = report(examples, routes)
    assert found["accuracy"] == 0.5 and found["abstained"] == 0.5
    assert found["confusion"] == {"a": {"a": 1, "base": 1}, "b": {"a": 1}, "base": {"base": 1}}
    assert found["per_expert"]["a"] == {"prompts": 2, "recall": 0.5, "precision": 0.5, "abstained": 0.5}
    assert found["per_expert"]["b"]["precision"] is None
    assert [wrong["prompt"] for wrong in found["misrouted"]] == ["2", "3"]
    # two at 0.9 of which one is right, two at 0.55 of which none is
    assert found["expected_calibration_error"] == pytest.approx((abs(1.8 - 1) + abs(1.1 - 0)) / 4)
    assert json.loads(json.dumps(found)) == found


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab"), st.floats(0, 1)), max_size=20))
def test_the_report_is_of_shares(rows: list[tuple[str, str, float]]) -> None:
    examples = [Example("x", label) for label, _, _ in rows]
    routes = [Route(sent, {"a": p, "b": 1 - p}, False) for _, sent, p in rows]
    found = report(examples, routes)
    assert 0 <= found["accuracy"] <= 1 and 0 <= found["expected_calibration_error"] <= 1
    assert sum(sum(row.values()) for row in found["confusion"].values()) == len(rows)
    assert len(found["misrouted"]) == round((1 - found["accuracy"]) * len(rows)) or not rows


# --- train and evaluate -------------------------------------------------------------------------------------------


def labelled(path: Path, count: int) -> Path:
    rows: Iterator[dict[str, str]] = (
        row
        for i in range(count)
        for row in (
            {"prompt": f"def f{i}(x{i}): return x{i}[{i}]", "expert": "code"},
            {"prompt": f"{i}{i + 3} + {i * 7} = {i * 5}", "expert": "maths"},
        )
    )
    return write(path, *rows)


def test_train_open_and_evaluate(base: Path, tmp_path: Path) -> None:
    made = train_router(base, labelled(tmp_path / "train.jsonl", 16), tmp_path / "router")
    found = evaluate_router(base, tmp_path / "router", labelled(tmp_path / "test.jsonl", 10))
    assert found["accuracy"] >= 0.8
    opened = load_router(tmp_path / "router", base)
    assert opened.base_fingerprint == made.base_fingerprint == Checkpoint.open(base).sample()
    route = opened.route(["def g(y): return y[0]"], partial(embed, load(base), tokenizer_of()))[0]
    assert route.likeliest == "code"
    assert opened.route([], partial(embed, None, None)) == []


def test_the_engine_routes_as_the_base_alone_does(base: Path, tmp_path: Path) -> None:
    from meswitch.compression.job import compress
    from meswitch.engine.engine import Engine

    made = train_router(base, labelled(tmp_path / "train.jsonl", 16), tmp_path / "router")
    for name in ("code", "maths"):
        compress(base, save_finetune(tmp_path / name, base, len(name)), tmp_path / "experts" / name)
    prompts = ["def g(y): return y[0]", "31 + 41 =", "What is the sea but water?"]
    expected = made.route(prompts, partial(embed, load(base), tokenizer_of()))
    with Engine(base, experts=tmp_path / "experts", router=tmp_path / "router") as engine:
        engine.generate("warm", expert="code", max_new_tokens=2)
        answers = engine.generate(prompts, expert="auto", max_new_tokens=2)
    for answer, route in zip(answers, expected, strict=True):
        assert answer.expert == answer.route.expert == route.expert
        assert answer.route.scores == pytest.approx(route.scores, abs=1e-3)


def test_a_router_knows_its_base(base: Path, tmp_path: Path) -> None:
    train_router(base, labelled(tmp_path / "train.jsonl", 8), tmp_path / "router")
    other = save_random(tmp_path / "other", config_of("llama", num_hidden_layers=6), seed=1)
    assert Checkpoint.open(other).sample() != Checkpoint.open(base).sample()
    with pytest.raises(RouterError, match="train the router again"):
        evaluate_router(other, tmp_path / "router", tmp_path / "train.jsonl")


def test_a_router_takes_a_base_or_its_embed_alone(base: Path, tmp_path: Path) -> None:
    router = train_router(base, labelled(tmp_path / "train.jsonl", 8), tmp_path / "router")
    model, prompts = load(base), ["def g(y): return y[0]", "31 + 41 ="]
    expected = router.route(prompts, partial(embed, model, tokenizer_of()))
    assert router.route(prompts, LoadedBase(model, tokenizer_of())) == expected


def test_training_reports_prompts_and_fits(base: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    train_router(
        base,
        labelled(tmp_path / "train.jsonl", 8),
        tmp_path / "router",
        progress=lambda progress: reports.append((progress.task, progress.done, progress.total)),
    )
    assert ("reading prompts", 16, 16) in reports and reports[-1] == ("fitting the router", 25, 25)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_has_what_each_kind_asks_of_it(kind: str) -> None:
    for method in KINDS[kind].base_methods:
        assert callable(getattr(BaseModel, method)) and callable(getattr(LoadedBase, method))


@pytest.mark.parametrize("kind", ["prompt", "oracle"])
def test_other_kinds_are_refused(base: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RouterError, match="embedding"):
        train_router(base, labelled(tmp_path / "train.jsonl", 8), tmp_path / "router", kind=kind)
    assert not (tmp_path / "router").exists()


# --- on real models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    lines = family.prompts.read_text().splitlines()[:240]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    train_router(family.base, folder / "prompts.jsonl", folder / "router")
    return folder / "router"


def test_the_familys_prompts_find_their_experts(family: Any, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "heldout.jsonl").write_text("\n".join(family.heldout_prompts.read_text().splitlines()[:150]))
    found = evaluate_router(family.base, trained, tmp_path / "heldout.jsonl")
    assert found["accuracy"] >= 0.9 and found["abstained"] <= 0.1
    assert found["expected_calibration_error"] <= 0.1


# Not symbols, which are code's own letters: to a model this small, their noise does look like code.
@pytest.mark.parametrize(("first", "last"), [("a", "z"), ("ぁ", "ん")])
def test_gibberish_goes_to_the_base(family: Any, trained: Path, first: str, last: str) -> None:
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(0)
    letters = [chr(int(i)) for i in torch.randint(ord(first), ord(last) + 1, (1200,), generator=generator)]
    prompts = ["".join(letters[i : i + 40]) for i in range(0, 1200, 40)]
    model = AutoModelForCausalLM.from_pretrained(family.base)
    ask = partial(embed, model, AutoTokenizer.from_pretrained(family.base))
    routes = load_router(trained, family.base).route(prompts, ask)
    assert sum(route.abstained and route.expert == "base" for route in routes) >= 0.8 * len(routes)

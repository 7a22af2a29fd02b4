"""Every causal language model of transformers is served as it is alone, or refused by name when an engine starts."""

from __future__ import annotations

import pytest
import transformers

from causal_models import FARTHEST, PAGE, REFUSED, SERVED, WRONG, Case, cases, page, try_case

# One of each kind of refusal, and one that transformers' own eager attention serves.
SHORT = {
    Case("bert"): "later ones",
    Case("roberta"): "numbers its tokens",
    Case("diffllama"): "more than once in a layer",
    Case("moshi"): "window of None",
    Case("doge"): "mask of its own",
    Case("hrm_text"): "its first step failed",
    Case("gemma4_text"): "layers differ",
    Case("gpt_oss"): "",
}


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_one_of_each_kind(case: Case) -> None:
    verdict = try_case(case)
    assert verdict.answer == (REFUSED if SHORT[case] else SERVED)
    assert SHORT[case] in verdict.why


def test_a_wrong_answer_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check that finds it, this model is answered wrongly by far more than rounding."""
    monkeypatch.setattr("meswitch.batching.step.PagedStep.enter", lambda self, layer: True)
    monkeypatch.setattr("meswitch.batching.step.PagedStep.complete", True)
    verdict = try_case(Case("diffllama"))
    assert verdict.answer == WRONG and float(verdict.why.split()[2]) > 100 * FARTHEST


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_every_model_is_served_right_or_refused() -> None:
    verdicts = {case: try_case(case) for case in cases()}
    assert not {str(case): verdict.why for case, verdict in verdicts.items() if verdict.answer == WRONG}
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} has" in text:
        assert text == page(verdicts), "python tests/causal_models.py"

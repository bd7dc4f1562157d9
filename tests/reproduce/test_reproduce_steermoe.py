"""Choosing experts as the paper does, and which parts of its road can be run."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.errors import MoesteerError
from moesteer.model_facts import UNKNOWN, LayerShape, ModelFacts
from moesteer.profile import Profile, Scores
from moesteer.reproduce.papers import read_paper
from moesteer.reproduce.steermoe import plan
from moesteer.reproduce.steermoe.ablation import counts_for
from moesteer.reproduce.steermoe.numbers import as_published, is_of_the_paper
from moesteer.reproduce.steermoe.road import road as steermoe_road


def facts(*shapes: tuple[int, int]) -> ModelFacts:
    layers = tuple(LayerShape(layer, *shape) for layer, shape in enumerate(shapes))
    return ModelFacts("made", None, "made", UNKNOWN, UNKNOWN, "made", layers)


def scored(value: np.ndarray, top_k: int) -> Profile:
    zero = np.zeros_like(value)
    scores = Scores(value, zero, zero, zero, zero, zero, zero)
    shapes = facts(*[(value.shape[1], top_k)] * len(value))
    return Profile(model=shapes, scores=scores, name="made")


def slowly(
    value: np.ndarray, top_k: int, activate: int, deactivate: int, sign: int
) -> tuple[list, list, int]:
    """By hand: walk down the ranking; take what has the sign until enough were asked for, and
    leave out what its layer has no room for."""
    ranking = sorted(np.ndindex(value.shape), key=lambda at: (-abs(value[at]), at))
    up: list = []
    down: list = []
    left_out = 0
    for wanted, chosen, way, room in (
        (activate, up, sign, top_k),
        (deactivate, down, -sign, value.shape[1] - top_k),
    ):
        asked = 0
        for layer, expert in ranking:
            if asked < wanted and way * value[layer, expert] > 0:
                asked += 1
                if sum(where == layer for where, _ in chosen) < room:
                    chosen.append((layer, expert))
                else:
                    left_out += 1
    return up, down, left_out


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 12), st.sampled_from(("a", "b"))
)
def test_experts_are_chosen_as_by_hand(seed: int, activate: int, deactivate: int, toward) -> None:
    value = np.random.default_rng(seed).normal(size=(3, 5)).round(1)
    chosen = as_published(scored(value, 2), activate, deactivate, toward)
    up, down, left_out = slowly(value, 2, activate, deactivate, 1 if toward == "a" else -1)
    assert list(chosen.profile.activated) == up
    assert list(chosen.profile.deactivated) == down
    assert len(chosen.left_out) == left_out
    asked = activate + deactivate
    assert len(up) + len(down) + left_out + chosen.short == asked


def test_a_surplus_is_told() -> None:
    value = np.array([[0.9, 0.8, 0.7, -0.1], [0.2, -0.3, -0.4, -0.5]])
    chosen = as_published(scored(value, 2), 4, 0, "a")
    assert chosen.profile.activated == ((0, 0), (0, 1), (1, 0))
    assert chosen.left_out == ((0, 2),)
    assert chosen.short == 0
    assert as_published(scored(value, 2), 6, 0, "a").short == 2


def test_counts_are_the_paper_s_or_the_same_shares() -> None:
    qwen = facts(*[(128, 8)] * 48)
    assert counts_for(qwen, True) == (100, 200, 500, 1000)
    assert counts_for(qwen, False) == (100, 200, 500, 1000)
    # 1.6, 3.3, 8.1 and 16.3 % of 64 and of 1,024 experts
    assert counts_for(facts(*[(16, 4)] * 4), False) == (1, 2, 5, 10)
    assert counts_for(facts(*[(64, 8)] * 16), False) == (17, 33, 83, 167)


def test_a_model_is_the_paper_s_by_its_shape_as_well() -> None:
    known = read_paper("steermoe").model_of("OLMoE-1B-7B-0125-Instruct")
    assert is_of_the_paper(known, facts(*[(64, 8)] * 16))
    assert not is_of_the_paper(known, facts(*[(64, 8)] * 15))
    assert not is_of_the_paper(known, facts(*[(64, 4)] * 16))
    assert not is_of_the_paper(None, facts(*[(64, 8)] * 16))


# -- what can be run -----------------------------------------------------------------------------


def test_without_data_every_step_says_what_it_lacks() -> None:
    road = steermoe_road("some/model", bundled=False)
    assert road.ready == ()
    lacking = {one.step: one.missing for one in road.not_ready}
    assert "--pairs refusal=FILE" in lacking["towards safe"]
    assert "--pairs document=FILE" in lacking["detectors, counts and selection"]
    by_task = {step.split(" ")[0]: missing for step, missing in lacking.items()}
    for task in (*plan.FAITHFULNESS, *plan.SAFETY, *plan.FOR_FAITHFULNESS):
        assert f"--data {task}=FILE" in by_task[task]
    assert "Llama-Guard-3-8B" in by_task["advbench"]
    with pytest.raises(
        MoesteerError, match=r"(?s)nothing of SteerMoE .* --pairs document=FILE"
    ) as told:
        road.check()
    assert "--model testbed" in str(told.value)


def test_what_is_brought_opens_its_steps(pairs_file: Path, tmp_path: Path) -> None:
    mquake = tmp_path / "mquake.jsonl"
    lines = [f'{{"context": "c", "question": "q{n}", "answer": "a"}}\n' for n in range(12)]
    mquake.write_text("".join(lines))
    pairs = {"document": str(pairs_file)}
    alone = steermoe_road("some/model", bundled=False, pairs=pairs)
    assert [step.title for step in alone.ready] == ["experts of document"]
    both = steermoe_road("some/model", bundled=False, pairs=pairs, data={"mquake": str(mquake)})
    assert [step.title for step in both.ready] == [
        "experts of document",
        "numbers of experts",
        "towards faithful",
        "detectors, counts and selection",
    ]
    assert set(both.inputs) == {"pairs document", "mquake"}
    assert "the paper's for Qwen3-30B-A3B" in " ".join(
        steermoe_road("Qwen/Qwen3-30B-A3B", bundled=False, pairs=pairs).settings
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pairs": {"fear": "x.jsonl"}}, "--pairs: fear is none of document, refusal"),
        ({"data": {"mmlu": "x.jsonl"}}, "--data: mmlu is none of mquake"),
        ({"data": {"xstest": "x.csv"}}, "--data: xstest is none of mquake"),
        ({"data": {"mquake": "gone.jsonl"}}, "gone.jsonl"),
        ({"pairs": {"refusal": "gone.jsonl"}}, "gone.jsonl"),
    ],
)
def test_what_is_no_data_of_the_paper_s_is_refused(given: dict, message: str) -> None:
    with pytest.raises(MoesteerError, match=message):
        steermoe_road("some/model", bundled=False, **given)


def test_bundled_models_need_nothing() -> None:
    road = steermoe_road("testbed", bundled=True)
    assert len(road.ready) == len(road.steps) == 9
    assert [one.step for one in road.not_ready] == ["through a prompt template (away from safe)"]

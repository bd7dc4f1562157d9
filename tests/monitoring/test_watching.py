"""Watching on the testbed: counts by another way, false alarms on fresh texts, and detection."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from moesteer.chat import render_prompt
from moesteer.contrast import Message
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.generate import Prompt
from moesteer.model_facts import LayerShape
from moesteer.monitoring.drift import reference_shares, routing_drift
from moesteer.monitoring.reference import Reference, Verdict
from moesteer.monitoring.threshold import bins_of, borders_of, least_texts, threshold
from moesteer.monitoring.watch import as_watched, check, fit_to_file, judged, linked_experts
from moesteer.profile import Profile
from moesteer.testbed import ground_truth
from moesteer.testbed.world import probes

REFUSAL = ground_truth().behaviours["refusal"].planted


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    # In bf16, a text alone and in a batch may differ in the last bit, and so in a close choice.
    return load_transformers("testbed", dtype="float32")


def fitted(
    engine: TransformersEngine, prompts: Sequence[Prompt], folder: Path, **options
) -> Reference:
    given = {"linked": None, "over": "prompt", "false_alarms": 0.1} | options
    return fit_to_file(
        engine,
        prompts,
        out=str(folder / "watch.safetensors"),
        chat_options=(),
        source="here",
        seed=0,
        command="",
        **given,
    )


def verdicts(
    engine: TransformersEngine, prompts: Sequence[Prompt], reference: Reference
) -> list[Verdict]:
    texts = [as_watched(engine, prompt, reference.origin.over, {}) for prompt in prompts]
    return judged(engine, texts, reference)


def alarms(found: Sequence[Verdict]) -> float:
    return float(np.mean([verdict.word == "alarm" for verdict in found]))


def asked(task: str, *splits: str) -> list[Prompt]:
    return [
        Prompt((Message("user", probe.prompt),), f"{task}:{split}:{number}")
        for split in splits
        for number, probe in enumerate(probes(task, split))
    ]


def conversations(number: int, seed: int) -> list[Prompt]:
    """Of one to eight turns, drawn from the same questions and replies."""
    draw = random.Random(seed)
    pool = [probe for task in ("benign", "facts") for probe in probes(task, "fit")]
    found = []
    for place in range(number):
        messages = []
        for probe in draw.choices(pool, k=draw.randint(1, 8)):
            said = Message("assistant", next(iter(probe.expected.values())))
            messages += [Message("user", probe.prompt), said]
        found.append(Prompt(tuple(messages[:-1]), f"conversation {place}"))
    return found


def test_scores_from_the_models_own_router_logits(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    """Counts of every token by transformers' own record of the logits, no code of ours."""
    prompts = asked("restricted", "fit", "dev")
    linked = Profile(activated=REFUSAL)
    reference = fitted(engine, prompts, tmp_path, linked=linked)
    order = np.random.default_rng(0).permutation(len(prompts))

    def table(prompt: Prompt) -> tuple[np.ndarray, int]:
        rendered = render_prompt(prompt.messages, engine.tokenizer)
        ids = engine.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits = engine.model(**ids, output_router_logits=True).router_logits
        k = [shape.top_k for shape in engine.facts.layers]
        chosen = [layer.topk(n, -1).indices for layer, n in zip(logits, k, strict=True)]
        counts = torch.stack([one.flatten().bincount(minlength=16) for one in chosen])
        return counts.numpy(), len(chosen[0])

    half = len(prompts) // 2
    shares = np.sum([table(prompts[i])[0] for i in order[:half]], axis=0) + 0.5
    shares = shares / shares.sum(-1, keepdims=True)
    for place, i in list(enumerate(order[half:]))[:10]:
        counts, tokens = table(prompts[i])
        drift = np.mean([entropy(p, q) for p, q in zip(counts, shares, strict=True)])
        share = np.mean([counts[layer, expert] / tokens for layer, expert in REFUSAL])
        assert reference.tokens[place] == tokens
        assert reference.drift[place] == pytest.approx(drift)
        assert reference.linked[place] == pytest.approx(share)


def test_false_alarms_on_fresh_short_and_long_conversations(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    reference = fitted(engine, conversations(400, 1), tmp_path)
    fresh = verdicts(engine, conversations(400, 2), reference)
    assert len(reference.limits) == 4
    assert max(v.tokens for v in fresh) > 10 * min(v.tokens for v in fresh)
    # 50 held-out texts and some 100 fresh ones a bin: a standard deviation of 5 percentage points
    bins = np.array(bins_of([v.tokens for v in fresh], reference.origin.borders))
    raised = np.array([v.word == "alarm" for v in fresh])
    for number in range(4):
        assert (bins == number).sum() > 60
        assert raised[bins == number].mean() < 0.1 + 3 * 0.052
    assert 0.04 < raised.mean() < 0.16
    # One threshold for all lengths would raise alarms of short texts, and of no long one.
    one = threshold(reference.drift, 0.1)
    over = np.array([v.drift is not None and v.drift > one for v in fresh])
    assert over[bins == 0].mean() > 0.3
    assert over[bins == 3].mean() == 0


def test_false_alarms_over_many_references() -> None:
    """Simulated texts, each with a routing of its own: the mean over draws of the reference."""
    draw = np.random.default_rng(3)
    layers = (LayerShape(0, 8, 2),)

    def texts(number: int) -> list[np.ndarray]:
        tokens = draw.integers(5, 200, number)
        shares = draw.dirichlet(np.arange(1, 9) * 5.0, number)
        return [draw.multinomial(2 * n, p)[None] for n, p in zip(tokens, shares, strict=True)]

    def lengths(found: list[np.ndarray]) -> np.ndarray:
        return np.array([table.sum() // 2 for table in found])

    short, long = [], []
    for _ in range(500):
        ours, held_out, fresh = texts(80), texts(80), texts(40)
        shares = reference_shares(np.sum(ours, axis=0), layers)
        borders = borders_of(lengths(ours), lengths(held_out), least_texts(0.1))
        scores = np.array([routing_drift(table, shares) for table in held_out])
        bins = np.array(bins_of(lengths(held_out), borders))
        limits = [threshold(scores[bins == number], 0.1) for number in range(len(borders) + 1)]
        for table, where in zip(fresh, bins_of(lengths(fresh), borders), strict=True):
            raised = routing_drift(table, shares) > limits[where]
            (short if where < len(limits) / 2 else long).append(raised)
    for raised in (short, long):
        assert len(raised) > 8000
        assert 0.05 < np.mean(raised) < 0.108


def test_other_texts_are_far_from_ordinary_ones(engine: TransformersEngine, tmp_path: Path) -> None:
    """Fitted on benign requests; documents and questions are another matter."""
    reference = fitted(engine, asked("benign", "fit", "dev"), tmp_path)
    assert alarms(verdicts(engine, asked("benign", "test"), reference)) < 0.25
    for task in ("conflicts", "facts", "counting"):
        assert alarms(verdicts(engine, asked(task, "test"), reference)) > 0.9


def test_replies_that_were_steered_away_from_refusing(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    """The unsteered model routes the words of an answer otherwise than those of a refusal."""

    def replied(profile: Profile | None, *splits: str) -> list[Prompt]:
        prompts = asked("restricted", *splits)
        rendered = [render_prompt(prompt.messages, engine.tokenizer) for prompt in prompts]
        replies = engine.generate(rendered, profile, max_new_tokens=16).replies
        return [
            replace(prompt, beside={"reply": reply})
            for prompt, reply in zip(prompts, replies, strict=True)
        ]

    silenced = Profile(deactivated=REFUSAL, name="silenced")
    assert linked_experts(silenced) == tuple(sorted(REFUSAL))
    ordinary = replied(None, "fit", "dev")
    reference = fitted(engine, ordinary, tmp_path, linked=silenced, over="reply")
    assert alarms(verdicts(engine, replied(None, "test"), reference)) < 0.25
    found = verdicts(engine, replied(silenced, "test"), reference)
    assert alarms(found) > 0.95
    assert sum("linked" in verdict.raised for verdict in found) > 0.95 * len(found)


def test_a_reply_without_tokens_is_unknown(engine: TransformersEngine, tmp_path: Path) -> None:
    prompts = [replace(p, beside={"reply": "Use glue."}) for p in asked("benign", "fit")]
    reference = fitted(engine, prompts, tmp_path, over="reply")
    empty = replace(prompts[0], beside={"reply": ""})
    assert [v.word for v in verdicts(engine, [empty, prompts[0]], reference)] == ["unknown", "ok"]
    with pytest.raises(MoesteerError, match="benign:fit:0: the reply has no tokens"):
        fitted(engine, [empty, *prompts[1:]], tmp_path, over="reply")
    with pytest.raises(MoesteerError, match="benign:dev:0: there is no reply to watch"):
        verdicts(engine, asked("benign", "dev"), reference)


def test_no_experts_to_watch() -> None:
    with pytest.raises(MoesteerError, match="empty steers no experts, so there are none to watch"):
        linked_experts(Profile(name="empty"))


def interrupted(
    engine: TransformersEngine,
    prompts: Sequence[Prompt],
    reference: Reference,
    out: Path,
) -> None:
    """Four of the texts are judged and kept, the next two are not."""

    def stop(done: int, total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(engine, prompts, reference, out=str(out), progress=stop)


def test_taken_up_by_the_same_reference_on_the_same_texts_only(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesteer.monitoring.watch.GROUP", 2)
    reference = fitted(engine, asked("benign", "fit", "dev")[:24], tmp_path, false_alarms=0.5)
    reference = replace(reference, origin=replace(reference.origin, borders=()))
    origin, held_out = reference.origin, len(reference.tokens)
    prompts = [replace(p, beside={"id": n}) for n, p in enumerate(asked("facts", "test")[:8])]
    out = tmp_path / "said.jsonl"
    interrupted(engine, prompts, reference, out)

    def fitted_otherwise(shares: np.ndarray = reference.linked, **changes: Any) -> Reference:
        return replace(reference, linked=shares, origin=replace(origin, **changes))

    others = [
        fitted_otherwise(false_alarms=0.49),
        fitted_otherwise(seed=1),
        fitted_otherwise(borders=(int(np.sort(reference.tokens)[5]),)),
        fitted_otherwise(linked=REFUSAL, shares=np.linspace(0, 1, held_out)),
        replace(reference, drift=reference.drift + 1),
        replace(reference, name="other.safetensors"),
    ]
    for other in others:
        with pytest.raises(MoesteerError, match="other prompts or settings left 4"):
            check(engine, prompts, other, out=str(out))
    relabelled = [replace(prompt, beside={"id": "other"}) for prompt in prompts]
    with pytest.raises(MoesteerError, match="other prompts or settings left 4"):
        check(engine, relabelled, reference, out=str(out))

    again = fitted_otherwise(command="moesteer watch fit …", versions={"python": "4"})
    verdicts = check(engine, prompts, again, out=str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(v.word, v.drift) for v in verdicts] == [(one["watch"], one["drift"]) for one in lines]
    assert [line["id"] for line in lines] == list(range(8))

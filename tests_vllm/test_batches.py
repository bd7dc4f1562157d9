"""Requests of many profiles in one engine, in each other's way: each must run as if it were alone.

The engine is made narrow, so that prompts run in chunks, and small, so that requests are preempted;
what the tests rely on having happened, they assert.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from engine import steerable
from saying import prompts
from vllm import SamplingParams, TokensPrompt
from vllm.exceptions import VLLMValidationError

from moesteer.chat import TokenisedConversation
from moesteer.engines.transformers_engine import load_transformers
from moesteer.engines.vllm import evidence, load_profile, profiles, remove_profile
from moesteer.engines.vllm.collected import merged
from moesteer.engines.vllm.names import COUNT, EVIDENCE_KEY, Names
from moesteer.engines.vllm.rows import Rows
from moesteer.engines.vllm_engine import VllmEngine
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile

REQUESTS, PROFILES, SEQUENCES, STEP_TOKENS, BLOCKS = 64, 8, 12, 24, 14
NEW_TOKENS = 20


@dataclass(frozen=True)
class Asked:
    """A request, and by which name it is steered."""

    id: str
    prompt: list[int]
    name: str | None


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logs: list[float]
    cached: int

    def agrees(self, other: "Answer") -> bool:
        return self.tokens == other.tokens and np.allclose(self.logs, other.logs, atol=1e-4)


@dataclass
class Watched:
    """What the rows of the worker were told."""

    preempted: list[str] = field(default_factory=list)
    resumed_prompts: int = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write("glm4_moe", tmp_path_factory.mktemp("models") / "glm4_moe")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    with steerable(
        folder,
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=128,
        block_size=32,
        num_gpu_blocks_override=BLOCKS,
        enable_prefix_caching=True,
    ) as running:
        for number, profile in enumerate(eight_profiles(running.facts.layers)):
            load_profile(running.llm, f"p{number}", profile)
        yield running


def eight_profiles(layers: tuple[LayerShape, ...]) -> list[Profile]:
    draw, found = random.Random(2), []
    hows: list[Any] = [{}, {}, {}, {}, {}, {"rule": "paper"}, {"dose": 0.5}, {}]
    for how in hows[:PROFILES]:
        experts = [(s.layer, draw.sample(range(s.experts), 2)) for s in layers]
        found.append(
            Profile(
                activated=tuple((layer, up) for layer, (up, _) in experts),
                deactivated=tuple((layer, down) for layer, (_, down) in experts[::2]),
                **how,
            )
        )
    return found


@pytest.fixture
def watched(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen = Watched()
    preempt, begin = Rows.preempt, Rows.begin

    def watch_preempt(rows: Rows, stopped: Any) -> None:
        seen.preempted += stopped
        preempt(rows, stopped)

    def watch_begin(rows: Rows, ids: Any, scheduled: Any, computed: Any, extra_args: Any) -> None:
        begin(rows, ids, scheduled, computed, extra_args)
        for request, start in zip(ids, computed, strict=True):
            ours = rows.requests[request]
            seen.resumed_prompts += ours is not None and 0 < start < ours.prompt

    monkeypatch.setattr(Rows, "preempt", watch_preempt)
    monkeypatch.setattr(Rows, "begin", watch_begin)
    return seen


def requests() -> list[Asked]:
    """Prompts of every length, many of which begin alike; in turn no profile and each of eight."""
    draw, shared = random.Random(1), prompts((70,))[0]
    asked = []
    for number in range(REQUESTS):
        own = [draw.randrange(5, 1000) for _ in range(draw.randint(1, 30))]
        which = number % (PROFILES + 1)
        name = f"p{which - 1}" if which else None
        asked.append(Asked(f"r{number}", shared[: draw.choice([0, 20, 40, 70])] + own, name))
    return asked


def parameters(name: str | None, **more: Any) -> SamplingParams:
    extra = None if name is None else {"moesteer": name}
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS, "extra_args": extra}
    return SamplingParams(logprobs=1, ignore_eos=True, **settings | more)


def answer(output: Any) -> Answer:
    completion = output.outputs[0]
    logs = [
        at[token].logprob
        for at, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    return Answer(list(completion.token_ids), logs, output.num_cached_tokens or 0)


def start(engine: VllmEngine, asked: Asked, **more: Any) -> None:
    prompt = TokensPrompt(prompt_token_ids=asked.prompt)
    engine.llm.llm_engine.add_request(asked.id, prompt, parameters(asked.name, **more))


def step(engine: VllmEngine) -> dict[str, Answer]:
    outputs = engine.llm.llm_engine.step()
    return {output.request_id: answer(output) for output in outputs if output.finished}


def finish(engine: VllmEngine) -> dict[str, Answer]:
    found = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        found |= step(engine)
    return found


def solo(engine: VllmEngine, asked: Asked) -> Answer:
    """Alone, and with nothing from the cache."""
    start(engine, asked, skip_reading_prefix_cache=True)
    return finish(engine)[asked.id]


def test_each_of_64_requests_runs_as_if_it_were_alone(engine: VllmEngine, watched: Watched) -> None:
    waiting, running = requests(), []
    alone = {asked.id: solo(engine, asked) for asked in waiting}
    assert len({tuple(a.tokens) for a in alone.values()}) > REQUESTS / 2
    assert engine.llm.reset_prefix_cache()
    watched.preempted.clear()
    watched.resumed_prompts = 0
    draw, answers, aborted = random.Random(3), {}, set()
    while waiting or engine.llm.llm_engine.has_unfinished_requests():
        for _ in range(min(len(waiting), draw.choice([0, 1, 4]))):
            running.append(waiting.pop(0))
            start(engine, running[-1])
        if running and draw.random() < 0.05:
            gone = draw.choice(running).id
            engine.llm.llm_engine.abort_request([gone])
            aborted |= {gone} - answers.keys()
        answers |= step(engine)
    assert 3 < len(aborted) < REQUESTS / 4
    assert len(answers) == REQUESTS - len(aborted)
    for request_id, found in answers.items():
        assert found.agrees(alone[request_id]), request_id
    assert len(watched.preempted) > 3
    assert watched.resumed_prompts > 10
    assert any(found.cached for found in answers.values())
    for name, profile in profiles(engine.llm).items():
        if name.startswith("p"):
            for seen in evidence(engine.llm, name):
                assert seen.tokens > 0
                assert seen.obeyed or profile.rule == "paper" or profile.dose < 1


def test_several_replies_to_one_request_are_steered_alike(engine: VllmEngine) -> None:
    prompt = prompts((20,))[0]
    alone = solo(engine, Asked("alone", prompt, "p2"))
    # Greedy, which by its own name allows one reply only.
    sampled = parameters("p2", n=3, temperature=1.0, top_k=1)
    request = TokensPrompt(prompt_token_ids=prompt)
    outputs = engine.llm.generate([request], sampled, use_tqdm=False)[0].outputs
    assert [list(output.token_ids) for output in outputs] == [alone.tokens] * 3


def test_no_row_is_lost(engine: VllmEngine) -> None:
    step(engine)  # tells the worker of what has ended
    finish(engine)
    start(engine, Asked("last", [5, 6, 7], None))
    finish(engine)
    rows: Rows = engine.llm.collective_rpc(lambda worker: worker.moesteer_rows)[0]
    assert sorted(rows.free) == list(range(1, SEQUENCES + 1))
    assert not any(rows.requests.values())


# -- the prefix cache ----------------------------------------------------------------------------


def in_turn(engine: VllmEngine) -> list[Answer]:
    """The same prompt unsteered, under A, under B, and each once more."""
    assert engine.llm.reset_prefix_cache()
    found = []
    for number, name in enumerate([None, "p0", "p1", "p0", "p1", None]):
        start(engine, Asked(f"turn{number}", prompts((64,))[0], name))
        found.append(finish(engine)[f"turn{number}"])
    return found


def alone_in_turn(engine: VllmEngine) -> list[Answer]:
    prompt = prompts((64,))[0]
    return [
        solo(engine, Asked("alone", prompt, name)) for name in (None, "p0", "p1", "p0", "p1", None)
    ]


def test_blocks_that_one_profile_computed_serve_no_other(engine: VllmEngine) -> None:
    alone, found = alone_in_turn(engine), in_turn(engine)
    assert [one.cached > 0 for one in found] == [False, False, False, True, True, True]
    for one, other in zip(found, alone, strict=True):
        assert one.agrees(other)


def test_without_the_salt_they_would(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above is known to be able to fail."""
    alone, resolve = alone_in_turn(engine), Names.resolve

    def unsalted(names: Names, request: Any) -> None:
        resolve(names, request)
        request.cache_salt = None

    monkeypatch.setattr(Names, "resolve", unsalted)
    found = in_turn(engine)
    assert [one.cached > 0 for one in found] == [False, True, True, True, True, True]
    assert not any(one.agrees(other) for one, other in zip(found[1:5], alone[1:5], strict=True))


def test_a_clients_own_salt_is_kept(engine: VllmEngine) -> None:
    assert engine.llm.reset_prefix_cache()
    cached = []
    for number, salt in enumerate(["mine", "yours", "mine"]):
        prompt = TokensPrompt(prompt_token_ids=prompts((64,))[0], cache_salt=salt)
        engine.llm.llm_engine.add_request(f"salt{number}", prompt, parameters("p0"))
        cached.append(finish(engine)[f"salt{number}"].cached > 0)
    assert cached == [False, False, True]


# -- profiles that come and go -------------------------------------------------------------------


def test_running_requests_go_on_with_the_profile_they_began_with(engine: VllmEngine) -> None:
    first, second = (profiles(engine.llm)[name] for name in ("p0", "p1"))
    prompt = prompts((20,))[0]
    old, new = (solo(engine, Asked("alone", prompt, name)) for name in ("p0", "p1"))
    assert not old.agrees(new)
    load_profile(engine.llm, "mine", first)
    for number in range(3):
        start(engine, Asked(f"old{number}", prompt, "mine"))
    answers = {}
    for _ in range(5):
        answers |= step(engine)
    assert not answers
    load_profile(engine.llm, "mine", second)
    start(engine, Asked("new", prompt, "mine"))
    step(engine)
    remove_profile(engine.llm, "mine")
    with pytest.raises(VLLMValidationError, match="named 'mine'; known: p0, p1, p2, p3, p4, p5"):
        start(engine, Asked("late", prompt, "mine"))
    answers = finish(engine)
    for number in range(3):
        assert answers[f"old{number}"].agrees(old)
    assert answers["new"].agrees(new)


# -- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", ["top-k", "top-1", "probability"])
def test_each_prompt_token_is_counted_once(
    engine: VllmEngine, folder: Path, watched: Watched, counted: Any
) -> None:
    """Also where it runs again after preemption; other requests are steered beside it."""
    texts = [
        TokenisedConversation(tuple(ids), tuple(n % 5 > 0 for n in range(len(ids))))
        for ids in prompts(range(12, 60, 4))
    ]
    wanted = load_transformers(str(folder), dtype="float32").count_selections(texts, counted)
    keys = [f"{counted}-{number}" for number in range(len(texts))]
    for number, (key, text) in enumerate(zip(keys, texts, strict=True)):
        spans = [[n, n + 1] for n, inside in enumerate(text.target) if inside]
        extra = {EVIDENCE_KEY: key, COUNT: {"counted": counted, "spans": spans}}
        asked = Asked(key, list(text.ids), None)
        start(engine, asked, extra_args=extra, max_tokens=40, skip_reading_prefix_cache=True)
        start(engine, Asked(f"{key} beside", list(text.ids), f"p{number % PROFILES}"))
    answers = finish(engine)
    assert len(answers) == 2 * len(texts)
    assert any(request.startswith(counted) for request in watched.preempted)
    assert watched.resumed_prompts > 5
    by_worker = engine.llm.collective_rpc("moesteer_collect", args=(keys,))
    for number, key in enumerate(keys):
        tokens, counts, _ = merged(by_worker, key)
        assert tokens == sum(texts[number].target)
        for row, shape in enumerate(engine.facts.layers):
            expected = wanted[number, row, : shape.experts]
            assert np.allclose(
                counts[shape.layer], expected, atol=1e-4 * (counted == "probability")
            )

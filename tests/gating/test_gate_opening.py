"""A gated profile in an engine: each prompt, text and conversation decides, or is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moesteer import testbed
from moesteer.chat import TokenisedConversation
from moesteer.direction import Candidates
from moesteer.directions.prompts import AskedPrompt, as_read, read_prompt_set
from moesteer.engines.opening import opens
from moesteer.engines.probing import scores
from moesteer.engines.readouts import Readout, Term, mean_log_probability
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import DidNotFire, MoesteerError
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.direction_search import direction_search
from moesteer.evaluation.search import search
from moesteer.gate import DirectionProbe, Gate, RoutingProbe
from moesteer.profile import Profile, Scores
from moesteer.rationale.explain import Settings, explain

PLANTED = testbed.ground_truth().behaviours["refusal"].planted
PROBE = RoutingProbe(((0, 3), (1, 9), (2, 7), (3, 12)), (1.0, -0.5, 0.75, 0.5))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return load_transformers("testbed", dtype="float32")


@pytest.fixture(scope="module")
def prompts(engine: TransformersEngine) -> list[AskedPrompt]:
    tasks = ("restricted", "benign", "facts")
    read = [p for task in tasks for p in read_prompt_set(f"testbed:{task}")[:4]]
    return [as_read(engine, prompt, {}) for prompt in read]


@pytest.fixture(scope="module")
def gate(engine: TransformersEngine, prompts: list[AskedPrompt]) -> Gate:
    """One that about half of the prompts open, none of them by a hair."""
    found = np.sort(scores(engine, [prompt.ids for prompt in prompts], PROBE))
    middle = max(range(4, 8), key=lambda n: found[n] - found[n - 1])
    assert found[middle] - found[middle - 1] > 1e-3
    return Gate(PROBE, float(found[middle] + found[middle - 1]) / 2)


@pytest.fixture(scope="module")
def decided(engine: TransformersEngine, prompts: list[AskedPrompt], gate: Gate) -> list[bool]:
    return [float(scores(engine, [p.ids], PROBE)[0]) > gate.threshold for p in prompts]


def test_prompts_are_steered_whole_or_not_at_all(engine, prompts, gate, decided) -> None:
    gated = Profile(activated=PLANTED, gate=gate, name="gated")
    other = Profile(deactivated=PLANTED, name="other")
    texts = [prompt.text for prompt in prompts]
    made = engine.generate(texts, gated, max_new_tokens=12, batch_size=5)
    alone = [
        engine.generate([text], gated.ungated if is_open else None, max_new_tokens=12).replies[0]
        for text, is_open in zip(texts, decided, strict=True)
    ]
    assert made.replies == alone
    assert made.steered == decided
    tokens = sum(len(p.ids) for p, is_open in zip(prompts, decided, strict=True) if is_open)
    for seen in made.evidence:  # prompt and reply of those that opened it, and of no other
        assert seen.profile == "gated"
        assert tokens < seen.tokens <= tokens + 12 * sum(decided) + 5 * 40
    # Beside others in one call
    profiles = [gated, other, None] * 4
    mixed = engine.generate(texts, profiles, max_new_tokens=12)
    expected = [
        is_open if profile is gated else profile is other
        for profile, is_open in zip(profiles, decided, strict=True)
    ]
    assert mixed.steered == expected
    for number, text in enumerate(texts):
        under = profiles[number].ungated if expected[number] else None
        assert mixed.replies[number] == engine.generate([text], under, max_new_tokens=12).replies[0]
    assert engine.generate(texts, [other, None] * 6, max_new_tokens=2).steered is None


def test_no_prompt_that_opens_is_no_failure_but_one_that_does_must_be_proved(
    engine, prompts, gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [prompt.text for prompt in prompts]
    shut = Profile(activated=PLANTED, gate=replace(gate, threshold=1e9))
    made = engine.generate(texts, shut, max_new_tokens=6)
    assert made.steered == [False] * len(texts)
    assert made.evidence == []
    assert made.replies == engine.generate(texts, max_new_tokens=6).replies
    opened = Profile(activated=PLANTED, gate=replace(gate, threshold=-1e9))
    monkeypatch.setattr("moesteer.engines.transformers.seam.SteeredLayer.write", lambda *_: None)
    with pytest.raises(DidNotFire):
        engine.generate(texts, opened, max_new_tokens=6)


def test_texts_are_read_by_what_stands_before_their_first_term(
    engine, prompts, gate, decided
) -> None:
    gated = Profile(deactivated=PLANTED, gate=gate)
    reply = tuple(engine.tokenizer("I cannot help with that.")["input_ids"])
    readouts = [
        Readout(p.ids + reply, tuple(Term(len(p.ids) + n, reply[n], 1.0) for n in (2, 0)))
        for p in prompts
    ]
    readouts.insert(3, Readout((5, 6), ()))
    is_open = [*decided[:3], False, *decided[3:]]
    told: list[int] = []
    found = engine.read(readouts, [gated, None, gated.ungated], progress=told.append)
    assert sum(told) == 3 * len(readouts)
    plain = engine.read(readouts, [None, gated.ungated])
    np.testing.assert_allclose(found[1:], plain, atol=1e-5)
    np.testing.assert_allclose(found[0], np.where(is_open, plain[1], plain[0]), atol=1e-5)
    assert np.abs(plain[1] - plain[0])[is_open].max() > 0.1
    assert found[0, 3] == 0


def test_what_is_left_alone_does_not_diverge(engine, prompts, gate, decided) -> None:
    gated = Profile(deactivated=PLANTED, gate=gate)
    reply = tuple(engine.tokenizer("I cannot help with that.")["input_ids"])
    texts = [
        TokenisedConversation(p.ids + reply, (False,) * len(p.ids) + (True,) * len(reply))
        for p in prompts
    ]
    found = engine.divergence(texts, gated)
    plain = engine.divergence(texts, gated.ungated)
    np.testing.assert_allclose(found, np.where(decided, plain, 0.0), atol=1e-6)
    assert (plain > 0).all()
    shut = replace(gated, gate=replace(gate, threshold=1e9))
    assert not engine.divergence(texts, shut).any()


def test_a_text_without_a_prompt_is_refused_not_decided_by_its_first_token(
    engine, prompts, gate
) -> None:
    gated = Profile(deactivated=PLANTED, gate=gate, name="gated")
    beginning = engine.tokenizer.bos_token_id
    assert beginning is not None
    text = prompts[0].ids
    whole = TokenisedConversation(text, (True,) * len(text))
    begun = TokenisedConversation((beginning, *text), (False,) + (True,) * len(text))
    asked = TokenisedConversation(text, (False,) * 4 + (True,) * (len(text) - 4))
    for without in (whole, begun):
        with pytest.raises(MoesteerError, match="text 2 is read from its beginning on: it has no"):
            engine.divergence([asked, without], gated)
        with pytest.raises(MoesteerError, match="text 2 is read from its beginning on: it has no"):
            engine.read([mean_log_probability(t) for t in (asked, without)], [None, gated])
        assert engine.divergence([without], gated.ungated) > 0
    # A prompt of one word is one; `generate` asks the gate about it, too.
    one_word = TokenisedConversation(text[1:], (False,) + (True,) * (len(text) - 2))
    assert text[1] != beginning
    assert (engine.divergence([one_word], gated) > 0) == opens(engine, [text[1:2]], gate)


def test_a_gate_in_the_stream_opens_as_its_projection_says(engine, prompts) -> None:
    vector = np.random.default_rng(0).normal(size=128)
    unit = tuple((vector / np.linalg.norm(vector)).tolist())
    ids = [prompt.ids for prompt in prompts]
    along = engine.residuals(ids, 2)[:, 2, 0].astype(np.float64) @ np.array(unit)
    threshold = float(np.sort(along)[5:7].mean())
    gated = Profile(activated=PLANTED, gate=Gate(DirectionProbe(2, -2, unit), threshold))
    made = engine.generate([p.text for p in prompts], gated, max_new_tokens=2)
    assert made.steered == (along > threshold).tolist()
    assert 0 < sum(made.steered) < len(prompts)


def test_a_score_that_is_not_finite_ends_it(engine, prompts, gate) -> None:
    broken = SimpleNamespace(
        facts=engine.facts,
        count_selections=lambda read, counted: np.full((len(read), 4, 16), np.nan),
    )
    with pytest.raises(MoesteerError, match="score at the gate is nan"):
        opens(broken, [p.ids for p in prompts], gate)  # type: ignore[arg-type]


# --- what does not ask a gate ---------------------------------------------------------------------


def test_own_code_is_refused(engine, gate) -> None:
    gated = Profile(activated=PLANTED, gate=gate, name="gated")
    for profiles in (gated, [None, gated]):
        with pytest.raises(MoesteerError, match="gated has a gate, which is asked about a whole"):
            steer(engine.model, profiles, engine.layers)
    with steer(engine.model, gated.ungated, engine.layers) as fired:  # nothing was left behind
        with pytest.raises(MoesteerError, match="gated has a gate"):
            fired.replace(gated)
        with torch.no_grad():
            engine.model(torch.tensor([[5, 6, 7]]))


def test_attribution_is_refused(engine, gate) -> None:
    gated = Profile(activated=PLANTED, gate=gate, name="gated")
    readouts = [mean_log_probability(TokenisedConversation((5, 6, 7), (False, False, True)))]
    calls: list[Any] = [
        lambda: list(engine.token_gradients(readouts, gated)),
        lambda: list(engine.attention_maps(readouts, gated)),
        lambda: list(engine.integrated_gradients(readouts, [(0,)], gated)),
        lambda: engine.weigh_selections([(5, 6)], np.zeros((4, 16)), gated),
    ]
    for call in calls:
        with pytest.raises(MoesteerError, match="gated has a gate"):
            call()


def test_rationales_and_searches_are_refused(engine, gate, tmp_path: Path) -> None:
    gated = Profile(activated=PLANTED, gate=gate, name="gated", model=engine.facts)
    with pytest.raises(MoesteerError, match=r"gated has a gate.*rationale does not ask it"):
        explain(engine, [], Settings(("occlusion",)), out=tmp_path / "r", arms={"steered": gated})
    zeros = np.zeros((4, 16))
    scored = replace(gated, activated=(), scores=Scores(*[zeros] * 7))
    card = read_card("testbed-restricted")
    with pytest.raises(MoesteerError, match=r"gated has a gate.*a search does not ask it"):
        search(engine, [scored], card, toward="a", out=tmp_path / "s")
    row = np.array([1])
    found = Candidates("residual", row, -row, -row, np.ones((1, 128), np.float32), {})
    with pytest.raises(MoesteerError, match=r"gated has a gate.*a search does not ask it"):
        direction_search(
            engine, replace(gated, candidates=found), card, toward="a", out=tmp_path / "d"
        )
    assert not list(tmp_path.iterdir())

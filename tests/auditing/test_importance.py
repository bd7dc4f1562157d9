"""Who carries a behaviour: on models of which it is known, and against forward passes by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moesteer.auditing.importance import (
    Decisions,
    Importance,
    fit_and_dev,
    measure_importance,
    read_decisions,
)
from moesteer.chat import tokenise_pairs
from moesteer.detection.comparing import drawn
from moesteer.engines.base import Engine
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.runs import open_run
from moesteer.testbed import ground_truth
from moesteer.testbed.routing import steered

USED = 32


@pytest.fixture(scope="module")
def engine():
    return load_transformers("testbed")


def decisions(engine: Engine, pairs: str, used: int = USED) -> Decisions:
    fit, dev = (drawn(some, used) for some in fit_and_dev(pairs))
    return read_decisions(engine, pairs, fit, dev, {})


def measured(engine: Engine, pairs: str, folder: Path) -> tuple[Importance, Profile]:
    with open_run(folder, "made", {}, {}) as run:
        return measure_importance(
            engine,
            decisions(engine, pairs),
            into=None,
            run=run,
            chat_options={},
            command="moesteer audit",
            progress=None,
        )


@pytest.mark.parametrize("behaviour", ["refusal", "digits"])
def test_exactly_the_planted_experts_are_named(engine, tmp_path: Path, behaviour: str) -> None:
    truth = ground_truth().behaviours[behaviour]
    found, profile = measured(engine, f"testbed:{behaviour}", tmp_path / "run")
    assert {expert.place for expert in found.named} == {*truth.planted}
    assert all(expert.held is not None and expert.held.holds for expert in found.named)
    assert len(found.experts) == 64
    effects = [expert.effect for expert in found.experts]
    assert effects == sorted(effects, reverse=True)
    for expert in found.experts:
        assert expert.low <= expert.effect <= expert.high
        assert abs(expert.sham) <= found.reach
        assert 0 <= expert.turned <= found.going <= found.pairs == USED
    # A decoy is significant, but small: q alone would have named some.
    decoys = [expert for expert in found.experts if expert.place in truth.decoys]
    assert max(expert.effect for expert in decoys) < found.reach / 5
    assert sum(expert.q < 0.05 for expert in found.experts) > len(found.named)
    for expert in found.named:
        assert expert.turned > 0.9 * found.going
    assert (found.behaviour.effective.value or 0) < 4 < (found.sham.effective.value or 0)
    # The profile holds the same, to select experts by.
    assert profile.scores is not None
    first = found.experts[0]
    row = [shape.layer for shape in engine.facts.layers].index(first.layer)
    assert profile.scores.value[row, first.expert] == first.effect
    assert profile.evidence is not None
    assert profile.evidence.detector == "knock-out"


def test_nobody_is_named_where_nothing_was_planted(tmp_path: Path) -> None:
    twin = load_transformers("testbed-twin")
    found, _ = measured(twin, "testbed:refusal", tmp_path / "run")
    assert found.named == ()
    first = found.experts[0]
    # Not for want of significance: one expert moves the decision clearly, and turns none of it.
    assert first.q < 0.05
    assert first.low > 0
    assert first.low < found.reach
    assert first.turned == 0


def test_effects_are_those_of_a_plain_forward_pass(engine, tmp_path: Path) -> None:
    """The testbed's own way of steering, on texts put together here."""
    fit, _ = (drawn(some, 8) for some in fit_and_dev("testbed:refusal"))
    found = decisions(engine, "testbed:refusal", 8)
    expected = []
    for pair in tokenise_pairs(fit, engine.tokenizer):
        parting = next(
            i for i, (a, b) in enumerate(zip(pair.a.ids, pair.b.ids, strict=False)) if a != b
        )
        odds = []
        for off in (0, -1):
            mask = torch.zeros(1, 4, 16)
            mask[0, 2, 2] = off
            with torch.no_grad(), steered(engine.model, mask):
                logits = engine.model(torch.tensor([pair.a.ids[:parting]])).logits[0, -1].float()
            odds.append(float(logits[pair.a.ids[parting]] - logits[pair.b.ids[parting]]))
        expected.append(odds[0] - odds[1])
    without = Profile(deactivated=((2, 2),))
    values = engine.read([readout for (readout,) in found.readouts], [None, without])
    np.testing.assert_allclose(values[0] - values[1], expected, atol=0.15)  # it runs in bf16
    assert max(expected) > 10


def test_sham_decisions_are_within_a_side(engine) -> None:
    """After a pair's prompt, both tokens go on with replies of A, or both with replies of B."""
    fit, _ = (drawn(some, USED) for some in fit_and_dev("testbed:refusal"))
    pairs = tokenise_pairs(fit, engine.tokenizer)
    begun = {
        side: {
            ids[prompt : prompt + length]
            for pair in pairs
            for ids, prompt in [(getattr(pair, side).ids, pair.a.target.index(True))]
            for length in range(1, len(ids))
        }
        for side in ("a", "b")
    }
    found = decisions(engine, "testbed:refusal")
    assert len(found.shams) == USED
    for pair, (readout,) in zip(pairs, found.shams, strict=True):
        prompt = pair.a.target.index(True)
        assert readout.ids[:prompt] == pair.a.ids[:prompt]
        own, other = ((*readout.ids[prompt:], term.token) for term in readout.terms)
        assert own != other
        assert any({own, other} <= replies for replies in begun.values())


# -- pairs ---------------------------------------------------------------------------------------


def write(path: Path, number: int, a: str = "No, never {}", b: str = "Yes, sure: {}") -> str:
    lines = [{"prompt": f"Tell me {n}.", "a": a.format(n), "b": b.format(n)} for n in range(number)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_quarter_of_the_users_pairs_is_held_out(tmp_path: Path) -> None:
    fit, dev = fit_and_dev(write(tmp_path / "pairs.jsonl", 400))
    assert len(fit) + len(dev) == 400
    assert 70 < len(dev) < 130
    assert not {p.source for p in fit} & {p.source for p in dev}
    longer = fit_and_dev(write(tmp_path / "more.jsonl", 500))[1]
    assert {p.a.messages for p in dev} <= {p.a.messages for p in longer}
    bundled = fit_and_dev("testbed:refusal")
    assert [len(split) for split in bundled] == [192, 96]


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesteerError, match=r"of its 1 pairs . would be measured on and . held"):
        fit_and_dev(write(tmp_path / "pairs.jsonl", 1))


def test_replies_that_are_all_alike_are_refused(engine, tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", 40, "No, never.", "Yes, sure.")
    with pytest.raises(MoesteerError, match="all replies of a side are alike"):
        decisions(engine, source)


def test_replies_that_do_not_part_are_refused(engine, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {
            "a": [{"role": "user", "content": f"Document: it rains. Is it dry {n}?"}],
            "b": [{"role": "user", "content": f"Is it dry {n}?"}],
            "target": {"last": f"Is it dry {n}?"},
        }
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(MoesteerError, match="pairs of one prompt and two replies") as caught:
        decisions(engine, str(path))
    assert "--over" not in str(caught.value)

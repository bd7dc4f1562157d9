"""What enters each decoder layer at a text's last tokens, against transformers' own record of it;
and readouts under directions with windows, against one text alone."""

import numpy as np
import pytest
import torch
from test_directing import dense_model, vector
from test_reading import engine
from test_transformers_engine import tokenizer

from moesteer.chat import TokenisedConversation
from moesteer.direction import Direction, Window
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers.steering import Steering
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.profile_fit import check_model

TEXTS = [tuple(np.random.default_rng(n).integers(3, 99, 4 + 3 * n).tolist()) for n in range(4)]


def dense() -> TransformersEngine:
    return TransformersEngine(dense_model(), tokenizer(), id="dense")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "jamba", "dense"])
def test_residuals_are_what_transformers_records(name: str) -> None:
    e = dense() if name == "dense" else engine(name)
    found = e.residuals(TEXTS, 3)
    for text, rows in zip(TEXTS, found, strict=True):
        ids = torch.tensor([text])
        with torch.no_grad():
            output = e.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
            )
        wanted = torch.stack(output.hidden_states[:-1])[:, 0, -3:]
        assert rows.shape == wanted.shape
        np.testing.assert_allclose(rows, wanted, atol=1e-5)


@pytest.mark.parametrize(("last", "said"), [(0, "ask for 1 or more"), (5, "text 1 has 4 tokens")])
def test_tokens_that_a_text_has_not(last: int, said: str) -> None:
    with pytest.raises(MoesteerError, match=said):
        engine("qwen3_moe").residuals(TEXTS, last)


@pytest.mark.parametrize("window", ["prompt", "generation", "all"])
def test_readouts_under_windows_are_those_of_one_text_alone(window: Window) -> None:
    """The prompt of a text that is read is what stands before the first token that is read."""
    e = engine("qwen3_moe")
    direction = Direction(vector(size=5.0), ((1, "mlp"), (2, "input")), window=window)
    profiles = [None, Profile(directions=(direction,), name=window), Profile(((2, 1),))]
    readouts = [
        Readout(text, tuple(Term(p, text[p], 1.0) for p in range(first, len(text))))
        for text, first in zip(TEXTS[1:], (3, 5, 2), strict=True)
    ]
    found = e.read(readouts, profiles)
    for readout, value in zip(readouts, found[1], strict=True):
        ids = torch.tensor([readout.ids])
        prompt = min(term.position for term in readout.terms)
        with Steering(e.model, profiles[1] or Profile(), e.layers, e.stream, prompts=[prompt]):
            with torch.no_grad():
                logs = e.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            logs = logs.double().log_softmax(-1)
        wanted = sum(float(logs[t.position - 1, t.token]) for t in readout.terms)
        assert value == pytest.approx(wanted, abs=1e-3)
    assert not np.allclose(found[0], found[1])


def test_divergence_under_a_direction_of_generated_tokens() -> None:
    """A window that begins behind the prompt can't move the first token's distribution."""
    e = engine("qwen3_moe")
    text = TEXTS[3]
    only_first = TokenisedConversation(text, tuple(i == 6 for i in range(len(text))))
    all_after = TokenisedConversation(text, tuple(i >= 6 for i in range(len(text))))

    def under(window: Window) -> Profile:
        return Profile(directions=(Direction(vector(size=5.0), ((1, "mlp"),), window=window),))

    assert e.divergence([all_after], under("generation"))[0] > 1e-3
    assert e.divergence([only_first], under("prompt"))[0] > 1e-3
    assert e.divergence([only_first], under("generation")).tolist() == [0]


def test_a_dense_model_knows_its_directions_and_no_experts(tmp_path) -> None:
    e = dense()
    assert e.facts.layers == ()
    assert (e.facts.decoder_layers, e.facts.hidden) == (4, 64)
    assert len(e.facts.layer_norms) == 4
    profile = Profile(directions=(Direction(vector(), ((3, "input"),)),), model=e.facts)
    profile.save(tmp_path / "p.safetensors")
    check_model(Profile.load(tmp_path / "p.safetensors"), e.facts)  # warns of nothing
    out = e.generate(["one", "three"], profile, max_new_tokens=3)
    assert {one.tokens for one in out.evidence} == {2 * 7}
    conversation = TokenisedConversation(TEXTS[0], (True,) * 4)
    with pytest.raises(MoesteerError, match="is a dense model: it has no experts"):
        e.count_selections([conversation])

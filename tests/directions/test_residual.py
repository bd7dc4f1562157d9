"""From two sets of prompts to a profile: the vectors, the evidence, and what it does to a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from made_models import Made, made_sets
from moesteer.directions.aiming import Aim
from moesteer.directions.prompts import Sides, draw_sets, read_prompt_set
from moesteer.directions.refusal import prepare_sets, refusal_scores
from moesteer.directions.residual import find_residual_direction, residual_candidates
from moesteer.directions.selection import Thresholds
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

ANY = Thresholds(max_kl=1e9, min_induce=-1e9, max_layer=1.0)


def found(made: Made, thresholds: Thresholds = ANY, aim: Aim | None = None, **more) -> Profile:
    return find_residual_direction(
        made.engine,
        made.sets,
        last=2,
        thresholds=thresholds,
        aim=aim or Aim(),
        batch_size=4,
        seed=1,
        source="a and b",
        command="moesteer direction …",
        **more,
    )


@pytest.mark.parametrize("dense", [False, True])
def test_candidates_are_differences_of_means(dense: bool):
    made = made_sets(dense)
    candidates = residual_candidates(made.engine, made.sets, 4, batch_size=4)
    means = []
    for side in (made.sets.fit.a, made.sets.fit.b):
        states = []
        for prompt in side:
            with torch.no_grad():
                out = made.engine.model(torch.tensor([prompt.ids]), output_hidden_states=True)
            states.append([state[0, -4:].double().numpy() for state in out.hidden_states])
        means.append(np.mean(states, axis=0))
    expected = means[0] - means[1]
    for number in range(len(candidates)):
        layer, position = int(candidates.layer[number]), int(candidates.position[number])
        vector = expected[layer, position]
        np.testing.assert_allclose(candidates.vector[number], vector, atol=2e-5)
        assert candidates.scores["norm"][number] == pytest.approx(np.linalg.norm(vector), abs=1e-4)
    places = set(zip(candidates.layer.tolist(), candidates.position.tolist(), strict=True))
    layers = made.engine.facts.decoder_layers
    # What enters the first layer is a token's embedding; all end in the same three tokens.
    assert places == {(n, p) for n in range(layers) for p in (-4, -3, -2, -1)} - {
        *((0, -3), (0, -2), (0, -1))
    }


@pytest.mark.parametrize("dense", [False, True])
def test_a_profile_comes_back_from_its_file(dense: bool, tmp_path: Path):
    made = made_sets(dense)
    told: list[tuple[int, int]] = []
    profile = found(made, progress=lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1]
    profile.save(tmp_path / "p.safetensors")
    loaded = Profile.load(tmp_path / "p.safetensors")
    assert loaded.directions == profile.directions
    assert loaded.evidence == profile.evidence
    assert loaded.candidates is not None
    assert set(loaded.candidates.scores) == {"norm", "bypass", "induce", "kl"}
    assert loaded.candidates.kind == "residual"
    (direction,) = loaded.directions
    assert (direction.operation, direction.coefficient) == ("add", 1.0)
    best = int(loaded.candidates.scores["bypass"].argmin())
    assert direction.sites == ((int(loaded.candidates.layer[best]), "input"),)
    assert direction.vector == loaded.candidates.vector_of(best)
    assert loaded.toward == "a"
    assert bool(loaded.model.layers) is not dense  # pyright: ignore


def test_the_evidence_says_all_numbers():
    made = made_sets(False)
    seen = found(made).evidence
    assert seen is not None
    assert seen.counted is None
    assert seen.detector == "difference of means"
    assert (seen.pairs, seen.tokens_a, seen.tokens_b) == (8, 16, 16)
    assert (seen.seed, seen.source, seen.data_hash) == (1, "a and b", made.sets.data_hash)
    assert seen.settings == {
        "prompts_a": len(made.habit.a),
        "prompts_b": len(made.habit.b),
        **dict.fromkeys(("fit_a", "fit_b", "fit_a_kept", "fit_b_kept"), 8),
        **dict.fromkeys(("validate_a", "validate_b", "validate_a_kept", "validate_b_kept"), 4),
        "refusal_tokens": repr(made.habit.word),
        "refusal_token_ids": str(made.habit.token),
        "positions": 2,
        "after_instruction": 2,
        "max_kl": 1e9,
        "min_induce": -1e9,
        "max_layer": 1.0,
    }


def test_the_thresholds_hold():
    with pytest.raises(MoesteerError, match=r"none of 6 directions .* \(--min-induce\)"):
        found(made_sets(False), replace(ANY, min_induce=1e3))


def test_sets_that_differ_in_nothing_have_no_direction():
    made = made_sets(False)
    same = replace(made.sets, fit=Sides(made.sets.fit.a, made.sets.fit.a))
    with pytest.raises(MoesteerError, match=r"the same in all 4 layers .* norm 0 points nowhere"):
        residual_candidates(made.engine, same, 2, batch_size=3)


def test_refusal_of_the_testbed_is_one_direction():
    engine = load_transformers("testbed")
    a, b = (read_prompt_set(f"testbed:{task}") for task in ("restricted", "benign"))
    sets = prepare_sets(engine, draw_sets(engine, a, b, fit=24, validate=8), batch_size=16)
    profile = find_residual_direction(
        engine,
        sets,
        last=2,
        thresholds=Thresholds(),
        aim=Aim("ablate"),
        batch_size=16,
        seed=0,
        source="testbed",
    )
    (direction,) = profile.directions
    assert profile.toward == "b"
    # On prompts that it has not seen.
    held_out = draw_sets(
        engine,
        *(read_prompt_set(f"testbed:{task}:test") for task in ("restricted", "benign")),
        fit=80,
        validate=8,
    )
    adding = replace(
        profile,
        directions=(replace(direction, operation="add", sites=((_layer(profile), "input"),)),),
    )
    scores = refusal_scores(engine, held_out.fit.a, sets.tokens, [None, profile])
    assert (scores[0] > 0).mean() > 0.95
    assert (scores[1] < 0).mean() > 0.9
    scores = refusal_scores(engine, held_out.fit.b, sets.tokens, [None, adding, adding.reversed()])
    assert (scores[0] < 0).mean() > 0.95
    assert (scores[1] > 0).mean() > 0.95
    assert (scores[2] < 0).mean() > 0.95


def _layer(profile: Profile) -> int:
    assert profile.candidates is not None
    best = profile.candidates.scores["bypass"].argmin()
    return int(profile.candidates.layer[best])

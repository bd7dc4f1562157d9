"""Who writes a direction: against the stream itself, and as a command."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from as_user import Run
from made_directions import bundled, residual_direction
from made_models import Made, as_prompts, made_sets
from moesteer.direction import Direction, Site
from moesteer.directions.aiming import Aim, aimed
from moesteer.directions.experts import find_expert_directions, method_one, method_two
from moesteer.directions.prompts import AskedPrompt, as_read, read_prompt_set
from moesteer.directions.refusal import refusal_scores, refusal_tokens_of
from moesteer.directions.residual import find_residual_direction
from moesteer.directions.selection import Thresholds
from moesteer.directions.shares import ABLATED, ablations, shares
from moesteer.directions.writers import Writers, find_writers, source_of
from moesteer.errors import MoesteerError
from moesteer.profile import Profile
from moesteer.testbed import ground_truth

ANY = Thresholds(max_kl=1e9, min_induce=-1e9, max_layer=1.0)


def residual(made: Made, layer: int = 2, position: int = -1) -> Profile:
    """A profile with the direction of this layer and position."""
    found = find_residual_direction(
        made.engine,
        made.sets,
        last=2,
        thresholds=ANY,
        aim=Aim(),
        batch_size=4,
        seed=1,
        source="a and b",
    )
    assert found.candidates is not None
    return aimed(found, [found.candidates.find(layer, position)], Aim())


def of_experts(made: Made, kind: Any = "forced") -> Profile:
    return find_expert_directions(made.engine, made.sets, last=3, kind=kind)


def prompts(made: Made) -> tuple[list, list]:
    return as_prompts(made.habit.a[:7], "a.txt"), as_prompts(made.habit.b[:9], "b.txt")


def read(made: Made) -> tuple[list[AskedPrompt], list[AskedPrompt]]:
    a, b = ([as_read(made.engine, p, {}) for p in side] for side in prompts(made))
    return a, b


def found(made: Made, profile: Profile, out: Path, **more: Any) -> Writers:
    return find_writers(made.engine, profile, *prompts(made), out=out, batch_size=4, **more)


# -- contributions -------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("position", [-1, -2])
def test_writers_sum_to_the_projection_of_the_stream(dense, position, tmp_path: Path) -> None:
    made = made_sets(dense)
    profile = residual(made, position=position)
    told: list[tuple[int, int]] = []
    result = found(made, profile, tmp_path / "w", progress=lambda *seen: told.append(seen))
    unit = np.array(profile.directions[0].vector)
    unit /= np.linalg.norm(unit)
    means = []
    for side in read(made):
        states = [made.engine.residuals([p.ids], 2)[0, 2, 2 + position] for p in side]
        means.append(np.mean(states, axis=0, dtype=np.float64) @ unit)
    assert result.total == pytest.approx(means[0] - means[1], abs=1e-4)
    for writers in (result.parts, result.writers):
        assert sum(w.value for w in writers) == pytest.approx(result.total, abs=1e-4)
        assert sum(w.share for w in writers) == pytest.approx(1, abs=1e-4)
    assert {w.layer for w in result.writers} == {None, 0, 1}
    experts = [w for w in result.writers if w.part == "expert"]
    assert len(experts) == (0 if dense else 16)
    for part in result.parts:
        own = [w.value for w in result.writers if w.part == part.part]
        assert sum(own) == pytest.approx(part.value, abs=1e-6)
    assert (result.prompts_a, result.prompts_b, result.layer) == (7, 9, 2)
    assert told[-1] == (7 + 9 + 4 * 7,) * 2
    kept = (tmp_path / "w" / "summary.json").read_text()
    assert Writers.from_json(kept) == result


def test_what_a_layer_writes_is_read_where_it_enters_the_next(tmp_path: Path) -> None:
    made = made_sets(dense=False)
    experts = of_experts(made)
    result = found(made, method_one(experts, 1, 4, -1, 2.0), tmp_path / "w")
    assert result.layer == 2
    last = source_of(method_one(experts, 3, 4, -3, 2.0), 4)
    assert (last.layer, last.position, last.last) == (4, -3, 3)


def test_a_mean_over_positions_is_read_as_one(tmp_path: Path) -> None:
    made = made_sets(dense=False)
    own = of_experts(made, "own")
    assert own.candidates is not None
    expert = int(own.candidates.expert[own.candidates.layer == 1][0])
    profile = method_one(own, 1, expert, 0, 1.0)
    result = found(made, profile, tmp_path / "w")
    unit = np.array(profile.directions[0].vector) / profile.directions[0].norm
    means = []
    for side in read(made):
        states = [made.engine.residuals([p.ids], 3)[0, 2].mean(0) for p in side]
        means.append(np.mean(states, axis=0, dtype=np.float64) @ unit)
    assert result.total == pytest.approx(means[0] - means[1], abs=1e-4)


def test_the_last_layers_direction_has_all_writers(tmp_path: Path) -> None:
    made = made_sets(dense=False)
    result = found(made, method_one(of_experts(made), 3, 0, -1, 1.0), tmp_path / "w")
    assert len(result.writers) == 1 + 4 * (1 + 8 + 1)
    assert result.layer == 4


tables = arrays(
    np.float64, st.tuples(st.integers(4, 9), st.just(4)), elements=st.floats(-50, 50, width=32)
)
COLUMNS = [("embedding", None, None), ("attention", 0, None), ("expert", 0, 3), ("rest", 0, None)]


@settings(max_examples=40, deadline=None)
@given(tables, tables)
def test_shares_are_differences_of_means(a: np.ndarray, b: np.ndarray) -> None:
    a[:, 0] = b[:, 0] = 3.25  # the same in all prompts
    parts, writers, (total, low, high) = shares(a, b, COLUMNS, 0)  # pyright: ignore
    for n, writer in enumerate(writers):
        expected = np.mean(a[:, n]) - np.mean(b[:, n])
        assert writer.value == pytest.approx(expected, abs=1e-9)
        assert (writer.part, writer.layer, writer.expert) == COLUMNS[n]
        assert writer.low <= writer.high
    assert (writers[0].value, writers[0].low, writers[0].high) == (0, 0, 0)
    assert [part.part for part in parts] == ["embedding", "attention", "expert", "rest"]
    assert total == pytest.approx(sum(w.value for w in writers), abs=1e-9)
    assert low <= high


def test_an_interval_draws_each_side_on_its_own() -> None:
    """Against the normal approximation: σ² = σ_a²/n_a + σ_b²/n_b."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(2, 3, (200, 4)), generator.normal(0, 1, (50, 4))
    _, writers, _ = shares(a, b, COLUMNS, 0)  # pyright: ignore
    error = np.sqrt(a.var(0) / 200 + b.var(0) / 50)
    for n, writer in enumerate(writers):
        assert (writer.high - writer.low) / 2 == pytest.approx(1.96 * error[n], rel=0.12)


# -- steering ------------------------------------------------------------------------------------


def test_scores_are_those_of_ablated_outputs(tmp_path: Path) -> None:
    made = made_sets(dense=False)
    profile = residual(made)
    result = found(made, profile, tmp_path / "w")
    a, _ = read(made)
    assert [found.what for found in result.ablated] == list(ABLATED)
    vector = profile.directions[0].vector
    unsteered = refusal_scores(made.engine, a, made.sets.tokens)[0]
    for seen, places in zip(result.ablated, ABLATED.values(), strict=True):
        sites: tuple[Site, ...] = tuple((n, place) for place in places for n in range(4))
        steering = Profile(directions=(Direction(vector, sites, "ablate"),)) if places else None
        scores = refusal_scores(made.engine, a, made.sets.tokens, [steering])[0]
        assert seen.score == pytest.approx(scores.mean(), abs=1e-4)
        assert seen.change == pytest.approx((scores - unsteered).mean(), abs=1e-4)
        assert seen.low <= seen.score <= seen.high
    assert result.by_steering in ("attention", "mlp", None)
    assert result.by_writing in {part.part for part in result.parts}


def test_changes_are_paired() -> None:
    scores = np.array([[1.0, 5.0, 9.0], [0.0, 4.0, 8.0], [1.0, 5.0, 9.0], [1.0, 5.0, 9.0]])
    nothing, attention, *_ = ablations(scores, 0)
    assert (nothing.change_low, nothing.change_high) == (0, 0)
    assert attention.change == attention.change_low == attention.change_high == -1
    assert attention.low < attention.high


@pytest.mark.parametrize(
    ("attention", "mlp", "said"),
    [
        ((-4.0, -4.5, -3.5), (-0.5, -1.0, 0.0), "attention"),
        ((0.5, 0.2, 0.8), (-2.0, -2.5, -1.5), "mlp"),
        ((-2.0, -2.5, -1.5), (-1.5, -2.0, -1.0), None),  # they overlap
        ((-0.1, -0.3, 0.1), (0.5, 0.3, 0.7), None),  # it falls without neither for certain
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), None),
    ],
)
def test_steering_says_nothing_where_the_intervals_do_not(
    attention: tuple[float, ...], mlp: tuple[float, ...], said: str | None, tmp_path: Path
) -> None:
    made = made_sets(dense=False)
    result = found(made, residual(made), tmp_path / "w")
    nothing, of_attention, of_mlp, both = result.ablated
    names = ("change", "change_low", "change_high")
    changed = (
        nothing,
        replace(of_attention, **dict(zip(names, attention, strict=True))),
        replace(of_mlp, **dict(zip(names, mlp, strict=True))),
        both,
    )
    assert replace(result, ablated=changed).by_steering == said


@pytest.mark.parametrize("name", ["expert", "attention"])
def test_the_planted_writer_is_found(name: str, tmp_path: Path) -> None:
    """By what is written and by steering, on prompts that the direction was not found on."""
    model, planted = f"testbed-{name}", ground_truth().writers[name]
    profile = residual_direction(model)
    a, b = (read_prompt_set(f"testbed:{task}:test")[:16] for task in ("restricted", "benign"))
    result = find_writers(bundled(model), profile, a, b, out=tmp_path / "w")
    assert result.layer == planted.layer + 1
    strongest = max(result.writers, key=lambda writer: writer.value)
    assert (strongest.part, strongest.layer) == (name, planted.layer)
    assert strongest.expert == planted.expert
    assert strongest.low > 0.9 * result.total
    assert result.by_writing == name
    assert result.by_steering == ("mlp" if name == "expert" else "attention")
    without = {one.what: one for one in result.ablated}
    other = without["attention" if name == "expert" else "mlp"]
    assert without["nothing"].low > 4
    assert other.low > 4
    assert without["both"].high < -4


# -- what is kept --------------------------------------------------------------------------------


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_sets(dense=False)
    profile = residual(made)
    whole = found(made, profile, tmp_path / "whole")
    real, calls = made.engine.contributions, []

    def killed(texts: Sequence[Sequence[int]], last: int, vector: Sequence[float]) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return real(texts, last, vector)

    monkeypatch.setattr(made.engine, "contributions", killed)
    with pytest.raises(KeyboardInterrupt):
        found(made, profile, tmp_path / "w")
    before = sum(calls)
    calls.clear()
    assert found(made, profile, tmp_path / "w") == whole
    assert before + sum(calls) == 7 + 9
    with pytest.raises(MoesteerError, match="other settings: seed was 0 and is 1"):
        found(made, profile, tmp_path / "w", seed=1)


def test_a_summary_of_another_form_is_refused(tmp_path: Path) -> None:
    made = made_sets(dense=False)
    text = found(made, residual(made), tmp_path / "w").to_json()
    with pytest.raises(MoesteerError, match="format 9"):
        Writers.from_json(json.dumps(json.loads(text) | {"schema": 9}), "here")
    with pytest.raises(MoesteerError, match="here: layer"):
        Writers.from_json(json.dumps(json.loads(text) | {"layer": "two"}), "here")


# -- what can go wrong ---------------------------------------------------------------------------


def test_profiles_without_one_known_direction_are_refused(tmp_path: Path) -> None:
    made = made_sets(dense=False)
    profile = residual(made)
    experts = of_experts(made)
    with pytest.raises(MoesteerError, match="along 0 directions"):
        source_of(replace(profile, directions=()), 4)
    with pytest.raises(MoesteerError, match="along 2 directions"):
        source_of(method_two(experts, 1, -1, 1.0, experts=[2, 3]), 4)
    with pytest.raises(MoesteerError, match="does not hold the candidate"):
        source_of(replace(profile, candidates=None), 4)
    other = replace(profile.directions[0], vector=tuple(range(64)))
    with pytest.raises(MoesteerError, match="does not hold the candidate"):
        source_of(replace(profile, directions=(other,)), 4)
    assert refusal_tokens_of(profile) == made.sets.tokens
    with pytest.raises(MoesteerError, match="does not say which tokens"):
        refusal_tokens_of(replace(profile, evidence=None))


def test_prompts_that_say_too_little_are_refused(tmp_path: Path) -> None:
    made = made_sets(dense=False)
    profile, (a, b) = residual(made), prompts(made)
    with pytest.raises(MoesteerError, match="stands in both sets"):
        find_writers(made.engine, profile, a, [*b, a[2]], out=tmp_path / "w")
    with pytest.raises(MoesteerError, match="side B has 3 prompts; at least 4"):
        find_writers(made.engine, profile, a, b[:3], out=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_nan_names_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_sets(dense=False)
    real = made.engine.contributions

    def broken(texts: Sequence[Sequence[int]], last: int, vector: Sequence[float]) -> Any:
        values = real(texts, last, vector)
        values.attention[1, 0, 0] = np.nan
        return values

    monkeypatch.setattr(made.engine, "contributions", broken)
    with pytest.raises(MoesteerError, match=r"a\.txt:\d+: .* writes NaN"):
        found(made, residual(made), tmp_path / "w")


# -- the command ---------------------------------------------------------------------------------


def given_files(made: Made) -> tuple[str, ...]:
    Path("a.txt").write_text("\n".join(made.habit.a[:6]))
    Path("b.txt").write_text("\n".join(made.habit.b[:6]))
    residual(made).save("r.safetensors")
    return "--with", "r.safetensors", "--restricted", "a.txt", "--harmless", "b.txt"


@pytest.mark.parametrize("dense", [False, True])
def test_from_a_profile_to_a_table(run: Run, dense: bool) -> None:
    made = made_sets(dense)
    options = given_files(made)
    said = run("writers", made.habit.folder, *options, "--out", "w")
    assert said.code == 0, said.err
    assert "what enters layer 2 at position -1" in said.out
    assert "6 restricted than on 6 harmless prompts" in said.out
    assert "what attention writes" in said.out
    assert "written: w" in said.out
    result = Writers.from_json(Path("w/summary.json").read_text())
    for part in result.parts:
        assert f"{part.share:.1%}" in said.out
    assert json.loads(Path("w/run.json").read_text())["kind"] == "writers"
    again = run("writers", made.habit.folder, *options, "--out", "w")
    assert again.out == said.out


def test_bad_input_is_told(refused: Run) -> None:
    made = made_sets(dense=False)
    options, folder = given_files(made), made.habit.folder
    cases = (
        ((*options[2:], "--with", "nothing.safetensors"), "no such profile file"),
        ((*options[:2], "--restricted", "a.txt", "--harmless", "a.txt"), "stands in both sets"),
        ((*options, "--engine", "vllm"), "only --engine transformers"),
        ((*options, "--batch-size", 0), "batch"),
    )
    for given_options, reason in cases:
        said = refused("writers", folder, *given_options, "--out", "w")
        assert reason in said.err
    Path("w").write_text("a file")
    assert "w is a file" in refused("writers", folder, *options, "--out", "w").err

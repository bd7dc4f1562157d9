"""Drafts: what clicks and sliders make of a profile, and what is saved of it."""

import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_profiles import EVIDENCE, LAYERS, MODEL, full
from moesteer.detection.selecting import select_experts
from moesteer.errors import MoesteerError
from moesteer.playground.editing import (
    Draft,
    begin,
    choose,
    crowded,
    cycle,
    limits,
    made,
    remarks,
    saved,
    use_of,
)
from moesteer.profile import Profile, Scores

EXPERTS = [(shape.layer, e) for shape in LAYERS for e in range(shape.experts)]


def scored(seed: int = 0, ties: bool = False) -> Profile:
    """Scores of both signs; with `ties` in tenths, some of them 0."""
    value = np.random.default_rng(seed).uniform(-1, 1, (3, 4))
    value = value.round(1) if ties else value
    ones = np.ones((3, 4))
    scores = Scores(value, value - 0.1, value + 0.1, ones, ones, ones, ones)
    return Profile(model=MODEL, evidence=EVIDENCE, scores=scores, name="scored.safetensors")


EDITS = (st.integers(0, 9), st.lists(st.sampled_from(EXPERTS), max_size=16))


def edited(seed: int, clicked: list[tuple[int, int]], dose: float = 1.0) -> Draft:
    """Begun with scores and edited by hand, so that layers may be asked for too much."""
    draft = begin(scored(seed), MODEL)
    for expert in clicked:
        draft = cycle(draft, expert)
    return replace(draft, dose=dose)


@settings(deadline=None)
@given(*EDITS, st.sampled_from(EXPERTS))
def test_a_click_cycles_one_expert_and_no_other(seed: int, clicked: list, expert: tuple[int, int]):
    uses = []
    now = draft = edited(seed, clicked)
    for _ in range(3):
        now = cycle(now, expert)
        uses.append(use_of(now, expert))
        assert all(use_of(now, e) == use_of(draft, e) for e in EXPERTS if e != expert)
        assert not set(now.activated) & set(now.deactivated)
    at = ["untouched", "activated", "deactivated"].index(use_of(draft, expert))
    assert uses == (["activated", "deactivated", "untouched"] * 2)[at : at + 3]
    assert (set(now.activated), set(now.deactivated)) == (
        set(draft.activated),
        set(draft.deactivated),
    )


def test_an_expert_that_there_is_not_is_refused():
    draft = begin(scored(), MODEL)
    for expert in ((0, 0), (5, 3), (1, -1)):
        with pytest.raises(MoesteerError, match="no expert"):
            cycle(draft, expert)


@settings(deadline=None)
@given(
    st.integers(0, 50),
    st.booleans(),
    st.integers(0, 7),
    st.integers(0, 7),
    st.sampled_from(["a", "b"]),
)
def test_sliders_choose_what_select_chooses(seed: int, ties: bool, up: int, down: int, toward):
    profile = scored(seed, ties)
    draft = choose(begin(profile, MODEL), up, down, toward)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            expected = select_experts(profile, activate=up, deactivate=down, toward=toward)
        except MoesteerError:
            return  # too many for a layer, for the scores, or none at all: see below
    profile = made(draft, profile.name)
    assert (profile.activated, profile.deactivated) == (expected.activated, expected.deactivated)
    assert profile.fingerprint == expected.fingerprint
    assert profile.toward == toward
    assert remarks(draft) == [str(warning.message) for warning in told]


@settings(deadline=None)
@given(*EDITS, st.sampled_from([0.0, 0.5, 1.0]))
def test_a_draft_is_a_profile_where_each_layer_can_obey(seed: int, clicked: list, dose: float):
    draft = edited(seed, clicked, dose)
    too_much = {
        shape.layer
        for shape in LAYERS
        if sum(layer == shape.layer for layer, _ in draft.activated) > shape.top_k
        or shape.experts - sum(layer == shape.layer for layer, _ in draft.deactivated) < shape.top_k
    }
    assert set(crowded(draft)) == too_much
    if too_much:
        with pytest.raises(MoesteerError, match=f"layer {min(too_much)}"):
            made(draft, "mine")
        with pytest.raises(MoesteerError):
            saved(draft, "mine", "moesteer play")
        return
    profile = made(draft, "mine")
    assert profile.name == "mine"
    assert set(profile.activated) == set(draft.activated)
    assert set(profile.deactivated) == set(draft.deactivated)
    assert profile.dose == draft.dose


def test_limits_are_of_the_sign_and_of_the_room():
    for seed, toward in product(range(20), ("a", "b")):
        profile = scored(seed)
        assert profile.scores is not None
        value = profile.scores.value[[0] * 4 + [1] * 4 + [2] * 3, [0, 1, 2, 3] * 2 + [0, 1, 2]]
        sign = 1 if toward == "a" else -1
        positive, negative = int((sign * value > 0).sum()), int((sign * value < 0).sum())
        draft = replace(begin(profile, MODEL), toward=toward)
        assert limits(draft) == (min(positive, 2 + 2 + 1), min(negative, 2 + 2 + 2))
    assert limits(begin(None, MODEL)) == (0, 0)


def test_a_draft_begins_as_what_its_profile_does():
    profile = full()
    draft = begin(profile, MODEL)
    assert draft.is_base
    assert draft.ranked is None  # its experts are not the top of its ranking
    assert made(draft, profile.name).fingerprint == profile.fingerprint
    assert made(draft, profile.name).toward == "b"
    chosen = select_experts(scored(), activate=2, deactivate=1, toward="b")
    draft = begin(chosen, MODEL)
    assert (draft.ranked, draft.toward) == ((2, 1), "b")
    edited = cycle(draft, chosen.activated[0])
    assert edited.ranked is None
    assert made(edited, "x").toward is None  # which side it steers toward is not known any more
    assert cycle(cycle(edited, chosen.activated[0]), chosen.activated[0]).ranked == (2, 1)
    assert not begin(None, MODEL).steers


def test_what_is_saved_says_how_it_was_made(tmp_path: Path):
    chosen = select_experts(scored(), activate=2, deactivate=1, toward="a")
    first = chosen.activated[0]
    begun = begin(chosen, MODEL)
    off = " ".join(map(str, sorted([first, *chosen.deactivated])))
    by_hand = f"edited by hand: activated {chosen.activated[1]}; deactivated {off}"
    for draft, name, said in (
        (begun, "scored.safetensors", "unchanged"),
        (choose(begun, 1, 2, "b"), "x", "select --activate 1 --deactivate 2 --toward b"),
        (replace(begun, dose=0.5), "x", "select --activate 2 --deactivate 1 --toward a, dose 0.5"),
        (cycle(begun, first), "a b/c", by_hand),
    ):
        file, data = saved(draft, name, "moesteer play M --with P")
        path = tmp_path / file
        path.write_bytes(data)
        read = Profile.load(path)
        assert (set(read.activated), set(read.deactivated)) == (
            set(draft.activated),
            set(draft.deactivated),
        )
        assert (read.dose, read.rule, read.model) == (draft.dose, chosen.rule, MODEL)
        assert read.scores is not None
        assert read.evidence is not None
        assert read.evidence.command.startswith("moesteer detect … && moesteer play M --with P (")
        assert read.evidence.command.endswith(f"(on the page: {said})")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-b-c.safetensors",
        "scored.safetensors",
        "x.safetensors",
    ]


def test_names_become_files(tmp_path: Path):
    draft = cycle(begin(None, MODEL), (1, 0))
    for name, file in (
        ("", "by-hand.safetensors"),
        ("../../etc/x", "etc-x.safetensors"),
        ("…", "profile.safetensors"),
        ("größe", "größe.safetensors"),
    ):
        assert saved(draft, name, "moesteer play")[0] == file


def test_nothing_steered_is_not_saved():
    with pytest.raises(MoesteerError, match="nothing is steered"):
        saved(begin(None, MODEL), "x", "moesteer play")

"""The evaluation of a profile on the bundled model: what it says must be so, and survive a kill."""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesteer.chat import render_prompt
from moesteer.contrast import Message
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation import evaluate as home
from moesteer.evaluation.cards import all_cards, read_card
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison
from moesteer.evaluation.evaluate import evaluate, with_prices
from moesteer.evaluation.task import Item, Verdict
from moesteer.profile import Profile, Scores
from moesteer.statistics.intervals import wilson_interval
from moesteer.testbed import ground_truth
from moesteer.testbed.world import outcome, probes

ITEMS = 12
CARDS = ("testbed-document", "testbed-facts")
WORLD = {"testbed-document": "conflicts", "testbed-facts": "facts"}


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return load_transformers("testbed")


@pytest.fixture(scope="module")
def profile(engine: TransformersEngine) -> Profile:
    """The planted experts, with made-up scores: planted first, decoys last."""
    truth = ground_truth().behaviours["document"]
    value, rate = np.full((4, 16), 0.5), np.tile(np.linspace(0.1, 0.4, 16), (4, 1))
    for layer, expert in truth.planted:
        value[layer, expert] = 0.9
    for layer, expert in truth.decoys:
        value[layer, expert] = 0.0
    nothing = np.zeros((4, 16))
    return Profile(
        activated=truth.planted,
        toward="a",
        model=engine.facts,
        scores=Scores(value, nothing, nothing, nothing, nothing, rate, rate),
        name="planted",
    )


def run(
    engine: TransformersEngine,
    profile: Profile,
    out: Path,
    cards: Sequence[str] = CARDS,
    **more: object,
) -> Comparison:
    settings = {"seeds": 1, "limit": ITEMS, "batch_size": 4} | more
    return evaluate(engine, profile, [read_card(c) for c in cards], out=out, **settings)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def done(
    engine: TransformersEngine, profile: Profile, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("evaluations") / "run"
    return out, run(engine, profile, out)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shares_are_those_of_the_worlds_own_judge(done: tuple[Path, Comparison]):
    out, comparison = done
    records = lines(out / "replies.jsonl")
    arms = ["unsteered", "steered", "reversed", "random 0", "matched 0", "bottom"]
    assert [arm.name for arm in comparison.arms] == arms
    assert len(records) == len(CARDS) * len(arms) * ITEMS
    for card in CARDS:
        asked = probes(WORLD[card], "test")[:ITEMS]
        wanted = {"testbed-document": "document", "testbed-facts": "right"}[card]
        for arm in arms:
            mine = {r["item"]: r for r in records if (r["task"], r["arm"]) == (card, arm)}
            said = [outcome(asked[i], mine[i]["reply"]) for i in range(ITEMS)]
            assert [mine[i]["outcome"] for i in range(ITEMS)] == said
            assert [mine[i]["prompt"] for i in range(ITEMS)] == [p.prompt for p in asked]
            share = comparison.share(card, arm)
            assert (share.count, share.n, share.unjudged) == (said.count(wanted), ITEMS, 0)
            assert (share.low, share.high) == wilson_interval(share.count, ITEMS)
    assert records[0]["verdicts"][0]["judge"] == "testbed"


def test_replies_are_the_engines(
    engine: TransformersEngine, profile: Profile, done: tuple[Path, Comparison]
):
    records = lines(done[0] / "replies.jsonl")
    for arm, applied in ((UNSTEERED, None), (STEERED, profile)):
        mine = [r for r in records if (r["task"], r["arm"]) == ("testbed-document", arm)]
        prompts = [render_prompt([Message("user", r["prompt"])], engine.tokenizer) for r in mine]
        replies = engine.generate(prompts, applied, max_new_tokens=16, batch_size=4).replies
        assert [r["reply"] for r in mine] == replies


def test_planted_experts_move_the_target_and_nothing_else_does(done: tuple[Path, Comparison]):
    _, comparison = done
    target = "testbed-document"
    for against in ("unsteered", "random", "matched", "bottom"):
        found = comparison.difference(target, STEERED, against)
        assert found.difference is not None
        assert found.difference >= 0.4
        assert found.low is not None
        assert found.low > 0
        assert found.p is not None
        assert found.holm == pytest.approx(min(1, 2 * found.p))
        assert comparison.difference("testbed-facts", STEERED, against).difference == 0
    backwards = comparison.difference(target, "reversed", UNSTEERED).difference
    assert backwards is not None
    assert backwards <= -0.4


def test_drift_is_large_where_replies_change_only(done: tuple[Path, Comparison]):
    _, comparison = done
    drift = {(d.task, d.arm): d for d in comparison.drifts}
    assert len(drift) == len(CARDS) * (len(comparison.arms) - 1)
    steered, bottom = (drift["testbed-document", arm] for arm in (STEERED, "bottom"))
    assert steered.kl is not None
    assert bottom.kl is not None
    assert steered.kl > 0.1 > bottom.kl >= 0
    assert steered.routing is not None
    assert steered.routing > 0.05
    assert drift["testbed-facts", STEERED].routing == 0


def test_every_arm_fired_and_the_judges_are_told_of(
    profile: Profile, done: tuple[Path, Comparison]
):
    _, comparison = done
    unsteered, steered, *controls = comparison.arms
    assert (unsteered.tokens, steered.activated, steered.obeyed) == (0, profile.activated, True)
    assert all(arm.tokens > len(CARDS) * ITEMS and arm.obeyed for arm in (steered, *controls))
    assert comparison.tasks[0].check.startswith("right on ")
    assert comparison.notes == ()


def test_the_summary_is_the_comparison(done: tuple[Path, Comparison]):
    out, comparison = done
    path = out / "summary.json"
    assert Comparison.from_json(path.read_text(), path) == comparison


def test_an_interrupted_run_is_taken_up(
    engine: TransformersEngine,
    profile: Profile,
    done: tuple[Path, Comparison],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Killed while a line was written: the rest is asked, and the outcome is the same."""
    whole, comparison = done
    out = tmp_path / "run"
    out.mkdir()
    kept = 3 * ITEMS + 5
    text = (whole / "replies.jsonl").read_text().splitlines(keepends=True)
    (out / "replies.jsonl").write_text("".join(text[:kept]) + text[kept][:20])
    for name in ("run.json", "fired.jsonl"):
        (out / name).write_text((whole / name).read_text())
    asked: list[int] = []
    generate = engine.generate

    def counted(prompts: Sequence[str], *args, **kwargs):
        asked.append(len(prompts))
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(engine, "generate", counted)
    said: list[str] = []
    progress: list[tuple[int, int]] = []
    again = run(
        engine, profile, out, say=said.append, progress=lambda *numbers: progress.append(numbers)
    )
    assert again == comparison
    assert lines(out / "replies.jsonl") == lines(whole / "replies.jsonl")
    total = len(text)
    assert said == [f"2 tasks × 6 arms: {total} replies, {kept} of them are there"]
    assert (progress[0], progress[-1]) == ((kept, total), (total, total))
    # Arms that are there whole are not asked again; a group that is there in part is.
    assert sum(asked) == total - 3 * ITEMS

    def refuse(*args, **kwargs):
        raise AssertionError("all of it is there")

    monkeypatch.setattr(engine, "generate", refuse)
    monkeypatch.setattr(engine, "divergence", refuse)
    assert run(engine, profile, out) == comparison


def test_a_task_that_comes_later_is_added(
    engine: TransformersEngine,
    profile: Profile,
    done: tuple[Path, Comparison],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """By a profile that was made anew, too: when and how it was made decides nothing."""
    out, before = tmp_path / "run", done[1]
    shutil.copytree(done[0], out)
    old = lines(out / "replies.jsonl")
    asked: list[int] = []
    generate = engine.generate

    def counted(prompts: Sequence[str], *args, **kwargs):
        asked.append(len(prompts))
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(engine, "generate", counted)
    more = (*CARDS, "testbed-benign")
    after = run(engine, profile.made_by("moesteer select …"), out, more)
    assert sum(asked) == len(before.arms) * ITEMS
    assert lines(out / "replies.jsonl")[: len(old)] == old
    assert [task.name for task in after.tasks] == list(more)
    assert [share for share in after.shares if share.task in CARDS] == list(before.shares)
    assert run(engine, profile, out, more) == after
    with pytest.raises(MoesteerError, match=r"testbed-benign was .* and is null now"):
        run(engine, profile, out)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"limit": ITEMS - 1}, r"tasks\.testbed-\w+ was"),
        ({"split": "dev"}, "split was"),
        ({"seeds": 2}, "seeds was 1 and is 2 now"),
        ({"max_new_tokens": 5}, r"max_new_tokens\.testbed-\w+ was \d+ and is 5 now"),
    ],
)
def test_other_settings_are_not_mixed_in(
    engine: TransformersEngine,
    profile: Profile,
    done: tuple[Path, Comparison],
    more: dict,
    message: str,
):
    before = (done[0] / "replies.jsonl").read_bytes()
    with pytest.raises(MoesteerError, match=message):
        run(engine, profile, done[0], **more)
    assert (done[0] / "replies.jsonl").read_bytes() == before


def test_another_profile_is_not_mixed_in(
    engine: TransformersEngine, profile: Profile, done: tuple[Path, Comparison]
):
    other = replace(profile, activated=profile.activated[:1])
    with pytest.raises(MoesteerError, match=r"experts was \"activated \(\(1, 9\)"):
        run(engine, other, done[0])


def test_a_folder_of_another_version_is_refused(
    engine: TransformersEngine, profile: Profile, tmp_path: Path
):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text('{"schema": 99}')
    with pytest.raises(MoesteerError, match="is a run of format 99"):
        run(engine, profile, out)
    assert (out / "run.json").read_text() == '{"schema": 99}'


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seeds": -1}, "--seeds is -1; it must be at least 0"),
        ({"limit": 0}, "--limit is 0; it must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"split": "train"}, "there is no split 'train'"),
        ({"data": {"testbed-facts": "x.jsonl"}}, "testbed-facts has its prompts built in"),
    ],
)
def test_bad_numbers(
    engine: TransformersEngine, profile: Profile, tmp_path: Path, more: dict, message: str
):
    with pytest.raises(MoesteerError, match=message):
        run(engine, profile, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_a_profile_that_steers_nothing(engine: TransformersEngine, tmp_path: Path):
    with pytest.raises(MoesteerError, match="p steers nothing"):
        run(engine, Profile(name="p"), tmp_path / "run")


def test_what_can_not_be_measured_is_refused_before_anything_is_asked(
    engine: TransformersEngine, profile: Profile, tmp_path: Path
):
    card, out = read_card("testbed-document"), tmp_path / "run"
    assert profile.model is not None
    other = replace(profile, model=replace(profile.model, config_hash="other"))
    for cards, one, more, said in (
        ([], profile, {}, "there is no task"),
        ([card, card], profile, {}, "two tasks of the name testbed-document"),
        ([card], profile, {"data": {"towns": "f.jsonl"}}, "--data names 'towns'"),
        ([card], profile, {"max_new_tokens": 1000}, r"conflicts:test:1: .* 1000 new ones"),
        ([card], other, {}, "config hash is other in the profile"),
    ):
        with pytest.raises(MoesteerError, match=said):
            evaluate(engine, one, cards, out=out, **more)  # pyright: ignore[reportArgumentType]
        assert not out.exists()


def test_damaged_records_are_named_and_no_proof_is_made_up(
    engine: TransformersEngine, profile: Profile, done: tuple[Path, Comparison], tmp_path: Path
):
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    (out / "fired.jsonl").unlink()
    again = run(engine, profile, out)
    assert not any(arm.obeyed for arm in again.arms if arm.name != UNSTEERED)
    with (out / "replies.jsonl").open("a") as file:
        file.write('{"task": "t"}\n')
    with pytest.raises(MoesteerError, match=r"replies.jsonl:\d+ lacks 'arm'"):
        run(engine, profile, out)


def test_what_could_not_be_judged_is_counted_and_left_out(
    engine: TransformersEngine,
    profile: Profile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    class Unsure:
        name, outcomes = "unsure", ("right", "wrong")

        def __call__(self, items: Sequence[Item], replies: Sequence[str]) -> list[Verdict]:
            said = ["right", None, "wrong"]
            return [Verdict("unsure", said[len(item.prompt) % 3], "hm") for item in items]

    monkeypatch.setattr(home, "make_judges", lambda *_: [Unsure()])
    comparison = evaluate(
        engine, profile, [read_card("testbed-facts")], out=tmp_path / "run", seeds=0, limit=9
    )
    lengths = [len(p.prompt) % 3 for p in probes("facts", "test")[:9]]
    share = comparison.share("testbed-facts", STEERED)
    assert (share.count, share.n, share.unjudged) == (
        lengths.count(0),
        9 - lengths.count(1),
        lengths.count(1),
    )
    assert comparison.difference("testbed-facts", STEERED, UNSTEERED).n == share.n


def test_arms_beside_are_asked_and_compared(
    engine: TransformersEngine, profile: Profile, tmp_path: Path
):
    decoys = Profile(activated=ground_truth().behaviours["document"].decoys, name="decoys")
    comparison = evaluate(
        engine,
        profile,
        [read_card(c) for c in CARDS],
        out=tmp_path / "run",
        seeds=0,
        limit=ITEMS,
        beside={"decoys": decoys},
    )
    assert comparison.arms[-1].name == "decoys"
    found = comparison.difference("testbed-document", STEERED, "decoys").difference
    assert found is not None
    assert found >= 0.4


# -- the price -----------------------------------------------------------------------------------


def test_beside_a_target_of_the_testbed_stand_all_its_tasks():
    target = read_card("testbed-document")
    found = with_prices([target], {})
    assert found[0] == target
    names = [card.name for card in found]
    assert sorted(names) == sorted(c.name for c in all_cards() if c.testbed is not None)
    assert {card.role for card in found[1:]} == {"price"}


def test_a_price_that_is_named_is_enough():
    cards = [read_card(c) for c in CARDS]
    assert with_prices(cards, {}) == cards


def test_without_prices_it_is_said(monkeypatch: pytest.MonkeyPatch):
    own = replace(read_card("testbed-document"), name="mine")
    own = replace(own, prompts=replace(own.prompts, source="mine.jsonl"))
    price = replace(own, name="harmless", role="price")
    monkeypatch.setattr(home, "all_cards", lambda: [read_card("testbed-facts"), price])
    with pytest.warns(MoesteerWarning, match="only targets are measured, no price"):
        assert with_prices([own], {}) == [own]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_prices([own], {"harmless": "f.jsonl"}) == [own, price]


# -- judges --------------------------------------------------------------------------------------


class Down:
    """A judge that cannot say on its first day, as an endpoint that is down."""

    name, outcomes = "down", ("document", "fact", "other")
    days = 0

    def __call__(self, items: Sequence[Item], replies: Sequence[str]) -> list[Verdict]:
        Down.days += 1
        if Down.days == 1:
            return [Verdict(self.name, None, "no answer")] * len(replies)
        return [Verdict(self.name, "document")] * len(replies)


def test_what_an_endpoint_did_not_judge_is_judged_when_the_run_is_taken_up(
    engine: TransformersEngine, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(home, "make_judges", lambda *_: [Down()])
    monkeypatch.setattr(Down, "days", 0)
    card = replace(read_card("testbed-document"), role="price")

    def once() -> Comparison:
        return evaluate(engine, profile, [card], out=tmp_path / "run", seeds=0, limit=3)

    first, second = once().share(card.name, UNSTEERED), once().share(card.name, UNSTEERED)
    assert (first.n, first.share, first.unjudged) == (0, None, 3)
    assert (second.n, second.count, second.unjudged) == (3, 3, 0)
    written = lines(tmp_path / "run" / "replies.jsonl")
    assert once().share(card.name, UNSTEERED) == second
    assert lines(tmp_path / "run" / "replies.jsonl") == written  # nothing is left to judge


def test_judges_that_differ_are_counted(
    engine: TransformersEngine, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = home.make_judges
    monkeypatch.setattr(Down, "days", 1)  # it says "document" to all
    monkeypatch.setattr(home, "make_judges", lambda *known: [*made(*known), Down()])
    card = replace(read_card("testbed-document"), role="price")
    comparison = evaluate(engine, profile, [card], out=tmp_path / "run", seeds=0, limit=4)
    others = sum(share.n - share.count for share in comparison.shares)
    asked = 4 * len(comparison.arms)
    assert comparison.tasks[0].agreement == f"its judges differ on {others} of {asked} replies"
    assert others > 0

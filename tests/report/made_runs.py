"""Results made by hand, without a model: a comparison, and run folders of every kind."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from made_rationales import finetune_run, rationale_run

from moesteer.direction import Candidates, Direction
from moesteer.directions.shares import PARTS, Ablated, Writer
from moesteer.directions.writers import Writers
from moesteer.evaluation.comparison import (
    ArmFacts,
    Comparison,
    Difference,
    Drift,
    TaskFacts,
    compare,
    pool_of,
)
from moesteer.evaluation.direction_choices import Choice
from moesteer.evaluation.direction_search import Control, DirectionResult
from moesteer.evaluation.direction_trials import DirectionTrial
from moesteer.evaluation.search import Found, SearchResult, Trial
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Evidence, Profile, Scores
from moesteer.runs import open_run

ABOUT = {"command": "moesteer made by-hand", "versions": {"moesteer": "0"}, "date": "2026-01-01"}
WICKED = "<script>alert(\"1\")</script> & 'quoted' | `code` *bold*"
"""A reply that would run, break a table or be set in bold if it were not escaped."""


def facts(name: str = "made/model", norm: float = 1.0, experts: int = 4) -> ModelFacts:
    layers = (LayerShape(1, experts, 2), LayerShape(3, experts, 2))
    return ModelFacts(name, None, "qwen3_moe", "hash", "words", "softmax", layers, (norm, norm))


def profile(model: ModelFacts | None = None) -> Profile:
    """Expert (1, 2) goes most with A and is activated; (3, 0) goes with B and is deactivated."""
    value = np.array([[0.0, 0.1, 0.8, -0.1], [-0.4, 0.0, 0.2, 0.0]])
    p = np.array([[1.0, 0.5, 0.0001, 0.5], [0.01, 1.0, 0.2, 1.0]])
    q = np.minimum(1, 4 * p)
    evidence = Evidence(
        detector="risk-difference",
        counted="top-k",
        pairs=12,
        source="pairs.jsonl",
        data_hash="data",
        target="reply",
        tokens_a=100,
        tokens_b=200,
        seed=7,
        interval="bootstrap",
        spans="as given",
        stability=0.9,
        versions={"moesteer": "0"},
        command="moesteer detect made/model --pairs pairs.jsonl",
    )
    return Profile(
        activated=((1, 2),),
        deactivated=((3, 0),),
        toward="a",
        model=model or facts(),
        evidence=evidence,
        scores=Scores(value, value - 0.1, value + 0.1, p, q, 0.5 + value / 2, 0.5 - value / 2),
        name="made.safetensors",
    )


def task(
    name: str = "towns",
    role: Literal["target", "price"] = "target",
    *,
    harmless: bool = True,
    check: str = "right on 8 of 8 known replies",
) -> TaskFacts:
    return TaskFacts(name, f"All {name}", "yes", ("yes", "no"), role, harmless, 20, check)


ARMS = ("unsteered", "steered", "reversed", "random 0", "random 1", "bottom")

Numbers = tuple[float | None, float | None, float | None, float | None]
"""Difference, low, high, Holm's p."""


def comparison(
    tasks: Mapping[TaskFacts, Mapping[tuple[str, str], Numbers]],
    arms: Sequence[str] = ARMS,
    model: str = "made/model",
    seeds: tuple[float, ...] = (0.5, 0.5),
) -> Comparison:
    """A comparison with given differences by (arm, against); those not named are zero.

    Of the shares only those of the random `seeds` are known.
    """
    nothing, _ = compare(list(tasks), arms, [], 0)
    known = {f"random {number}": share for number, share in enumerate(seeds)}
    shares = tuple(replace(share, share=known.get(share.arm)) for share in nothing)
    pools = [pool for pool in dict.fromkeys(map(pool_of, arms)) if pool != "unsteered"]
    pairs = [(pool, "unsteered") for pool in pools]
    pairs += [("steered", pool) for pool in pools if pool != "steered"]
    differences = []
    for one, given in tasks.items():
        for pair in pairs:
            mean, low, high, p = given.get(pair, (0.0, -0.1, 0.1, 1.0))
            differences.append(Difference(one.name, *pair, 20, mean, low, high, p, p))
    return Comparison(
        model=model,
        profile="made.safetensors",
        split="test",
        seed=0,
        tasks=tuple(tasks),
        arms=tuple(ArmFacts(arm) for arm in arms),
        shares=shares,
        differences=tuple(differences),
    )


def evaluate_run(
    folder: Path,
    *,
    tasks: Sequence[TaskFacts] = (task(), task("sums", "price")),
    model: ModelFacts | None = None,
    finished: bool = True,
    steered: Profile | None = None,
) -> Path:
    """Steering turns every second reply of the target from no to yes; controls do nothing."""
    steered = steered or profile(model)
    assert steered.model is not None
    records: list[dict[str, Any]] = []
    for one in tasks:
        for arm in ARMS:
            for item in range(one.items):
                yes = item % 2 == 0 or (arm == "steered" and one.role == "target")
                outcome = "yes" if yes else "no"
                records.append(
                    {
                        "task": one.name,
                        "arm": arm,
                        "item": item,
                        "prompt": f"{one.name} {item}?",
                        "reply": f"{outcome} {WICKED}",
                        "outcome": outcome,
                        "verdicts": [
                            {"judge": "contains", "outcome": outcome, "note": "", "score": None}
                        ],
                    }
                )
    shares, differences = compare(tasks, ARMS, records, 0)
    arms = [ArmFacts("unsteered")]
    words = tuple(direction.words for direction in steered.directions)
    arms += [
        ArmFacts(a, steered.activated, steered.deactivated, 99, True, f"arm {a}", words)
        for a in ARMS[1:]
    ]
    made = Comparison(
        model=steered.model.id,
        profile=steered.name,
        split="test",
        seed=0,
        tasks=tuple(tasks),
        arms=tuple(arms),
        shares=tuple(shares),
        differences=tuple(differences),
        drifts=(Drift(tasks[0].name, "steered", 0.25, 0.125),),
    )
    settings = {
        "model_facts": asdict(steered.model),
        "profile": json.loads(steered.to_json()),
        "seeds": 2,
    }
    with open_run(folder, "evaluate", settings, ABOUT) as run:
        run.add("replies", records)
        if finished:
            (folder / "summary.json").write_text(made.to_json())
    return folder


def trial(
    activate: int, target: float, price: float, *, stage: str = "search", control: bool = False
) -> Trial:
    who = "random" if control else None
    values = {"towns": target, "sums": price}
    allowed = price >= 0.8
    return Trial(stage, who, 0, "risk-difference", activate, 0, "a", values, 0.1, allowed, target)


def search_run(folder: Path) -> Path:
    unsteered = replace(trial(0, 0.5, 1.0, stage="unsteered"), detector="")
    trials = [trial(1, 0.6, 1.0), trial(2, 0.9, 0.9), trial(4, 1.0, 0.4)]
    control = trial(2, 0.55, 0.9, control=True)
    with open_run(folder, "search", {"model_facts": asdict(facts()), "seed": 0}, ABOUT) as run:
        run.add("trials", [asdict(one) for one in (unsteered, *trials, control)])
        profile().save(folder / "best.safetensors")
        test = evaluate_run(folder / "test")
        result = SearchResult(
            model="made/model",
            target="towns",
            outcome="yes",
            toward="a",
            prices={"sums": 0.8},
            max_kl=None,
            optimiser="grid",
            budget=3,
            seeds=2,
            seed=0,
            unsteered=unsteered,
            best=trials[1],
            controls=(Found(0, control), Found(1, None)),
            dose=tuple(replace(one, stage="dose") for one in trials),
            front=(unsteered, *trials),
            test=Comparison.from_json((test / "summary.json").read_text()),
        )
        (folder / "summary.json").write_text(result.to_json())
    return folder


def detectors_run(folder: Path) -> Path:
    def scored(title: str, sign: float, rho: float | None) -> dict[str, Any]:
        scores = [
            {"layer": layer, "expert": e, "value": sign * (e + layer), "low": 0.0, "high": 1.0}
            | {"p": 0.01, "q": 0.01 * e}
            for layer in (1, 3)
            for e in range(4)
        ]
        agreement = {"signed": rho, "size": rho, "shared": 2}
        return {"title": title, "scores": scores, "agreement": agreement, "recovery": None}

    summary = {
        "pairs": 12,
        "over": "decision",
        "strongest": 3,
        "detectors": {
            "knock-out": scored("knock-out", 1.0, 1.0),
            "risk-difference": scored("risk difference (top-k)", -2.0, -1.0),
            "flat": scored("flat", 0.0, None),
        },
        "beside": {},
    }
    with open_run(folder, "detectors", {"model": asdict(facts()), "seed": 0}, ABOUT):
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def judge_run(folder: Path, *, seen: int = 2) -> Path:
    summary = {
        "card": "towns",
        "judge": "contains",
        "gold": "gold.jsonl",
        "date": "2026-01-01",
        "modes": {
            "unchanged": {"seen": 8, "n": 8, "low": 0.6, "high": 1.0},
            "negated": {"seen": seen, "n": 8, "low": 0.1, "high": 0.6},
        },
        "confusion": {
            "yes": {"yes": 8, "no": 0, "unjudged": 0},
            "no": {"yes": 8 - seen, "no": seen, "unjudged": 0},
        },
        "seconds": 0.1,
        "calls": 0,
        "tokens": 0,
    }
    with open_run(folder, "judge", {"model": None}, ABOUT):
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def directed(kind: Literal["residual", "own"] = "residual") -> Profile:
    """A direction of layer 3 is added; of experts, expert 1 of that layer weighs it.

    Candidates are of layers 1 and 3 at two positions, or of two experts a layer, of which those of
    layer 3 are over the routing threshold.
    """
    places = [(layer, position) for layer in (1, 3) for position in (-2, -1)]
    layer, position = (np.array(column) for column in zip(*places, strict=True))
    vector = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    settings: dict[str, bool | int | float | str] = {
        "refusal_tokens": "'No'",
        "refusal_token_ids": "7",
        "positions": 2,
    }
    if kind == "residual":
        scores = {
            "norm": np.linalg.norm(vector, axis=1),
            "bypass": np.array([2.0, 1.0, 3.0, -1.5]),
            "induce": np.array([-1.0, 0.5, -2.0, 1.0]),
            "kl": np.array([0.01, 0.3, 0.02, 0.05]),
        }
        expert = np.full(4, -1)
        settings |= {"max_kl": 0.1, "min_induce": 0.0, "max_layer": 0.9}
        direction = Direction(tuple(vector[3].tolist()), ((3, "input"),), coefficient=2.0)
    else:
        scores = {
            "routing": np.array([0.05, -0.1, 0.2, 0.6]),
            "kept": np.array([0.0, 0.0, 1.0, 1.0]),
        }
        expert, position = np.array([0, 1, 0, 1]), np.zeros(4, dtype=int)
        direction = Direction(tuple(vector[3].tolist()), ((3, "mlp"),), coefficient=30.0, expert=1)
    made = profile()
    assert made.evidence is not None
    return Profile(
        directions=(direction,),
        toward="a",
        model=replace(facts(), decoder_layers=4, hidden=3),
        evidence=replace(
            made.evidence, detector="difference of means", counted=None, settings=settings
        ),
        candidates=Candidates(kind, layer, position, expert, vector, scores),
        name=f"{kind}.safetensors",
    )


def direction_trial(
    choice: Choice | None, score: float, kl: float | None = None, yes: int | None = None
) -> DirectionTrial:
    if yes is None:
        return DirectionTrial(choice, score, kl)
    outcomes = {"towns": {"yes": yes, "no": 19 - yes, "neither": 1}, "sums": {"yes": 20, "no": 0}}
    return DirectionTrial(choice, score, kl, outcomes, True, yes / 20)


def direction_search_run(folder: Path, kind: Literal["residual", "own"] = "own") -> Path:
    """Of four choices two are judged; a control with two choices found one."""
    weighted = kind == "own"
    places = [(3, 0, (1,)), (3, 0, (0,))] if weighted else [(3, -1, ()), (3, -2, ())]
    mine = [Choice(None, *place, c) for place in places for c in (10.0, 30.0)]
    theirs = [Choice(0, 1, place[1], (1,) if weighted else (), 30.0) for place in places[:1]]
    trials = [
        direction_trial(mine[0], 1.0, 0.1, 12),
        direction_trial(mine[1], 4.0, 0.2, 18),
        direction_trial(mine[2], -3.0),
        direction_trial(mine[3], 5.0, 7.0),
        direction_trial(theirs[0], -2.0, 0.0, 5),
    ]
    unsteered = direction_trial(None, -4.0, 0.0, 0)
    settings = {"model_facts": asdict(facts()), "seeds": 2}
    with open_run(folder, "direction search", settings, ABOUT) as run:
        for one in (unsteered, *trials):
            choice = one.choice and asdict(one.choice)
            run.add("scores", [{"choice": choice, "score": one.score}])
            if one.kl is not None:
                run.add("kl", [{"choice": choice, "kl": one.kl}])
            if one.outcomes is not None:
                run.add("judged", [{"choice": choice, "outcomes": one.outcomes}])
        directed(kind).save(folder / "best.safetensors")
        test = evaluate_run(folder / "test", steered=replace(directed(kind), candidates=None))
        result = DirectionResult(
            model="made/model",
            kind=kind,
            target="towns",
            outcome="yes",
            toward="a",
            prices={"sums": 0.8},
            max_kl=1.0,
            coefficients=(10.0, 30.0),
            methods=("one",) if weighted else (),
            budget=2,
            others=1,
            seeds=2,
            tried=4,
            unsteered=unsteered,
            best=trials[1],
            judged=(trials[1], trials[0]),
            controls=(
                Control(0, ((1, 1),) if weighted else (), 1, trials[4]),
                Control(1, ((1, 0),) if weighted else (), 1, None),
            ),
            test=Comparison.from_json((test / "summary.json").read_text()),
        )
        (folder / "summary.json").write_text(result.to_json())
    return folder


def writers_run(folder: Path) -> Path:
    """Attention of layer 1 writes three quarters, one of two experts a quarter."""
    by_layer = [
        Writer("embedding", None, None, 0.0, -0.1, 0.1, 0.0),
        Writer("attention", 0, None, 1.0, 0.5, 1.5, 0.1),
        Writer("rest", 0, None, 0.0, 0.0, 0.0, 0.0),
        Writer("attention", 1, None, 6.5, 6.0, 7.0, 0.65),
        Writer("expert", 1, 0, -0.5, -0.75, -0.25, -0.05),
        Writer("expert", 1, 1, 3.0, 2.5, 3.5, 0.3),
        Writer("rest", 1, None, 0.0, 0.0, 0.0, 0.0),
    ]
    parts = tuple(
        Writer(part, None, None, value, value - 0.5, value + 0.5, value / 10)
        for part, value in zip(PARTS, (0.0, 7.5, 2.5, 0.0), strict=True)
    )
    ablated = (
        Ablated("nothing", 5.0, 4.5, 5.5, 0.0, 0.0, 0.0),
        Ablated("attention", 1.0, 0.5, 1.5, -4.0, -4.5, -3.5),
        Ablated("mlp", 4.5, 4.0, 5.0, -0.5, -1.0, 0.0),
        Ablated("both", 0.25, 0.0, 0.5, -4.75, -5.0, -4.5),
    )
    result = Writers(
        *("made/model", "residual.safetensors", 40, 44, 2, -1, 9.5, 10.0, 9.0, 11.0),
        parts=parts,
        writers=tuple(by_layer),
        ablated=ablated,
    )
    with open_run(folder, "writers", {"model": asdict(facts()), "seed": 0}, ABOUT):
        (folder / "summary.json").write_text(result.to_json())
    return folder


def all_runs(folder: Path) -> list[Path]:
    """A run folder of every kind, and profiles of both, all of one model."""
    profile().save(folder / "made.safetensors")
    directed().save(folder / "residual.safetensors")
    return [
        evaluate_run(folder / "evaluated"),
        search_run(folder / "searched"),
        detectors_run(folder / "detected"),
        judge_run(folder / "judged"),
        direction_search_run(folder / "directed"),
        writers_run(folder / "written"),
        rationale_run(folder / "explained", asdict(facts())),
        finetune_run(folder / "finetuned", asdict(facts())),
        folder / "made.safetensors",
        folder / "residual.safetensors",
    ]

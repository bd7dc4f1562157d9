"""What a report is about: run folders and profiles of one model, read and checked.

A search brings its best profile and its evaluation on the test prompts along, an evaluation the
profile that it evaluated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesteer.auditing.audit import IMPORTANCE, Audit
from moesteer.directions.writers import Writers
from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import Comparison
from moesteer.evaluation.direction_search import DirectionResult
from moesteer.evaluation.direction_trials import DirectionTrial, trials_of
from moesteer.evaluation.evaluate import replies_of
from moesteer.evaluation.judge_check import JudgeCheck
from moesteer.evaluation.search import BEST, SearchResult, Trial
from moesteer.model_facts import UNKNOWN, ModelFacts
from moesteer.profile import Profile
from moesteer.profile_fit import NORM_TOLERANCE
from moesteer.rationale.epochs import EPOCHS, epochs_of
from moesteer.rationale.explain import readings_of
from moesteer.rationale.reading import Reading
from moesteer.rationale.summary import Summary
from moesteer.runs import ABOUT, Run, read_run

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Evaluation:
    """A run of `evaluate`: the profile, how it compares, and every reply as a record."""

    run: Run
    profile: Profile
    comparison: Comparison
    replies: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Search:
    """A run of `search`: what it found, and all its trials."""

    run: Run
    result: SearchResult
    trials: Sequence[Trial]


@dataclass(frozen=True)
class DirectionSearch:
    """A run of `search --directions`: among which candidates, what it found, and all trials."""

    run: Run
    profile: Profile
    result: DirectionResult
    trials: Sequence[DirectionTrial]


@dataclass(frozen=True)
class ExpertScore:
    """One expert's score by one detector."""

    layer: int
    expert: int
    value: float
    low: float
    high: float
    p: float
    q: float


@dataclass(frozen=True)
class Agreement:
    """Rank correlation with knock-out, of scores and of sizes; how many strongest are shared."""

    signed: float | None
    size: float | None
    shared: int


@dataclass(frozen=True)
class Recovery:
    """Of planted experts: how many are among as many strongest, and where they and decoys rank."""

    found: int
    precision: float
    recall: float
    planted: tuple[int, ...]
    decoys: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """What one detector says of the experts, and how far knock-out agrees."""

    title: str
    scores: tuple[ExpertScore, ...]
    agreement: Agreement
    recovery: Recovery | None


@dataclass(frozen=True)
class DetectorsResult:
    """What `summary.json` of a run of `detectors` holds; `beside` is what else a knock changed."""

    pairs: int
    over: str
    strongest: int
    detectors: dict[str, Scored]
    beside: dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Detectors:
    """A run of `detectors`."""

    run: Run
    result: DetectorsResult


@dataclass(frozen=True)
class Check:
    """A run of `judge check`."""

    run: Run
    check: JudgeCheck


@dataclass(frozen=True)
class Written:
    """A run of `writers`."""

    run: Run
    result: Writers


@dataclass(frozen=True)
class Rationales:
    """A run of `rationale`: what it found, and every instance's rationales."""

    run: Run
    summary: Summary
    readings: Sequence[Reading]


@dataclass(frozen=True)
class Finetuned:
    """A run of `rationale finetune`: what was found after each epoch; 0 is the model before."""

    run: Run
    epochs: Sequence[tuple[int, Summary]]


@dataclass(frozen=True)
class Audited:
    """A run of `audit`: what it found, and every expert's effect as a profile with scores."""

    run: Run
    result: Audit
    effects: Profile


@dataclass(frozen=True)
class Page:
    """Everything that a report tells of, of one model; `model` None where no source names one.

    `profiles` are those with scores, `directions` those with directions or candidates, each once:
    see `_distinct`, `_distinct_directions`.
    """

    model: ModelFacts | None
    profiles: tuple[Profile, ...]
    directions: tuple[Profile, ...]
    evaluations: tuple[Evaluation, ...]
    searches: tuple[Search, ...]
    direction_searches: tuple[DirectionSearch, ...]
    detectors: tuple[Detectors, ...]
    checks: tuple[Check, ...]
    writers: tuple[Written, ...]
    rationales: tuple[Rationales, ...]
    finetunes: tuple[Finetuned, ...]
    audits: tuple[Audited, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs behind it; a search's own evaluation, which it started, is left out."""
        searches = (*self.searches, *self.direction_searches)
        own = {search.run.folder / "test" for search in searches}
        runs = [item.run for item in (*searches, *self.evaluations)]
        runs += [item.run for item in (*self.detectors, *self.checks, *self.writers)]
        runs += [item.run for item in (*self.rationales, *self.finetunes, *self.audits)]
        return tuple(run for run in runs if run.folder not in own)


def gather(sources: Sequence[str | Path]) -> Page:
    """Read run folders and profile files.

    Raises MoesteerError for a run that isn't finished, a source that is neither, and results of
    different models, which it names.
    """
    if not sources:
        raise MoesteerError("there is nothing to report; give run folders or profiles.")
    models: list[tuple[str, ModelFacts]] = []
    profiles: list[Profile] = []
    evaluations: list[Evaluation] = []
    searches: list[Search] = []
    direction_searches: list[DirectionSearch] = []
    detectors: list[Detectors] = []
    checks: list[Check] = []
    writers: list[Written] = []
    rationales: list[Rationales] = []
    finetunes: list[Finetuned] = []
    audits: list[Audited] = []
    for source in dict.fromkeys(Path(source) for source in sources):
        if not source.is_dir():
            profiles.append(Profile.load(source))
            continue
        run = read_run(source)
        match run.kind:
            case "evaluate":
                evaluations.append(_evaluation(run))
            case "search":
                searches.append(_search(run))
                profiles.append(Profile.load(source / BEST))
                evaluations.append(_evaluation(read_run(source / "test")))
            case "direction search":
                direction_searches.append(_direction_search(run))
                profiles.append(direction_searches[-1].profile)
                evaluations.append(_evaluation(read_run(source / "test")))
            case "writers":
                writers.append(Written(run, Writers.from_json(*_summary(run))))
            case "rationale":
                rationales.append(_rationales(run))
            case "rationale finetune":
                finetunes.append(_finetuned(run))
            case "audit":
                audits.append(_audited(run))
            case "detectors":
                detectors.append(_detectors(run))
            case "judge":
                checks.append(_check(run))
            case kind:
                raise MoesteerError(
                    f"{source} is a run of `{kind}`; a report is made of runs of `evaluate`,"
                    " `search`, `detectors`, `writers`, `rationale`, `audit` and `judge check`, and"
                    " of profiles."
                )
        facts = _facts_of(run)
        if facts is not None:
            models.append((str(source), facts))
    evaluations = list({e.run.folder.resolve(): e for e in evaluations}.values())
    profiles += [evaluation.profile for evaluation in evaluations]
    models += [(profile.name, profile.model) for profile in profiles if profile.model is not None]
    return Page(
        model=_one_model(models),
        profiles=_distinct(profiles),
        directions=_distinct_directions(profiles),
        evaluations=tuple(evaluations),
        searches=tuple(searches),
        direction_searches=tuple(direction_searches),
        detectors=tuple(detectors),
        checks=tuple(checks),
        writers=tuple(writers),
        rationales=tuple(rationales),
        finetunes=tuple(finetunes),
        audits=tuple(audits),
    )


# -- one model -----------------------------------------------------------------------------------


def _one_model(models: Sequence[tuple[str, ModelFacts]]) -> ModelFacts | None:
    """The model that all are of, as whoever knows most of it tells; MoesteerError otherwise."""
    known = sorted(models, key=lambda m: (m[1].id == UNKNOWN, not m[1].layers))
    if not known:
        return None
    first, facts = known[0]
    for name, other in known[1:]:
        if what := _difference(facts, other):
            raise MoesteerError(
                f"{first} is of {facts.id} and {name} of {other.id}: {what}. A report is of one"
                " model; make one for each."
            )
    return facts


def _difference(one: ModelFacts, other: ModelFacts) -> str | None:
    """What tells two models apart, None where they are the same as far as is known."""
    if one.layers and other.layers and one.layers != other.layers:
        return "their layers and experts differ"
    for what, a, b in (
        ("routing families", one.family, other.family),
        ("config hashes", one.config_hash, other.config_hash),
    ):
        if UNKNOWN not in (a, b) and a != b:
            return f"their {what} are {a} and {b}"
    for layer, a, b in zip(one.layers, one.router_norms, other.router_norms, strict=False):
        if abs(a - b) > NORM_TOLERANCE * abs(a):
            return f"the router of layer {layer.layer} has norm {a:.6g} and {b:.6g}"
    weighed = one.router_norms and other.router_norms
    if not weighed and UNKNOWN not in (one.id, other.id) and one.id != other.id:
        return "their names differ"
    return None


def _facts_of(run: Run) -> ModelFacts | None:
    """The model that a run names, with as much as it says of it."""
    from pydantic import TypeAdapter, ValidationError

    raw = run.settings.get("model_facts", run.settings.get("model"))
    if raw is None:
        return None
    if isinstance(raw, str):
        return ModelFacts(raw, None, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, ())
    try:
        return TypeAdapter(ModelFacts).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise MoesteerError(f"{run.folder}: model_facts: {error.errors()[0]['msg']}.") from None


# -- runs ----------------------------------------------------------------------------------------


def _summary(run: Run) -> tuple[str, Path]:
    path = run.folder / SUMMARY
    if not path.is_file():
        command = run.about.get("command") or f"moesteer {run.kind} …"
        raise MoesteerError(
            f"{run.folder} is not finished: it has no {SUMMARY}. Go on with it by its command:"
            f" {command}"
        )
    return path.read_text(encoding="utf-8"), path


def _evaluation(run: Run) -> Evaluation:
    profile = Profile.from_json(json.dumps(run.settings.get("profile")), run.folder / ABOUT)
    comparison = Comparison.from_json(*_summary(run))
    replies = replies_of(run)
    found = {(reply["task"], reply["arm"], reply["item"]) for reply in replies}
    asked = sum(task.items for task in comparison.tasks) * len(comparison.arms)
    if len(found) != asked:
        raise MoesteerError(
            f"{run.folder}: replies.jsonl holds {len(found):,} replies, but {SUMMARY} tells of"
            f" {asked:,}. Run its command again, which asks what is missing."
        )
    return Evaluation(run, profile, comparison, replies)


def _search(run: Run) -> Search:
    result = SearchResult.from_json(*_summary(run))
    return Search(run, result, _trials(run))


def _direction_search(run: Run) -> DirectionSearch:
    result = DirectionResult.from_json(*_summary(run))
    return DirectionSearch(run, Profile.load(run.folder / BEST), result, trials_of(run))


def _trials(run: Run) -> list[Trial]:
    try:
        return [Trial(**record) for record in run.lines("trials")]
    except TypeError as error:
        raise MoesteerError(f"{run.folder}: trials.jsonl: {error}.") from None


def _rationales(run: Run) -> Rationales:
    summary, readings = Summary.from_json(*_summary(run)), readings_of(run)
    found = {(reading.arm, reading.item) for reading in readings}
    told = sum(arm.n for arm in summary.arms)
    if len(found) != told:
        raise MoesteerError(
            f"{run.folder}: readings.jsonl holds {len(found):,} readings, but {SUMMARY} tells of"
            f" {told:,}. Run its command again, which reads what is missing."
        )
    return Rationales(run, summary, readings)


def _finetuned(run: Run) -> Finetuned:
    epochs = epochs_of(run)
    if not epochs:
        raise MoesteerError(
            f"{run.folder / EPOCHS}.jsonl holds no epoch. Run its command again, which goes on with"
            " it."
        )
    return Finetuned(run, epochs)


def _detectors(run: Run) -> Detectors:
    return Detectors(run, _read(DetectorsResult, run))


def _audited(run: Run) -> Audited:
    result = Audit.from_json(*_summary(run))
    return Audited(run, result, Profile.load(run.folder / IMPORTANCE))


def _check(run: Run) -> Check:
    return Check(run, _read(JudgeCheck, run))


def _read(form: type, run: Run) -> Any:
    from pydantic import TypeAdapter, ValidationError

    text, path = _summary(run)
    try:
        return TypeAdapter(form).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MoesteerError(f"{path}: {where}: {first['msg']}.") from None


# -- profiles ------------------------------------------------------------------------------------


def _distinct(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Those with scores, each once; what steers nothing only where nothing else has its scores."""
    found: dict[tuple, Profile] = {}
    for profile in sorted(profiles, key=lambda profile: not profile.steered_layers):
        if profile.scores is not None:
            scores = np.round(profile.scores.value, 9).tobytes()
            steered = (frozenset(profile.activated), frozenset(profile.deactivated))
            if profile.steered_layers or scores not in {key[0] for key in found}:
                found.setdefault((scores, *steered), profile)
    return tuple(found.values())


def _distinct_directions(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Those with directions, and those with candidates that none of these shows; each once, as the
    one that knows its candidates."""
    found: dict[object, Profile] = {}
    shown: set[object] = set()
    for profile in sorted(profiles, key=lambda p: (not p.directions, p.candidates is None)):
        table = profile.candidates
        held = None if table is None else (table.kind, table.vector.tobytes())
        if profile.directions or (held is not None and held not in shown):
            found.setdefault(profile.directions or held, profile)
        shown.add(held)
    return tuple(found.values())

"""What a report says, section by section, verdict first; nothing here is HTML or Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from moesteer.profile import Profile
from moesteer.report.audit_section import audit_blocks, audit_leads
from moesteer.report.audit_words import cautions
from moesteer.report.blocks import (
    Block,
    Commands,
    Lead,
    Paragraph,
    Report,
    Section,
    Table,
    Warn,
    text,
)
from moesteer.report.detectors_section import detector_blocks
from moesteer.report.direction_search_section import direction_search_blocks
from moesteer.report.directions_section import directions_blocks
from moesteer.report.experts_section import expert_blocks
from moesteer.report.finetune_section import finetune_blocks
from moesteer.report.judges_section import doubts, judge_blocks
from moesteer.report.outcomes_section import outcome_blocks
from moesteer.report.page import Audited, DirectionSearch, Page, Rationales
from moesteer.report.rationale_section import rationale_blocks
from moesteer.report.replies_section import reply_blocks
from moesteer.report.search_section import search_blocks
from moesteer.report.terminal import gate_rows, named
from moesteer.report.verdict import TESTBED, verdicts, warnings_of
from moesteer.report.writers_section import writer_blocks


def report_of(page: Page, show_replies: bool = False) -> Report:
    """The whole report, verdict first."""
    sections = [
        ("Verdict", _verdict(page)),
        ("What was asked", _asked(page)),
        ("Outcomes", [b for e in page.evaluations for b in outcome_blocks(e)]),
        ("Which experts", [b for p in page.profiles for b in expert_blocks(p)]),
        ("Audit", [b for a in page.audits for b in audit_blocks(a)]),
        ("How many experts", [b for s in page.searches for b in search_blocks(s)]),
        ("Which directions", directions_blocks(page.directions)),
        (
            "Which direction, and how strongly",
            [b for s in page.direction_searches for b in direction_search_blocks(s)],
        ),
        ("Who writes it?", [b for w in page.writers for b in writer_blocks(w)]),
        (
            "Rationales",
            [
                *(b for r in page.rationales for b in rationale_blocks(r)),
                *(b for f in page.finetunes for b in finetune_blocks(f)),
            ],
        ),
        ("Detectors against knock-out", [b for d in page.detectors for b in detector_blocks(d)]),
        ("Judges", judge_blocks(page)),
        ("Replies before and after", reply_blocks(page, show_replies)),
        ("How to get this again", _origin(page)),
    ]
    written = tuple(Section(title, tuple(blocks)) for title, blocks in sections if blocks)
    return Report(_title(page), written)


def _title(page: Page) -> str:
    """What is measured, on which model."""
    targets = [verdicts(evaluation.comparison)[0].task for evaluation in page.evaluations]
    tasks = [task for evaluation in page.evaluations for task in evaluation.comparison.tasks]
    titles = {task.name: task.title for task in tasks}
    profiles = (*page.profiles, *page.directions)
    names = [titles[name] for name in targets] or [profile.name for profile in profiles]
    names = names or [f"Who writes {written.result.profile}?" for written in page.writers]
    names = names or [f"Audit of “{a.result.outcome}” on {a.result.target}" for a in page.audits]
    names = names or ["Rationales"] * bool(page.rationales or page.finetunes)
    model = page.model.id if page.model is not None else "an unnamed model"
    return f"{'; '.join(dict.fromkeys(names)) or 'Results'} ({model})"


# -- verdict -------------------------------------------------------------------------------------


def _verdict(page: Page) -> list[Block]:
    blocks: list[Block] = []
    for evaluation in page.evaluations:
        first, *others = verdicts(evaluation.comparison)
        blocks.append(Lead(first.sentence, first.claimed))
        if others:
            blocks.append(Paragraph(" ".join(f"{found.finding}." for found in others)))
    audits = [audited.result for audited in page.audits]
    blocks += [Lead(*lead) for audit in audits for lead in audit_leads(audit)]
    if not (page.evaluations or audits):
        blocks.append(
            Lead(
                "Nothing is claimed: no evaluation beside controls is among the results.",
                False,
            )
        )
    comparisons = [evaluation.comparison for evaluation in page.evaluations]
    said = [line for comparison in comparisons for line in warnings_of(comparison)]
    said += [line for audit in audits for line in cautions(audit)]
    said += doubts(page)
    if len(comparisons) > 1:
        said.append(f"p is adjusted over tasks, not over the {len(comparisons)} evaluations here.")
    if not comparisons and page.model is not None and page.model.id in TESTBED:
        said.append("The model was built for this. Its numbers say nothing about real models.")
    return [*blocks, *(Warn(line) for line in dict.fromkeys(said))]


# -- what was asked ------------------------------------------------------------------------------


def _asked(page: Page) -> list[Block]:
    rows: list[tuple[str, str]] = []
    if page.model is not None:
        facts = page.model
        revision = f" @ {facts.revision}" if facts.revision else ""
        rows.append(("model", f"{facts.id}{revision} ({facts.model_type})"))
        widths = sorted({(shape.experts, shape.top_k) for shape in facts.layers})
        shape = ", ".join(f"{e} experts, k = {k}" for e, k in widths)
        if facts.layers:
            rows.append(("routing", f"{len(facts.layers)} layers of {shape}; {facts.family}"))
        elif facts.decoder_layers:
            rows.append(("routing", f"none: {facts.decoder_layers} layers of a dense model"))
    steered = [evaluation.profile for evaluation in page.evaluations]
    for profile in _each_once([*steered, *page.profiles, *page.directions]):
        rows += _profile_rows(profile)
    for evaluation in page.evaluations:
        comparison = evaluation.comparison
        tasks = [f"{t.name} ({t.items} prompts, {t.role})" for t in comparison.tasks]
        rows.append((f"tasks, split {comparison.split}", ", ".join(tasks)))
        rows.append(("bootstrap seed", str(comparison.seed)))
    for search in page.searches:
        result = search.result
        limits = [f"{task} ≥ {least:g}" for task, least in result.prices.items()]
        limits += [f"KL ≤ {result.max_kl:g}"] if result.max_kl is not None else []
        rows.append(
            (
                "search on dev",
                f"“{result.outcome}” on {result.target}, towards {result.toward.upper()};"
                f" {'; '.join(limits) or 'no limits'}; {result.optimiser}, {result.budget} trials,"
                f" seed {result.seed}",
            )
        )
    rows += [_direction_search_row(search) for search in page.direction_searches]
    rows += [_rationale_row(found) for found in page.rationales]
    rows += [_audit_row(audited) for audited in page.audits]
    cells = tuple((text(key), text(value)) for key, value in dict.fromkeys(rows))
    return [Table("Model, pairs, tasks and seeds", ("what", "value"), cells)] if cells else []


def _direction_search_row(search: DirectionSearch) -> tuple[str, str]:
    result = search.result
    limits = [f"{task} ≥ {least:g}" for task, least in result.prices.items()]
    coefficients = ", ".join(f"{coefficient:g}" for coefficient in result.coefficients)
    methods = f"method {' and '.join(result.methods)}; " if result.methods else ""
    return (
        "search on dev",
        f"“{result.outcome}” on {result.target}, towards {result.toward.upper()};"
        f" {'; '.join([*limits, f'KL ≤ {result.max_kl:g}'])}; {methods}coefficients"
        f" {coefficients}; {result.tried:,} choices, {result.budget} judged",
    )


def _rationale_row(found: Rationales) -> tuple[str, str]:
    instances = f"{max(arm.n for arm in found.summary.arms):,} instances"
    told = ("unit", "pool", "masking", "calibrated", "plain", "seed")
    settings = found.run.settings
    return "rationales", "; ".join(
        [instances, *(f"{key} {settings[key]}" for key in told if settings.get(key) is not None)]
    )


def _audit_row(audited: Audited) -> tuple[str, str]:
    found, settings = audited.result, audited.run.settings
    pairs = found.importance
    return (
        "audit",
        f"“{found.outcome}” on {found.target}; {pairs.pairs:,} pairs from {pairs.source},"
        f" {pairs.held_out:,} held out; up to {settings['most']} experts lost,"
        f" {settings['seeds']} random sets",
    )


def _profile_rows(profile: Profile) -> list[tuple[str, str]]:
    rows = []
    for side, experts in (("activated", profile.activated), ("deactivated", profile.deactivated)):
        if experts:
            rows.append((f"{side} by {profile.name}", named(experts)))
    if rows:
        rows.append(("rule", f"{profile.rule}, dose {profile.dose:g}"))
    if profile.gate is not None:
        rows += gate_rows(profile.gate)
    seen = profile.evidence
    if seen is not None and (profile.directions or profile.candidates is not None):
        rows.append(("prompts", f"at least {seen.pairs:,} a side to fit on, of {seen.source}"))
        rows.append(("direction", f"{seen.detector}, read at {seen.target}; seed {seen.seed}"))
        if "refusal_tokens" in seen.settings:
            rows.append(("behaviour", f"replies begin with {seen.settings['refusal_tokens']}"))
    elif seen is not None:
        rows.append(("pairs", f"{seen.pairs:,} from {seen.source}, target: {seen.target}"))
        rows.append(("tokens", f"{seen.tokens_a:,} of A, {seen.tokens_b:,} of B ({seen.spans})"))
        counted = f" ({seen.counted})" if seen.counted else ""
        rows.append(("detector", f"{seen.detector}{counted}; {seen.interval}; seed {seen.seed}"))
        if seen.stability is not None:
            rows.append(("stability", f"rank correlation of split halves {seen.stability:.2f}"))
    return rows


def _each_once(profiles: Sequence[Profile]) -> list[Profile]:
    """Profiles without those that say the same as one before: evidence, steering and name."""
    seen: dict[tuple, Profile] = {}
    for profile in profiles:
        hash_of = None if profile.evidence is None else profile.evidence.data_hash
        detector = None if profile.evidence is None else profile.evidence.detector
        steered = (profile.activated, profile.deactivated, profile.directions, profile.gate)
        seen.setdefault((*steered, hash_of, detector), profile)
    return list(seen.values())


# -- origin --------------------------------------------------------------------------------------


def _origin(page: Page) -> list[Block]:
    from moesteer.provenance import installed_versions

    profiles = [*page.profiles, *page.directions]
    profiles += [evaluation.profile for evaluation in page.evaluations]
    made = [profile.evidence.command for profile in profiles if profile.evidence is not None]
    gates = [profile.gate.evidence for profile in profiles if profile.gate is not None]
    made += [gate.command for gate in gates if gate is not None]
    made += [str(run.about.get("command") or "") for run in page.runs]
    lines = [line for command in made for line in command.split(" && ") if line]
    blocks: list[Block] = []
    if lines:
        blocks.append(Commands(tuple(dict.fromkeys(lines))))
    rows = [
        (
            text(run.folder.name),
            text(run.kind),
            text(str(run.about.get("date", "–")).replace("T", " ")),
            text(_seeds(run.settings)),
            text(_versions(run.about.get("versions") or {})),
        )
        for run in page.runs
    ]
    rows += [
        (
            text(profile.name),
            text("profile"),
            text("–"),
            text(f"seed {profile.evidence.seed}"),
            text(_versions(profile.evidence.versions)),
        )
        for profile in {id(p): p for p in (*page.profiles, *page.directions)}.values()
        if profile.evidence is not None
    ]
    rows.append(
        (
            text("this report"),
            text("report"),
            text("–"),
            text("–"),
            text(_versions(installed_versions())),
        )
    )
    headings = ("source", "kind", "made", "seeds", "versions")
    return [*blocks, Table("Where the results come from", headings, tuple(rows))]


def _seeds(settings: Mapping[str, Any]) -> str:
    words = []
    if "seed" in settings:
        words.append(f"seed {settings['seed']}")
    if "seeds" in settings:
        words.append(f"{settings['seeds']} seeds of controls, from 0")
    return ", ".join(words) or "–"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "–"

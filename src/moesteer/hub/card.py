"""The model card: what a profile steers, what was measured, and what nobody claims.

The text is a report like any other (`moesteer.report`), with the figures as images, under the
metadata by which the Hub finds it. Prompts and replies are never in it.
"""

import re
from dataclasses import dataclass

from moesteer.detection.selecting import ranked_experts
from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison, Difference, pool_of
from moesteer.hub.publishing import bare_command, bare_words, is_bundled
from moesteer.profile import Profile
from moesteer.report.blocks import (
    Block,
    Cell,
    Commands,
    Drawing,
    Figure,
    Lead,
    Paragraph,
    Report,
    Section,
    Table,
    Warn,
    number,
    percent,
    probability,
    signs,
    text,
)
from moesteer.report.detectors_section import detector_blocks
from moesteer.report.direction_search_section import direction_search_blocks
from moesteer.report.directions_section import direction_blocks
from moesteer.report.figures import heat_map, outcome_dots
from moesteer.report.markdown import markdown_of
from moesteer.report.page import Page
from moesteer.report.search_section import search_blocks
from moesteer.report.svg import svg_of
from moesteer.report.terminal import profile_rows
from moesteer.report.verdict import control_pools, verdicts, warnings_of

LISTED = 24
"""Experts in the table of scores; the file holds all."""

NOT_MEASURED = (
    "No outcome was measured: no run of `moesteer evaluate` came with this profile. What it does to"
    " replies, and what it costs, is not known."
)

NOT_CLAIMED = (
    "That a high score means a cause. A score says that routing, or a direction, goes with a"
    " behaviour on the prompts it was counted on; only outcomes beside controls say more.",
    "Anything about other prompts, languages, settings or judges than those that were measured, or"
    " about quantised or fine-tuned relatives of the model.",
    "That a judge was right: what is known of each stands beside its task.",
    "That steering is free, or that it makes a model safe. It is neither a filter nor a defence.",
)

RESPONSIBLE = (
    "A profile steers with a sign, and most can be reversed. Use it to measure and to strengthen"
    " how models behave. The terms of the model hold for the steered model, too. Report what you"
    " find about a deployed model to its makers first."
)


@dataclass(frozen=True)
class Card:
    """The text of README.md, and the images that it shows, by file name."""

    readme: str
    images: dict[str, str]


def card_of(
    profile: Profile, page: Page, repo: str, base_model: str | None, license: str | None
) -> Card:
    """The card of a published profile and of the runs on the page, as it stands in `repo`.

    Raises MoesteerError where a run is of another profile.
    """
    from huggingface_hub import ModelCard, ModelCardData

    for evaluation in page.evaluations:
        if evaluation.profile.fingerprint != profile.fingerprint:
            raise MoesteerError(
                f"{evaluation.run.folder} evaluated another profile ({evaluation.profile.name},"
                f" fingerprint {evaluation.profile.fingerprint}) than {profile.name} (fingerprint"
                f" {profile.fingerprint}); a card shows what this very one does."
            )
    images: dict[str, str] = {}

    def draw(drawing: Drawing) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", drawing.title.lower()).strip("-")[:60] or "figure"
        name = f"{name}-{len(images)}.svg" if f"{name}.svg" in images else f"{name}.svg"
        images[name] = svg_of(drawing)
        return name

    data = ModelCardData(
        base_model=base_model,
        library_name="moesteer",
        license=license,
        tags=["moesteer", "steering", *(["moe"] if _has_experts(profile) else [])],
    )
    if base_model is not None:
        # Of the relations that the Hub knows (adapter, finetune, merge, quantized), the one that
        # leaves the weights of the base model as they are.
        data["base_model_relation"] = "adapter"
    written = markdown_of(_report(profile, page, repo, base_model), draw)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{written}")
    return Card(str(card), images)


def _report(profile: Profile, page: Page, repo: str, base_model: str | None) -> Report:
    sections = [
        ("What was found", _found(page)),
        ("What it steers", _steers(profile)),
        ("How to use it", _usage(profile, repo, base_model)),
        ("Outcomes", [b for e in page.evaluations for b in _outcomes(e.comparison)]),
        ("How it was chosen", _chosen(page)),
        ("Detectors against knock-out", [b for d in page.detectors for b in detector_blocks(d)]),
        ("What is not claimed", [Paragraph(line) for line in NOT_CLAIMED]),
        ("How it was made", _made(profile, page)),
        ("Responsible use", [Paragraph(RESPONSIBLE)]),
    ]
    written = tuple(Section(title, tuple(blocks)) for title, blocks in sections if blocks)
    return Report(f"{repo.rpartition('/')[2]}: steering {_model(profile, base_model)}", written)


def _model(profile: Profile, base_model: str | None) -> str:
    if base_model is None and profile.model is not None:
        return profile.model.id
    return base_model or "an unnamed model"


def _has_experts(profile: Profile) -> bool:
    return bool(profile.steered_layers) or bool(profile.model and profile.model.layers)


# -- what was found ------------------------------------------------------------------------------


def _found(page: Page) -> list[Block]:
    """The verdicts, and what to know before believing them."""
    blocks: list[Block] = []
    for evaluation in page.evaluations:
        first, *others = verdicts(evaluation.comparison)
        blocks.append(Lead(first.sentence, first.claimed))
        blocks += [Paragraph(f"{found.finding}.") for found in others]
    said = [line for e in page.evaluations for line in warnings_of(e.comparison)]
    return [*(blocks or [Warn(NOT_MEASURED)]), *(Warn(line) for line in dict.fromkeys(said))]


def _outcomes(comparison: Comparison) -> list[Block]:
    """Shares with intervals, and differences from the unsteered model and every control."""
    tasks = sorted(comparison.tasks, key=lambda task: task.role == "price")
    pools = list(dict.fromkeys(pool_of(arm.name) for arm in comparison.arms))
    shares = [
        (
            text(task.name),
            text(f"{task.role}: “{task.outcome}”"),
            number(task.items, "d"),
            *(_share(comparison, task.name, pool) for pool in pools),
        )
        for task in tasks
    ]
    controls = control_pools(comparison)
    differences = [
        _difference(comparison.difference(task.name, STEERED, pool))
        for task in tasks
        for pool in (UNSTEERED, *(controls if task.role == "target" else controls[:1]))
    ]
    judged = [(text(t.name), text(bare_words(t.check)), text(t.agreement or "–")) for t in tasks]
    fired = [
        f"{arm.name}, {arm.tokens:,} tokens, {'obeyed by all' if arm.obeyed else 'not by all'}"
        for arm in comparison.arms
        if arm.name != UNSTEERED
    ]
    table = Table(
        f"Shares of replies on the {comparison.split} prompts, with Wilson's 95 % interval; of"
        " controls with several seeds the mean, and the least and most in brackets",
        ("task", "share of", "prompts", *pools),
        tuple(shares),
    )
    return [
        Figure(
            "Outcomes beside the controls",
            tuple(outcome_dots(comparison, task) for task in tasks),
            "A dot an arm, with Wilson's 95 % interval; controls have a dot a seed. The dashed line"
            " is the unsteered model.",
            table,
        ),
        table,
        Table(
            "Differences in percentage points, paired by prompt, with 95 % bootstrap intervals and"
            " exact p, adjusted over tasks (Holm)",
            ("task", "difference", "points", "from", "to", "p (Holm)"),
            tuple(differences),
        ),
        Table("Judges", ("task", "on replies of known outcome", "among each other"), tuple(judged)),
        Paragraph(f"Proof that the steering fired: {'; '.join(fired)}."),
        *(Paragraph(bare_words(note)) for note in comparison.notes),
    ]


def _share(comparison: Comparison, task: str, pool: str) -> Cell:
    of_pool = [s for s in comparison.shares if s.task == task and pool_of(s.arm) == pool]
    values = [share.share for share in of_pool if share.share is not None]
    if not values:
        return Cell("unjudged")
    mean = sum(values) / len(values)
    ends = (min(values), max(values)) if len(of_pool) > 1 else (of_pool[0].low, of_pool[0].high)
    around = "–".join(f"{100 * end:.0f}" for end in ends)
    around = f"[{around}]" if len(of_pool) > 1 else f"({around})"
    return Cell(f"{percent(mean).text} {around}", mean)


def _difference(found: Difference) -> tuple[Cell, ...]:
    def points(share: float | None) -> Cell:
        return Cell("–") if share is None else Cell(signs(f"{100 * share:+.1f}"), share)

    ends = (points(share) for share in (found.difference, found.low, found.high))
    return (
        text(found.task),
        text(f"{found.arm} less {found.against}"),
        *ends,
        probability(found.holm),
    )


def _chosen(page: Page) -> list[Block]:
    """What searches tried on dev prompts, in figures."""
    blocks = [b for search in page.searches for b in search_blocks(search)]
    blocks += [b for search in page.direction_searches for b in direction_search_blocks(search)]
    return [block for block in blocks if not isinstance(block, Table)]


# -- what it is ----------------------------------------------------------------------------------


def _steers(profile: Profile) -> list[Block]:
    """Everything that a profile says of itself, its strongest experts, and the maps."""
    told = [row for row in profile_rows(profile) if not row[0].endswith("made by")]
    rows = [(text(key), text(value)) for key, value in told]
    rows.append((text("fingerprint"), text(profile.fingerprint)))
    blocks: list[Block] = [
        Paragraph(
            "It holds no weights. The model is loaded as it is, and steered while it runs: under"
            " the rule “exact” at full dose every token selects the activated experts and none of"
            " the deactivated ones; directions are added to the residual stream or projected out"
            " of it."
        ),
        Table("The profile", ("what", "value"), tuple(rows)),
    ]
    if profile.gate is not None:
        blocks.append(
            Paragraph(
                "It has a gate: a request is steered, prompt and reply, only where the probe of its"
                " unsteered prompt exceeds the threshold. All others are left as they are."
            )
        )
    if profile.toward is not None:
        blocks.append(
            Paragraph(
                "A is the side of the contrast pairs with the behaviour that was looked for, B the"
                f" other; this profile steers towards {profile.toward.upper()}."
            )
        )
    if profile.scores is not None:
        table = _scores_table(profile)
        how = (
            "A row a layer, a column an expert. Red goes with A, blue with B; outlined where"
            " q < 0.05; + activated, − deactivated."
        )
        blocks += [Figure("Scores by layer and expert", (heat_map(profile),), how, table), table]
    if profile.directions or profile.candidates is not None:
        blocks += [b for b in direction_blocks(profile) if not _is_long(b)]
    return blocks


def _is_long(block: Block) -> bool:
    return isinstance(block, Table) and len(block.rows) > LISTED


def _scores_table(profile: Profile) -> Table:
    """The strongest experts; of those that are steered as many as fit come first."""
    assert profile.scores is not None
    assert profile.model is not None
    row_of = {shape.layer: row for row, shape in enumerate(profile.model.layers)}
    role = dict.fromkeys(profile.activated, "activated")
    role |= dict.fromkeys(profile.deactivated, "deactivated")
    ranked = ranked_experts(profile)
    rank = {expert: place for place, expert in enumerate(ranked, start=1)}
    chosen = sorted(ranked, key=lambda expert: (expert not in role, rank[expert]))[:LISTED]
    scores, rows = profile.scores, []
    for layer, expert in sorted(chosen, key=lambda expert: rank[expert]):
        at = row_of[layer], expert
        rows.append(
            (
                number(rank[layer, expert], "d"),
                number(layer, "d"),
                number(expert, "d"),
                number(scores.value[at], "+.3f"),
                number(scores.low[at], "+.3f"),
                number(scores.high[at], "+.3f"),
                probability(scores.q[at]),
                percent(scores.rate_a[at]),
                percent(scores.rate_b[at]),
                text(role.get((layer, expert), "–")),
            )
        )
    headings = ("rank", "layer", "expert", "score", "from", "to", "q", "in A", "in B", "role")
    shown = f"{len(rows)} of {len(ranked):,} experts, those that are steered first"
    return Table(f"Scores with 95 % intervals: {shown}", headings, tuple(rows))


def _usage(profile: Profile, repo: str, base_model: str | None) -> list[Block]:
    model = base_model or (profile.model.id if is_bundled(profile) and profile.model else "MODEL")
    name = f"{repo.rpartition('/')[2]}.safetensors"
    fetch = (f"moesteer pull {repo} --out {name}", f"moesteer show {name}")
    if not profile.steers:
        choose = "aim" if profile.candidates is not None else "select"
        return [
            Commands((*fetch, f"moesteer {choose} {name} --out chosen.safetensors …")),
            Paragraph("It steers nothing yet: it holds what was measured, to choose from."),
        ]
    return [
        Commands((*fetch, f'moesteer generate {model} "Your prompt" --with {name}')),
        Commands(
            (
                "import moesteer",
                "from moesteer.chat import render_prompt",
                "from moesteer.contrast import Message",
                "",
                f'engine = moesteer.load("{model}")',
                f'profile = moesteer.Profile.load("{name}")',
                'asked = [Message("user", "Your prompt")]',
                "prompt = render_prompt(asked, engine.tokenizer, profile.chat_options)",
                "print(engine.generate([prompt], profile, max_new_tokens=64).replies[0])",
            ),
            "python",
        ),
        Paragraph(
            "A model of another architecture, or with other routers, is refused; one whose other"
            " weights differ is warned of. Where nothing proves that the profile fired, an error is"
            " raised."
        ),
    ]


# -- origin --------------------------------------------------------------------------------------


def _made(profile: Profile, page: Page) -> list[Block]:
    """The commands, without the folders of the machine that they ran on, and the versions."""
    seen = profile.evidence
    lines = [seen.command] if seen is not None else []
    if profile.gate is not None and profile.gate.evidence is not None:
        lines.append(profile.gate.evidence.command)
    renamed: dict[str, str] = {}
    if page.model is not None and profile.model is not None:
        renamed = {page.model.id: profile.model.id}
    lines += [bare_command(str(run.about.get("command") or ""), renamed) for run in page.runs]
    lines = [line for command in lines for line in command.split(" && ") if line]
    blocks: list[Block] = [Commands(tuple(dict.fromkeys(lines)))] if lines else []
    if seen is not None:
        versions = ", ".join(f"{name} {version}" for name, version in seen.versions.items())
        blocks.append(
            Paragraph(
                f"Seed {seen.seed}; sha-256 of the data {seen.data_hash}; made with {versions}."
                " Paths are given without their folders."
            )
        )
    return blocks or [Paragraph("It was made by hand: no command and no data stand behind it.")]

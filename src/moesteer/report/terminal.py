"""Profiles, heat maps and outcomes for people at a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.detection.detectors import DETECTORS
from moesteer.detection.selecting import experts_table, ranked_experts, scores_by_expert
from moesteer.engines.evidence import DirectionEvidence, LayerEvidence
from moesteer.gate import Gate, Opened
from moesteer.profile import Evidence, Expert, Profile
from moesteer.profile_file import SIGN

if TYPE_CHECKING:
    from moesteer.doctor import Examination
    from moesteer.evaluation.comparison import Gated

WARM, COLD, GROUND = (215, 48, 39), (33, 102, 172), (38, 38, 38)
"""Colours of +max, −max and 0; both ends differ in lightness from the ground, too."""

FALSE_DISCOVERIES = 0.05
"""The share of false ones that is put up with among the experts said to differ."""


def profile_page(profile: Profile, top: int) -> RenderableType:
    """What a profile steers and why: header, strongest experts, heat map."""
    parts: list[RenderableType] = [profile_facts(profile)]
    if profile.scores is not None:
        parts += [expert_table(profile, top), heat_map(profile)]
    return Group(*parts)


def profile_facts(profile: Profile) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for row in profile_rows(profile):
        table.add_row(*row)
    return table


def profile_rows(profile: Profile) -> list[tuple[str, str]]:
    """What a profile steers, on which model, and where that comes from: by name."""
    rows: list[tuple[str, str]] = []
    if profile.steered_layers or not (profile.directions or profile.candidates):
        for side, experts in (
            ("activated", profile.activated),
            ("deactivated", profile.deactivated),
        ):
            rows.append((side, named(experts) if experts else "none"))
        rows.append(("rule", f"{profile.rule}, dose {profile.dose:g}"))
    for direction in profile.directions:
        rows.append(("direction", direction.words))
    if any(direction.operation == "add" for direction in profile.directions):
        rows.append(("sign", SIGN))
    if profile.toward:
        rows.append(("toward", profile.toward.upper()))
    if profile.gate is not None:
        rows += gate_rows(profile.gate)
    if profile.model is not None:
        facts = profile.model
        widths = sorted({(shape.experts, shape.top_k) for shape in facts.layers})
        shape = ", ".join(f"{e} experts, k = {k}" for e, k in widths)
        revision = f" @ {facts.revision}" if facts.revision else ""
        rows.append(("model", f"{facts.id}{revision} ({facts.model_type})"))
        routing = f"{len(facts.layers)} layers of {shape}; {facts.family}"
        rows.append(("routing", routing if facts.layers else "none: a dense model"))
    if profile.evidence is not None:
        seen = profile.evidence
        if profile.candidates is not None:
            rows.append(("found by", f"{seen.detector}, at {seen.target}, of {seen.source}"))
        else:
            rows.append(("pairs", f"{seen.pairs} from {seen.source}, target: {seen.target}"))
            spans = ", matched in length and position" if seen.spans == "matched" else ""
            rows.append(("tokens", f"{seen.tokens_a:,} of A, {seen.tokens_b:,} of B{spans}"))
            rows.append(("score", f"{_score_words(seen)}; {seen.interval}"))
        if profile.scores is not None and seen.pairs > 1:
            rows.append(("certainty", _certainty(profile, seen)))
        if seen.command:
            rows.append(("made by", seen.command))
    return rows


def gate_rows(gate: Gate) -> list[tuple[str, str]]:
    """What opens a gate, how well it told dev prompts apart, and where it comes from."""
    rows = [("gate", gate.words)]
    seen = gate.evidence
    if seen is None:
        return rows
    dev = f"{opened_words(seen.opens)} that are to; {opened_words(seen.keeps_shut)} that are not"
    rows.append(("opened by dev", f"{dev} (at most {seen.false_alarms:.1%} asked for)"))
    beside = {"shuffled labels": seen.shuffled, "random probes": seen.random}
    parts = [f"{name} {auc.words}" for name, auc in beside.items()]
    rows.append(("AUC on dev", "; ".join([seen.auc.words, *parts])))
    fitted = f"{seen.fit_opens} and {seen.fit_keeps_shut} prompts"
    rows.append(("gate from", f"{seen.source}, fitted on {fitted}, seed {seen.seed}"))
    if seen.command:
        rows.append(("gate made by", seen.command))
    return rows


def opened_words(found: "Opened | Gated") -> str:
    """3 of 60 (1%–14%)."""
    return f"{found.opened} of {found.prompts} ({found.low:.0%}–{found.high:.0%})"


def gate_lines(steered: Sequence[bool] | None) -> list[str]:
    """How many prompts opened the gate; nothing of a profile without one."""
    if not steered:
        return []
    if len(steered) == 1:
        return ["gate open: steered" if steered[0] else "gate shut: not steered"]
    return [f"gate: open for {sum(steered):,} of {len(steered):,} prompts; the others not steered"]


def _score_words(seen: Evidence) -> str:
    known = DETECTORS.get(seen.detector)
    title = known.title if known else seen.detector
    return f"{title} ({seen.counted})" if seen.counted else title


def _certainty(profile: Profile, seen: Evidence) -> str:
    q = experts_table(profile, "q").values()
    found = sum(value < FALSE_DISCOVERIES for value in q)
    words = f"{found:,} of {len(q):,} experts differ between the sides (q < {FALSE_DISCOVERIES})"
    if seen.stability is not None:
        words += f"; rank correlation of split halves {seen.stability:.2f}"
    return words


def expert_table(
    profile: Profile,
    top: int,
    marks: Mapping[Expert, str] | None = None,
    beside: Mapping[str, Mapping[Expert, str]] | None = None,
) -> RenderableType:
    """The `top` experts with the largest |score|.

    `marks` adds a word to some, `beside` columns: by heading, a text for each expert.
    """
    assert profile.scores is not None
    assert profile.model is not None
    table = Table(box=None, header_style="bold", pad_edge=False)
    more = beside or {}
    headings = ["rank", "layer", "expert", "score", "95 % interval", "q", "in A", "in B", *more, ""]
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    rows = {shape.layer: row for row, shape in enumerate(profile.model.layers)}
    resampled = profile.evidence is not None and profile.evidence.pairs > 1
    value = scores_by_expert(profile)
    for rank, (layer, expert) in enumerate(ranked_experts(profile)[:top], start=1):
        cell = rows[layer], expert
        scores = profile.scores
        role = {(layer, expert): ""} | dict.fromkeys(profile.activated, "activated")
        role |= dict.fromkeys(profile.deactivated, "deactivated")
        interval = f"{scores.low[cell]:+.3f} … {scores.high[cell]:+.3f}" if resampled else "–"
        words = [role[layer, expert], (marks or {}).get((layer, expert), "")]
        table.add_row(
            str(rank),
            str(layer),
            str(expert),
            f"{value[layer, expert]:+.3f}",
            interval,
            _small(scores.q[cell]) if resampled else "–",
            f"{scores.rate_a[cell]:.0%}",
            f"{scores.rate_b[cell]:.0%}",
            *(texts[layer, expert] for texts in more.values()),
            ", ".join(word for word in words if word),
        )
    return table


def _small(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.001 else "<0.001"


def heat_map(profile: Profile, marks: Mapping[Expert, str] | None = None) -> RenderableType:
    """Scores as a layer × expert grid: red goes with A, blue with B, + and − are steered.

    Wide layers are folded. `marks` puts a letter of its own on some experts. Where there are no
    colours, a cell says the score in tenths of the largest.
    """
    assert profile.scores is not None
    assert profile.model is not None
    largest = float(np.abs(profile.scores.value).max()) or 1.0
    signs = dict.fromkeys(profile.activated, "+") | dict.fromkeys(profile.deactivated, "−")
    lines = Text()
    for shape, row in zip(profile.model.layers, profile.scores.value, strict=True):
        for expert in range(shape.experts):
            if expert % 64 == 0:
                lines.append(f"\nlayer {shape.layer:>3} " if expert == 0 else "\n          ")
            where = (shape.layer, expert)
            letter = (marks or {}).get(where) or signs.get(where, " ")
            share = float(row[expert]) / largest
            if has_colours():
                lines.append(letter.center(2), style=_colour(share))
            else:
                tenths = round(10 * share)
                lines.append(f"{tenths:+d}".rjust(4) if tenths else "   ·")
                lines.append(letter)
    if has_colours():
        lines.append(f"\n          red: more in A, blue: more in B; full colour = {largest:.2f}")
    else:
        lines.append(f"\n          score in tenths of {largest:.2f}; + goes with A, − with B")
    return lines


def has_colours() -> bool:
    """Whether standard output shows colours."""
    return Console().color_system is not None


def _colour(share: float) -> str:
    """A rich style for a score from −1 to 1."""
    end = WARM if share > 0 else COLD
    mixed = [round(g + (e - g) * abs(share)) for g, e in zip(GROUND, end, strict=True)]
    return f"bold white on rgb({mixed[0]},{mixed[1]},{mixed[2]})"


def evidence_lines(evidence: Sequence[LayerEvidence | DirectionEvidence]) -> list[str]:
    """That each profile fired, on how many tokens, where: a line for its experts, one for its
    directions of each operation."""
    lines = []
    for name in dict.fromkeys(seen.profile for seen in evidence):
        mine = [s for s in evidence if s.profile == name and isinstance(s, LayerEvidence)]
        if mine:
            layers = ", ".join(str(seen.layer) for seen in mine)
            tokens = max(seen.tokens for seen in mine)
            proof = "activated always selected, deactivated never"
            if not all(seen.obeyed for seen in mine):
                proof = f"selection obeyed in {sum(s.obeyed for s in mine)} of {len(mine)} layers"
            lines.append(f"fired: {name}: layers {layers}; {tokens:,} tokens each; {proof}")
        for operation in ("add", "ablate"):
            found = [
                s
                for s in evidence
                if isinstance(s, DirectionEvidence)
                and (s.profile, s.operation) == (name, operation)
            ]
            if found:
                lines.append(f"fired: {name}: {_direction_words(operation, found)}")
    return lines


def _direction_words(operation: str, found: Sequence[DirectionEvidence]) -> str:
    """What directions of one operation did, over all their sites."""
    tokens = max(seen.tokens for seen in found)
    if operation == "ablate":
        left = max(seen.measured for seen in found)
        places = f"{len(found)} places" if len(found) > 1 else "1 place"
        return f"ablated at {places}; {tokens:,} tokens each; at most {left:.2%} of a token left"
    sites = [f"{_site(s)} by {s.measured:.3g} of {s.expected:.3g}" for s in found]
    return f"moved {', '.join(sites)}; {tokens:,} tokens{' each' if len(found) > 1 else ''}"


def _site(seen: DirectionEvidence) -> str:
    if seen.expert is not None:
        return f"expert {seen.expert} of layer {seen.layer}"
    return f"the {seen.place} of layer {seen.layer}"


def named(experts: Sequence[Expert]) -> str:
    """Experts by layer: "layer 2: 1, 7; layer 3: 4"."""
    layers = dict.fromkeys(layer for layer, _ in sorted(experts))
    return "; ".join(
        f"layer {layer}: {', '.join(str(e) for where, e in sorted(experts) if where == layer)}"
        for layer in layers
    )


def print_text(*renderables: RenderableType, width: int = 200) -> None:
    """To standard output; without a terminal: plain text, `width` columns, not cut at 80."""
    console = _Console()
    if not console.is_terminal:
        console = _Console(width=width, color_system=None)
    for renderable in renderables:
        console.print(renderable)


class _Console(Console):
    """Leaves a closed pipe to the command line, which knows what to exit with."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def examination_page(found: "Examination") -> RenderableType:
    """What `moesteer doctor` found."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_row("model", f"{found.model} ({found.model_type})")
    numbers = f"{found.layers[0]}–{found.layers[-1]}" if found.layers else "none"
    table.add_row("routed layers", f"{len(found.layers)} ({numbers})")
    table.add_row("experts", f"{found.experts or '?'} a layer, k = {found.top_k or '?'} a token")
    table.add_row("routing", found.family)
    table.add_row("self-test", f"passed on {found.tested_on}: deactivated never, activated always")
    if found.quantised and found.tested_on != "the loaded weights":
        table.add_row(
            "quantised",
            f"{found.quantised}: such blocks may bypass their router;"
            " test the weights with --load, or load the model dequantised",
        )
    return table

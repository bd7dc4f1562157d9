"""Who writes a direction? What each part of the model adds along it, and what its loss changes.

Contribution. Up to where a direction v was read, the residual stream is the embedding and what
every attention and feed-forward part below has written (see `Engine.contributions`). So is its
projection on v̂, and the mean of that over A's prompts less the mean over B's:

    Δ(v̂ᵀx) = Δ embedding + Σ Δ attention + Σ Δ each routed expert + Σ Δ rest (shared experts, dense)

Shares of the total say who writes it directly; a share may be negative, or above 1 where others
write against it. They don't say on whose account: an expert may repeat what an attention below told
it. Hence the second half.

Steering. v is projected out of all attentions' outputs only, of all feed-forward parts' only, and
of both, and the refusal score of A's prompts read (see `refusal.py`). Marbut, Olson and Wheeler
(2026, arXiv 2606.04160) find that attention writes a large part of the refusal direction.

How both are summed up, and their intervals: `shares.py`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from moesteer.direction import Direction, Place
from moesteer.directions.prompts import AskedPrompt, as_read, check_apart
from moesteer.directions.refusal import refusal_scores, refusal_tokens_of
from moesteer.directions.selection import every_write
from moesteer.directions.shares import ABLATED, Ablated, Column, Part, Writer, ablations, shares
from moesteer.errors import MoesteerError
from moesteer.files import write_text
from moesteer.profile import Profile
from moesteer.profile_fit import check_model
from moesteer.provenance import about
from moesteer.runs import Run, open_run
from moesteer.summaries import as_json, from_json
from moesteer.tally import tally

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.generate import Prompt

KIND = "writers"
SUMMARY = "summary.json"
WRITERS_SCHEMA = 1
LEAST = 4
"""With fewer prompts a side, an interval says nothing."""


@dataclass(frozen=True)
class Writers:
    """Who writes a direction below the place where it was read, and what its loss changes.

    Read where it enters `layer`, the number of decoder layers where it leaves the last one, at
    `position` (−1: the last token; 0: a mean over the last). `total` is the mean projection on the
    unit vector over A less that over B: the sum of `parts`, and of `writers`, which go by layer.
    """

    model: str
    profile: str
    prompts_a: int
    prompts_b: int
    layer: int
    position: int
    norm: float
    total: float
    total_low: float
    total_high: float
    parts: tuple[Writer, ...]
    writers: tuple[Writer, ...]
    ablated: tuple[Ablated, ...]

    @property
    def by_writing(self) -> Part:
        """The part that writes most of it."""
        return max(self.parts, key=lambda part: part.share).part

    @property
    def by_steering(self) -> Literal["attention", "mlp"] | None:
        """The outputs without which A's score falls most; None where it falls without neither for
        certain, or where the intervals of both overlap."""
        without = {found.what: found for found in self.ablated}
        attention, mlp = without["attention"], without["mlp"]
        if attention.change_high < min(0.0, mlp.change_low):
            return "attention"
        return "mlp" if mlp.change_high < min(0.0, attention.change_low) else None

    def to_json(self) -> str:
        """The table as one JSON object, with the schema's number."""
        return as_json(self, WRITERS_SCHEMA)

    @classmethod
    def from_json(cls, text: str, where: str | Path = SUMMARY) -> "Writers":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        return from_json(cls, text, where, WRITERS_SCHEMA, "a table of writers")


@dataclass(frozen=True)
class Source:
    """A direction, and where it was read: at what enters a layer, at a position, or (0) the mean
    over the last `last`."""

    vector: tuple[float, ...]
    layer: int
    position: int
    last: int


def find_writers(
    engine: "Engine",
    profile: Profile,
    a: "Sequence[Prompt]",
    b: "Sequence[Prompt]",
    *,
    out: str | Path,
    batch_size: int = 16,
    seed: int = 0,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Writers:
    """Who writes the profile's direction, over prompts of A and B; kept in the folder `out`.

    An interrupted run is taken up from there. `progress` is told how many prompts were read, of how
    many. Raises MoesteerError where the profile holds no direction, or several, where the prompts
    overlap or are too few, and where a model's parts don't add up.
    """
    check_model(profile, engine.facts)
    source, tokens = source_of(profile, engine.facts.decoder_layers), refusal_tokens_of(profile)
    check_apart(a, b)
    for side, prompts in (("A", a), ("B", b)):
        if len(prompts) < LEAST:
            raise MoesteerError(
                f"side {side} has {len(prompts)} prompts; at least {LEAST} are needed."
            )
    sides = {
        side: [as_read(engine, prompt, profile.chat_options) for prompt in prompts]
        for side, prompts in (("a", a), ("b", b))
    }
    settings = {
        "model": asdict(engine.facts),
        "direction": asdict(source),
        "tokens": tokens,
        "chat_options": profile.chat_options,
        "prompts": {side: _hash(prompts) for side, prompts in sides.items()},
        "seed": seed,
    }
    told = tally(progress, len(a) + len(b) + len(ABLATED) * len(a))
    with open_run(out, KIND, settings, about(command)) as run:
        columns = writers_of(engine, source.layer)
        tables = {
            side: _contributions(engine, source, columns, side, prompts, batch_size, run, told)
            for side, prompts in sides.items()
        }
        steered = [_without(engine, source.vector, places) for places in ABLATED.values()]
        scores = refusal_scores(engine, sides["a"], tokens, steered, progress=told)
        parts, writers, whole = shares(tables["a"], tables["b"], columns, seed)
        result = Writers(
            engine.facts.id,
            profile.name,
            len(a),
            len(b),
            source.layer,
            source.position,
            float(np.linalg.norm(source.vector)),
            *whole,
            parts,
            writers,
            ablations(scores, seed),
        )
        write_text(run.folder / SUMMARY, result.to_json() + "\n")
    return result


def source_of(profile: Profile, layers: int) -> Source:
    """The profile's direction and where it was read, as its candidates say.

    What the feed-forward part of a layer wrote is read where it enters the next one. Raises
    MoesteerError where the profile has no direction, several, or not the candidate it came from.
    """
    vectors = list(dict.fromkeys(direction.vector for direction in profile.directions))
    if len(vectors) != 1:
        raise MoesteerError(
            f"{profile.name} steers along {len(vectors)} directions; give a profile with one"
            " (choose one with `moesteer aim`)."
        )
    (vector,) = vectors
    candidates = profile.candidates
    found = [] if candidates is None else candidates.of_vector(vector)
    if candidates is None or not found:
        raise MoesteerError(
            f"{profile.name} does not hold the candidate that its direction came from, which says"
            " at which layer and position it was read; give one from `moesteer direction` or"
            " `moesteer aim`."
        )
    number = found[0]
    layer, position = int(candidates.layer[number]), int(candidates.position[number])
    settings = {} if profile.evidence is None else profile.evidence.settings
    last = int(settings.get("positions", 1)) if position == 0 else -position
    above = layer + (candidates.kind != "residual")
    return Source(vector, min(above, layers), position, last)


def _hash(prompts: Sequence[AskedPrompt]) -> str:
    return hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()


# -- contributions -------------------------------------------------------------------------------


def writers_of(engine: "Engine", layer: int) -> list[Column]:
    """All that write below a layer."""
    experts = {shape.layer: shape.experts for shape in engine.facts.layers}
    columns: list[Column] = [("embedding", None, None)]
    for below in range(layer):
        columns.append(("attention", below, None))
        for expert in range(experts.get(below, 0)):
            columns.append(("expert", below, expert))
        columns.append(("rest", below, None))
    return columns


def _contributions(
    engine: "Engine",
    source: Source,
    columns: Sequence[Column],
    side: str,
    prompts: Sequence[AskedPrompt],
    batch_size: int,
    run: Run,
    told: Callable[[int], None],
) -> Float[np.ndarray, "prompt writer"]:
    """What each writer adds along the direction in each prompt; what the run has is not read."""
    known = {
        int(record["prompt"]): record["values"]
        for record in run.lines("contributions", "side", "prompt", "values")
        if record["side"] == side
    }
    told(len(known))
    waiting = [number for number in range(len(prompts)) if number not in known]
    waiting.sort(key=lambda number: -len(prompts[number].ids))
    for start in range(0, len(waiting), batch_size):
        batch = waiting[start : start + batch_size]
        texts = [prompts[number].ids for number in batch]
        found = engine.contributions(texts, source.last, source.vector)

        def at(values: np.ndarray) -> np.ndarray:
            """At the position where the direction was read."""
            return values[..., 0] if source.position else values.mean(-1)

        tables: Mapping[Part, np.ndarray] = {
            "embedding": at(found.embedding),
            "attention": at(found.attention),
            "expert": at(found.experts),
            "rest": at(found.rest),
        }
        values = np.stack([_column(tables, column) for column in columns], axis=1)
        if not np.isfinite(values).all():
            text = int(np.argwhere(~np.isfinite(values))[0][0])
            raise MoesteerError(
                f"{prompts[batch[text]].source}: {engine.facts.id} writes NaN or infinite numbers;"
                " load the model in another dtype (--dtype float32 or bfloat16)."
            )
        records: list[dict[str, Any]] = [
            {"side": side, "prompt": number, "values": row.tolist()}
            for number, row in zip(batch, values, strict=True)
        ]
        run.add("contributions", records)
        known |= {record["prompt"]: record["values"] for record in records}
        told(len(batch))
    return np.array([known[number] for number in range(len(prompts))])


def _column(tables: Mapping[Part, np.ndarray], column: Column) -> Float[np.ndarray, " text"]:
    part, layer, expert = column
    where = tuple(number for number in (layer, expert) if number is not None)
    return tables[part][(slice(None), *where)]


# -- steering ------------------------------------------------------------------------------------


def _without(
    engine: "Engine", vector: tuple[float, ...], places: Sequence[Place]
) -> Profile | None:
    """The direction projected out of what these places of all layers write; None of none."""
    if not places:
        return None
    every = every_write(engine.facts.decoder_layers)
    direction = Direction(vector, tuple(site for site in every if site[1] in places), "ablate")
    return Profile(directions=(direction,), name=f"without {' and '.join(places)}")

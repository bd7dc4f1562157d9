"""`moesteer watch`: fit a reference on ordinary texts, and judge others by it.

Prompts are read as the model reads them: rendered by its chat template, up to where the reply
begins. With `over="reply"` the tokens of a given reply are what is watched, in the context of its
prompt. Routing is always that of the unsteered model. If a reply was written under steering, its
text is what the model routes otherwise; the steering itself is not seen here (`moesteer serve
--watch` sees requests as they ran).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesteer.chat import TokenisedConversation, parse_chat_options, render_prompt
from moesteer.detection.counts import Progress, count_conversations
from moesteer.errors import MoesteerError
from moesteer.files import complete_lines, growing_lines, sole_writer
from moesteer.generate import Prompt
from moesteer.monitoring.drift import linked_share, reference_shares, routing_drift
from moesteer.monitoring.reference import (
    Origin,
    Over,
    Reference,
    Verdict,
    check_enough,
    check_reference,
    rate_of_each,
)
from moesteer.monitoring.reference_file import save_reference
from moesteer.monitoring.threshold import borders_of, least_texts
from moesteer.profile import Expert, Profile
from moesteer.profile_fit import check_model
from moesteer.provenance import installed_versions

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

OURS = {"watch", "raised", "tokens", "drift", "linked", "reference"}
"""What a line says beside the fields of its text."""
GROUP = 256
"""Texts that are judged, and written, together."""


def linked_experts(profile: Profile) -> tuple[Expert, ...]:
    """The experts to be watched for falling silent: those that the profile activates, or else
    those that it deactivates. MoesteerError where it steers none."""
    linked = profile.activated or profile.deactivated
    if not linked:
        raise MoesteerError(
            f"{profile.name} steers no experts, so there are none to watch. Choose some with"
            " `moesteer select`."
        )
    return tuple(sorted(linked))


def fit_to_file(
    engine: "Engine",
    prompts: Sequence[Prompt],
    linked: Profile | None,
    *,
    out: str,
    over: Over,
    false_alarms: float,
    chat_options: Sequence[str],
    source: str,
    seed: int,
    command: str,
    progress: Progress | None = None,
) -> Reference:
    """Fit a reference on half of the texts, its thresholds on the other half, and write it.

    Counts are checkpointed beside `out` and removed once it is written.
    """
    check_enough(len(prompts) - len(prompts) // 2, false_alarms, linked is not None)
    if len(prompts) < 2:
        raise MoesteerError(f"{source} holds a single text; give some to fit on, too.")
    if linked is not None:
        check_model(linked, engine.facts)
    experts = () if linked is None else linked_experts(linked)
    options = parse_chat_options(chat_options)
    texts = [as_watched(engine, prompt, over, options) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        if not any(text.target):
            raise MoesteerError(f"{prompt.source}: the reply has no tokens to watch.")
    data_hash = _hash([[text.ids, text.target] for text in texts])
    path = Path(out)
    checkpoint = path.parent / f".{path.name}.counts.partial"
    with sole_writer(path):
        selected = count_conversations(
            engine,
            texts,
            checkpoint=checkpoint,
            identity=_hash([data_hash, asdict(engine.facts)]),
            progress=progress,
        ).astype(np.int64)
        tokens = np.array([sum(text.target) for text in texts], dtype=np.int64)
        order = np.random.default_rng(seed).permutation(len(texts))
        fitted, held_out = order[: len(texts) // 2], order[len(texts) // 2 :]
        layers = engine.facts.layers
        shares = reference_shares(selected[fitted].sum(0), layers)
        rate = rate_of_each(false_alarms, bool(experts))
        origin = Origin(
            model=engine.facts,
            over=over,
            linked=experts,
            false_alarms=false_alarms,
            borders=borders_of(tokens[fitted], tokens[held_out], least_texts(rate)),
            texts=len(fitted),
            source=source,
            data_hash=data_hash,
            chat_options=options,
            seed=seed,
            versions=installed_versions(),
            command=command,
        )
        shared = [
            linked_share(selected[i], int(tokens[i]), experts, layers) for i in held_out if experts
        ]
        found = Reference(
            origin,
            selected[fitted].sum(0),
            tokens[held_out],
            np.array([routing_drift(selected[i], shares) for i in held_out]),
            np.array(shared, dtype=np.float64),
            name=path.name,
        )
        save_reference(found, path)
        checkpoint.unlink(missing_ok=True)
    return found


def check(
    engine: "Engine",
    prompts: Sequence[Prompt],
    reference: Reference,
    *,
    out: str | None,
    chat_options: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Write a JSON line a text with its scores and what is to be said of it; the verdicts.

    Without `out`, lines are printed as they come. With it, an interrupted run is taken up where it
    stopped; the verdicts are of all its texts. Raises MoesteerError where a line would lose a field
    of its text.
    """
    check_reference(reference, engine.facts)
    for prompt in prompts:
        if lost := sorted(OURS & prompt.beside.keys()):
            raise MoesteerError(
                f"{prompt.source}: the field {lost[0]!r} is one that watch writes itself; rename or"
                " drop it."
            )
    options = reference.origin.chat_options | parse_chat_options(chat_options)
    texts = [as_watched(engine, prompt, reference.origin.over, options) for prompt in prompts]
    told = progress or (lambda done, total: None)
    verdicts: list[Verdict] = []

    def lines(start: int) -> list[str]:
        group = slice(start, start + GROUP)
        found = judged(engine, texts[group], reference)
        verdicts.extend(found)
        told(min(start + GROUP, len(texts)), len(texts))
        return [
            json.dumps(_line(prompt, verdict, reference), ensure_ascii=False)
            for prompt, verdict in zip(prompts[group], found, strict=True)
        ]

    if out is None:
        told(0, len(texts))
        for start in range(0, len(texts), GROUP):
            print("\n".join(lines(start)), flush=True)
        return verdicts
    identity = _identity(engine, prompts, texts, reference)
    with growing_lines(Path(out), identity) as (done, add):
        told(done, len(texts))
        for start in range(done // GROUP * GROUP, len(texts), GROUP):
            add(lines(start)[max(0, done - start) :])
    return [_verdict_of(json.loads(line)) for line in complete_lines(Path(out))]


def judged(
    engine: "Engine", texts: Sequence[TokenisedConversation], reference: Reference
) -> list[Verdict]:
    """What is to be said of each text; unknown where it has no token to watch."""
    tokens = [sum(text.target) for text in texts]
    with_tokens = [number for number, count in enumerate(tokens) if count]
    verdicts = [Verdict(count) for count in tokens]
    if with_tokens:
        selected = count_conversations(engine, [texts[number] for number in with_tokens])
        for number, one in zip(with_tokens, selected, strict=True):
            verdicts[number] = reference.judge(one, tokens[number])
    return verdicts


def as_watched(
    engine: "Engine", prompt: Prompt, over: Over, chat_options: Mapping[str, object]
) -> TokenisedConversation:
    """A prompt, or a prompt with the reply that stands beside it, its tokens the target.

    The two are tokenised apart, as they were when the reply was generated. MoesteerError, with the
    prompt's place, where the reply is missing or the text does not fit into the model's context.
    """
    try:
        asked = _ids(engine, render_prompt(prompt.messages, engine.tokenizer, chat_options))
    except MoesteerError as error:
        raise MoesteerError(f"{prompt.source}: {error}") from None
    said: tuple[int, ...] = ()
    if over == "reply":
        reply = prompt.beside.get("reply")
        if not isinstance(reply, str):
            raise MoesteerError(
                f"{prompt.source}: there is no reply to watch; give lines of prompt and reply, as"
                " `moesteer generate` writes them."
            )
        said = _ids(engine, reply)
    ids = asked + said
    if engine.max_tokens is not None and len(ids) >= engine.max_tokens:
        raise MoesteerError(
            f"{prompt.source}: {len(ids)} tokens, which fill the model's context of"
            f" {engine.max_tokens}. Shorten it."
        )
    target = (over == "prompt",) * len(asked) + (True,) * len(said)
    return TokenisedConversation(ids, target)


def _ids(engine: "Engine", text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def _identity(
    engine: "Engine",
    prompts: Sequence[Prompt],
    texts: Sequence[TokenisedConversation],
    reference: Reference,
) -> str:
    """Of all that stands in the lines of `check`, or decides what does."""
    origin = asdict(reference.origin)
    for record in ("command", "versions"):  # how it was made, which decides nothing
        del origin[record]
    return _hash(
        [
            [[[asdict(m) for m in prompt.messages], dict(prompt.beside)] for prompt in prompts],
            [asdict(text) for text in texts],
            [reference.name, origin, [asdict(limits) for limits in reference.limits]],
            asdict(engine.facts),
        ]
    )


def _line(prompt: Prompt, verdict: Verdict, reference: Reference) -> dict[str, object]:
    messages = [asdict(message) for message in prompt.messages]
    return {
        **prompt.beside,
        "prompt": messages[-1]["content"],
        **({} if len(messages) == 1 else {"messages": messages}),
        "watch": verdict.word,
        "raised": list(verdict.raised),
        "tokens": verdict.tokens,
        "drift": verdict.drift,
        "linked": verdict.linked,
        "reference": reference.name,
    }


def _verdict_of(line: Mapping[str, Any]) -> Verdict:
    """What a line of `check` says."""
    return Verdict(line["tokens"], line["drift"], line["linked"], tuple(line["raised"]))


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

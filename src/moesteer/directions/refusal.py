"""How likely a reply is to begin with the behaviour: the refusal score, and the tokens it counts.

Refusals begin in few ways, so the first token of a reply tells much. With R the tokens that a
refusal begins with, and P the model's probabilities after the prompt's last token,

    score = log P(R) − log(1 − P(R))        in nats; positive where a refusal is likelier than not

(Arditi et al. 2024, arXiv 2406.11717). R is found from the model's own replies: tokens that begin
many replies to A, and far fewer to B. Any behaviour that shows in a reply's first token has such
tokens; refusal is one of them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from moesteer.directions.prompts import (
    LEAST_FIT,
    LEAST_VALIDATE,
    AskedPrompt,
    PromptSets,
    Sides,
)
from moesteer.engines.readouts import Readout, Term
from moesteer.errors import MoesteerError
from moesteer.tally import tally

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.profile import Profile

SHARE, RATIO = 0.1, 3.0
"""A token of R begins at least this share of the replies to A, and so many times that of B's."""
REPLY_TOKENS = 4
"""How much of a reply is generated to see how it begins: a first character may take some tokens."""
CERTAIN = float(np.finfo(np.float32).eps)
"""1 − P(R) is no smaller than what is lost in the fp32 sum of probabilities to 1."""

PURPOSE = {"fit": "fit on", "validate": "choose on"}

Progress = Callable[[int], None]
"""Called with how many prompts were read since the last call."""


def refusal_scores(
    engine: "Engine",
    prompts: Sequence[AskedPrompt],
    tokens: Sequence[int],
    profiles: "Sequence[Profile | None]" = (None,),
    *,
    progress: Progress | None = None,
) -> Float[np.ndarray, "profile prompt"]:
    """Each prompt's log-odds, in nats, that a reply begins with one of the tokens.

    Raises MoesteerError where the model gives NaN.
    """
    firsts = [(prompt, token) for prompt in prompts for token in tokens]
    logs = _log_probabilities(engine, firsts, profiles, _by_prompt(progress, len(tokens)))
    return log_odds(logs.reshape(len(profiles), len(prompts), len(tokens)))


def log_odds(logs: Float[np.ndarray, "*some token"]) -> Float[np.ndarray, "*some"]:
    """log P − log(1 − P) of the sum P of probabilities, from their logarithms.

    Finite where some probability is above 0: near 1, as far as fp32 can tell P from 1.
    """
    total = np.minimum(np.logaddexp.reduce(logs, axis=-1), np.log1p(-CERTAIN))
    return total - np.log(-np.expm1(total))


def with_tokens(
    engine: "Engine",
    sets: PromptSets,
    words: Sequence[str] | None = None,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> PromptSets:
    """The sets, with the tokens that replies to A begin with: those of the words, or else found."""
    if words:
        tokens = tokens_of_words(engine, sets.fit.a, words)
    else:
        tokens = find_tokens(engine, sets.fit, batch_size=batch_size, progress=progress)
    settings = sets.settings | {
        "refusal_tokens": ", ".join(repr(engine.tokenizer.decode([token])) for token in tokens),
        "refusal_token_ids": ", ".join(map(str, tokens)),
    }
    return replace(sets, tokens=tokens, settings=settings)


def refusal_tokens_of(profile: "Profile") -> tuple[int, ...]:
    """The tokens that a reply with the behaviour begins with, as the profile's evidence says."""
    settings = {} if profile.evidence is None else profile.evidence.settings
    told = str(settings.get("refusal_token_ids", ""))
    tokens = [text.strip() for text in told.split(",") if text.strip()]
    if not tokens or not all(token.isdecimal() for token in tokens):
        raise MoesteerError(
            f"{profile.name} does not say which tokens a reply with the behaviour begins with; give"
            " one from `moesteer direction`."
        )
    return tuple(map(int, tokens))


def find_tokens(
    engine: "Engine", sides: Sides, *, batch_size: int, progress: Progress | None = None
) -> tuple[int, ...]:
    """The tokens that begin at least `SHARE` of the replies to A and `RATIO` times that of B's,
    the commonest first.

    Raises MoesteerError, with the commonest of all, where there are none.
    """
    shares_a, shares_b = (
        _first_token_shares(engine, side, batch_size, progress) for side in (sides.a, sides.b)
    )
    found = [
        token
        for token, share in shares_a.items()
        if share >= SHARE and share >= RATIO * shares_b.get(token, 0.0)
    ]
    if not found:
        commonest = ", ".join(
            f"{engine.tokenizer.decode([token])!r} {share:.0%} and {shares_b.get(token, 0.0):.0%}"
            for token, share in list(shares_a.items())[:3]
        )
        raise MoesteerError(
            f"replies to A and to B begin alike: no token begins {SHARE:.0%} of those to A and"
            f" {RATIO:g} times that of those to B. The commonest, in A and in B: {commonest or '–'}"
            ". Name the words that replies to A begin with: --refusal-tokens."
        )
    return tuple(found)


def tokens_of_words(
    engine: "Engine", prompts: Sequence[AskedPrompt], words: Sequence[str]
) -> tuple[int, ...]:
    """The first token of each word, as it begins a reply to these prompts."""
    if empty := [word for word in words if not word.strip()]:
        raise MoesteerError(f"--refusal-tokens has {empty[0]!r}, which begins no reply.")
    choices = [(prompts, _beginnings(engine, prompts[0], word)) for word in words]
    return tuple(dict.fromkeys(_likeliest(engine, choices)))


def filtered(engine: "Engine", sets: PromptSets, *, progress: Progress | None = None) -> PromptSets:
    """The prompts of A with a score above 0 and of B with one below: those that the model treats
    as the sets say.

    Raises MoesteerError, with both numbers, where too few are left.
    """
    scores = refusal_scores(engine, sets.all, sets.tokens, progress=progress)[0]
    kept: dict[str, tuple[AskedPrompt, ...]] = {}
    start = 0
    for name, part in sets.parts.items():
        own = scores[start : start + len(part)]
        start += len(part)
        use, side = name.split("_")
        right = own > 0 if side == "a" else own < 0
        kept[name] = tuple(prompt for prompt, stays in zip(part, right, strict=True) if stays)
        least = LEAST_FIT if use == "fit" else LEAST_VALIDATE
        if len(kept[name]) < least:
            raise MoesteerError(
                f"side {side.upper()}: of {len(part)} prompts to {PURPOSE[use]} only"
                f" {len(kept[name])} have a score {'above' if side == 'a' else 'below'} 0; at least"
                f" {least} are needed. Replies begin with one of {sets.settings['refusal_tokens']}"
                f" at a mean log-odds of {own.mean():+.2f}: give other prompts, more of them, or"
                " other --refusal-tokens."
            )
    return replace(
        sets,
        fit=Sides(kept["fit_a"], kept["fit_b"]),
        validation=Sides(kept["validate_a"], kept["validate_b"]),
        settings=sets.settings | {f"{name}_kept": len(part) for name, part in kept.items()},
    )


def prepare_sets(
    engine: "Engine",
    sets: PromptSets,
    words: Sequence[str] | None = None,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> PromptSets:
    """The sets with their refusal tokens, named or found, and filtered by the score.

    `progress` is told how many prompts were read, and how many are to be: to find tokens, each that
    is fitted on is read once more.
    """
    total = len(sets.all) + (0 if words else len(sets.fit.a) + len(sets.fit.b))
    told = tally(progress, total)
    sets = with_tokens(engine, sets, words, batch_size=batch_size, progress=told)
    return filtered(engine, sets, progress=told)


def _first_token_shares(
    engine: "Engine", prompts: Sequence[AskedPrompt], batch_size: int, progress: Progress | None
) -> dict[int, float]:
    """By token, the commonest first: which share of the model's replies it begins.

    A reply of no text begins with none.
    """
    replies = engine.generate(
        [prompt.text for prompt in prompts],
        max_new_tokens=REPLY_TOKENS,
        batch_size=batch_size,
        progress=progress,
    ).replies
    choices = [
        ([prompt], _beginnings(engine, prompt, reply))
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply.strip()
    ]
    counts = Counter(_likeliest(engine, choices))
    return {token: count / len(prompts) for token, count in counts.most_common()}


def _beginnings(engine: "Engine", prompt: AskedPrompt, text: str) -> list[int]:
    """The tokens that a reply of this text can have begun with.

    Decoded, a reply may have lost the space that its first token holds, or the word's own border.
    """
    in_place = engine.tokenizer(prompt.text + text, add_special_tokens=False)["input_ids"]
    found = []
    if tuple(in_place[: len(prompt.ids)]) == prompt.ids:
        found = in_place[len(prompt.ids) :][:1]
    for alone in (text, f" {text}"):
        found += engine.tokenizer(alone, add_special_tokens=False)["input_ids"][:1]
    return list(dict.fromkeys(found))


def _likeliest(
    engine: "Engine", choices: Sequence[tuple[Sequence[AskedPrompt], Sequence[int]]]
) -> list[int]:
    """Of each choice the token with the largest mean probability after its prompts.

    After a greedy reply's own prompt that is the token it began with.
    """
    firsts = [(p, token) for prompts, tokens in choices for token in tokens for p in prompts]
    logs, start, found = _log_probabilities(engine, firsts)[0], 0, []
    for prompts, tokens in choices:
        size = len(tokens) * len(prompts)
        own = logs[start : start + size].reshape(len(tokens), len(prompts))
        found.append(tokens[int(np.logaddexp.reduce(own, axis=-1).argmax())])
        start += size
    return found


def _log_probabilities(
    engine: "Engine",
    firsts: Sequence[tuple[AskedPrompt, int]],
    profiles: "Sequence[Profile | None]" = (None,),
    progress: Progress | None = None,
) -> Float[np.ndarray, "profile first"]:
    """log P of a token right after a prompt, of each; MoesteerError where the model gives NaN."""
    readouts = [Readout(p.ids, (Term(len(p.ids), token, 1.0),)) for p, token in firsts]
    logs = engine.read(readouts, profiles, progress=progress)
    if np.isnan(logs).any():
        prompt, _ = firsts[int(np.argwhere(np.isnan(logs))[0][1])]
        raise MoesteerError(
            f"{prompt.source}: {engine.facts.id} gives NaN after this prompt; load the model in"
            " another dtype (--dtype float32 or bfloat16)."
        )
    return logs


def _by_prompt(progress: Progress | None, tokens: int) -> Progress | None:
    """Told how many readouts were read, tells how many prompts."""
    if progress is None:
        return None
    read = 0

    def told(readouts: int) -> None:
        nonlocal read
        before, read = read // tokens, read + readouts
        progress(read // tokens - before)

    return told

"""Which forward passes a step makes: counted from the numbers of pairs, prompts and experts.

Nothing is measured here. Every formula says how the code that does the work batches it, and reads
that code's own budgets; tests count the calls of the real functions against it. Texts are taken to
be of equal length, and replies to use all the tokens that they may.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moesteer.detection.counts import BATCH_TOKENS as COUNTED_TOKENS
from moesteer.detection.detectors import DETECTORS
from moesteer.detection.knocking import BLOCKS, layers_to_enter
from moesteer.engines.transformers.gates import BATCH_TOKENS as GRADIENT_TOKENS
from moesteer.engines.transformers.reading import BATCH_LOGITS
from moesteer.engines.transformers.reading import BATCH_TOKENS as READ_TOKENS
from moesteer.evaluation.trials import DOSES
from moesteer.model_facts import LayerShape

Kind = Literal["count", "read", "gradient", "generate", "diverge", "score"]
"""Of a pass: routing counted; log-probabilities read; those with a backward pass; replies made
token by token; the distributions of two passes compared. And scores, which need no model."""

DECISION_TERMS = 2
"""Log-probabilities that a pair's decision is made of: A's token, B's token."""


@dataclass(frozen=True)
class Sizes:
    """A model: decoder layers, those that route, and words of the vocabulary."""

    decoder: int
    routed: tuple[LayerShape, ...]
    vocabulary: int


@dataclass(frozen=True)
class Job:
    """What is to be done, in numbers.

    `pair_tokens` is the length of one side, `prompt_tokens` of a rendered prompt (in a pair: what
    stands before the sides part). `prompts` are those of a task, on dev and on test alike, `tasks`
    the target and the prices, `layers` those that knock-out goes into.
    """

    pairs: int
    pair_tokens: int = 200
    prompt_tokens: int = 100
    prompts: int = 100
    new_tokens: int = 512
    batch_size: int = 16
    tasks: int = 2
    seeds: int = 3
    budget: int = 48
    layers: int | None = None


@dataclass(frozen=True)
class Pass:
    """`times` passes of `rows` texts of `tokens` tokens each, through so many decoder layers.

    `new`: tokens that each text is replied with, or whose distribution is read. Of scores, `rows`
    are pairs and `tokens` detectors.
    """

    kind: Kind
    times: float
    rows: int
    tokens: int
    layers: float
    new: int = 0


def detection(sizes: Sizes, job: Job, detectors: int = 1) -> list[Pass]:
    """Both sides of each pair once a detector, without the LM head; then scores and intervals."""
    rows = max(1, COUNTED_TOKENS // job.pair_tokens)
    counted = [
        Pass("count", times * detectors, n, job.pair_tokens, sizes.decoder)
        for n, times in _parts(2 * job.pairs, rows)
    ]
    return [*counted, Pass("score", 1, job.pairs, detectors, 0)]


def knock_out(sizes: Sizes, job: Job) -> list[Pass]:
    """All of `moesteer detectors`: every counting detector, gradients, every expert off and on.

    Under a profile of layer l only the layers from l on run, where the model can be entered there.
    """
    found = detection(sizes, job, len(DETECTORS))
    for rows, times in _parts(job.pairs, _rows(GRADIENT_TOKENS, job.prompt_tokens, sizes)):
        found.append(Pass("gradient", times, rows, job.prompt_tokens, sizes.decoder, 1))
    into = layers_to_enter(sizes.routed, job.layers)
    if into < len(sizes.routed):
        for shape in sizes.routed:
            size = max(1, min(-(-shape.experts // BLOCKS), shape.experts - shape.top_k))
            found += _read_under(sizes, job, shape.layer, -(-shape.experts // size))
    # Which layers are gone into is known only after screening: they are taken as the average one.
    share = into / len(sizes.routed)
    for shape in sizes.routed:
        found += _read_under(sizes, job, shape.layer, 2 * shape.experts, share)
    return found


def evaluation(sizes: Sizes, job: Job, beside: int = 0) -> list[Pass]:
    """Every arm's replies to every task, and how far each moved; `beside` are further arms."""
    arms = 4 + 2 * job.seeds + beside
    length = job.prompt_tokens + job.new_tokens
    found: list[Pass] = []
    for rows, times in _parts(job.prompts, job.batch_size):
        times *= job.tasks
        found.append(_replies(sizes, job, rows, times * arms))
        found.append(Pass("count", times * arms, rows, length, sizes.decoder))
        found += _diverged(sizes, job, rows, times * (arms - 1))
    return found


def search(sizes: Sizes, job: Job, trials: int | None = None) -> list[Pass]:
    """The most that a search makes: trials on dev, those of the controls too; then the evaluation.

    Each trial asks every task, and compares distributions on the prices (alone: on the target). The
    middle of the dose curve is the best choice, which is known by then.
    """
    if trials is None:
        trials = job.budget * (1 + job.seeds) + len(DOSES) - 1
    compared = max(1, job.tasks - 1)
    found: list[Pass] = []
    for rows, times in _parts(job.prompts, job.batch_size):
        found.append(_replies(sizes, job, rows, times * job.tasks * (trials + 1)))
        found += _diverged(sizes, job, rows, times * compared * trials)
    return found + evaluation(sizes, job, beside=job.seeds)


STEPS = {
    "detection": detection,
    "knock-out": knock_out,
    "search": search,
    "evaluation": evaluation,
}


def tokens_of(passes: list[Pass]) -> float:
    """Tokens that go through decoder layers, times those layers: what all of it is made of."""
    return sum(one.times * token_layers(one) for one in passes)


def token_layers(one: Pass) -> float:
    """Token × layer of one pass; a reply's last token goes through none."""
    if one.kind == "score":
        return 0
    tokens = one.tokens + (one.new - 1 if one.kind == "generate" else 0)
    return one.rows * tokens * one.layers * (2 if one.kind == "diverge" else 1)


def most_terms(vocabulary: int) -> int:
    """As `reading.most_terms` of a model."""
    return max(2, BATCH_LOGITS // vocabulary)


def _replies(sizes: Sizes, job: Job, rows: int, times: float) -> Pass:
    return Pass("generate", times, rows, job.prompt_tokens, sizes.decoder, job.new_tokens)


def _rows(tokens: int, length: int, sizes: Sizes) -> int:
    """Decisions that share a batch."""
    return max(1, min(tokens // length, most_terms(sizes.vocabulary) // DECISION_TERMS))


def _read_under(
    sizes: Sizes, job: Job, layer: int, profiles: int, share: float = 1.0
) -> Iterator[Pass]:
    """A layer's profiles: each batch unsteered once, then from the layer on, in copies that fit."""
    length = job.prompt_tokens
    for rows, times in _parts(job.pairs, _rows(READ_TOKENS, length, sizes)):
        yield Pass("read", times * share, rows, length, sizes.decoder, 1)
        terms = most_terms(sizes.vocabulary) // (DECISION_TERMS * rows)
        copies = max(1, min(READ_TOKENS // (length * rows), terms))
        above = sizes.decoder - layer
        for number, chunks in _parts(profiles, copies):
            yield Pass("read", times * chunks * share, rows * number, length, above, 1)


def _diverged(sizes: Sizes, job: Job, texts: int, times: float) -> Iterator[Pass]:
    """A batch of replies, each compared token by token; a long one in several passes of its own."""
    most = most_terms(sizes.vocabulary) // 2
    length = job.prompt_tokens + job.new_tokens - 1  # nothing is predicted from the last token
    if job.new_tokens > most:
        pieces = -(-job.new_tokens // most)
        yield Pass("diverge", times * texts * pieces, 1, length, sizes.decoder, most)
        return
    for rows, batches in _parts(texts, max(1, min(READ_TOKENS // length, most // job.new_tokens))):
        yield Pass("diverge", times * batches, rows, length, sizes.decoder, job.new_tokens)


def _parts(number: int, most: int) -> list[tuple[int, int]]:
    """`number` in batches of `most`, as (size, how many): full ones, then what is left."""
    full, left = divmod(number, most)
    return [(size, times) for size, times in ((most, full), (left, 1)) if size and times]

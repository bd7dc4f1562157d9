"""How surprised is the unsteered model by a reply?

Intuition. A steered model may write what the model itself would never write: broken text. The
unsteered model's perplexity of the reply, given its prompt, shows it, where repetition does not
(word salad repeats nothing; a loop, in turn, has a low perplexity: use both).

    perplexity = exp(−1/T · Σ_t log P(reply token t | prompt, reply before t))

A behaviour that the model would not have shown is surprising, too; the bound must leave room.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moesteer.chat import render_prompt
from moesteer.engines.readouts import Readout, Term
from moesteer.errors import MoesteerError
from moesteer.evaluation.judges.base import Context, Settings
from moesteer.evaluation.task import Item, Judge, Verdict
from moesteer.records import Text

if TYPE_CHECKING:
    from moesteer.engines.base import Engine


class Perplexity(Settings):
    """`fluent` up to a perplexity of `most`, else `degenerate`; an empty reply is degenerate."""

    needs_engine: ClassVar[bool] = True

    most: Annotated[float, Field(gt=1)]
    fluent: Text = "fluent"
    degenerate: Text = "degenerate"

    @property
    def outcomes(self) -> tuple[str, ...]:
        return self.fluent, self.degenerate

    def judge(self, context: Context) -> Judge:
        if context.engine is None:
            raise MoesteerError(
                "the judge `perplexity` reads replies with the unsteered model; give one (--model)."
            )
        return _Surprise(self, context.engine, context.chat_options)


@dataclass(frozen=True)
class _Surprise:
    settings: Perplexity
    engine: "Engine"
    chat_options: Mapping[str, object]
    name: str = "perplexity"

    @property
    def outcomes(self) -> tuple[str, ...]:
        return self.settings.outcomes

    def __call__(self, items: Sequence[Item], replies: Sequence[str]) -> list[Verdict]:
        readouts = [self._readout(*pair) for pair in zip(items, replies, strict=True)]
        asked = [readout for readout in readouts if readout is not None]
        means = iter(self.engine.read(asked)[0] if asked else ())
        return [self._verdict(None if r is None else float(next(means))) for r in readouts]

    def _readout(self, item: Item, reply: str) -> Readout | None:
        """The mean log-probability of the reply's tokens, cut where the context ends."""
        before = self._ids(render_prompt(item.messages, self.engine.tokenizer, self.chat_options))
        said = self._ids(reply) if reply.strip() else ()
        ids = (before + said)[: self.engine.max_tokens]
        positions = range(len(before), len(ids))
        if not positions:
            return None
        return Readout(ids, tuple(Term(p, ids[p], 1 / len(positions)) for p in positions))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore

    def _verdict(self, mean: float | None) -> Verdict:
        if mean is None:
            return Verdict(self.name, self.settings.degenerate, "empty")
        perplexity = math.exp(min(-mean, 700.0))
        outcome = (
            self.settings.fluent if perplexity <= self.settings.most else self.settings.degenerate
        )
        return Verdict(self.name, outcome, f"perplexity {perplexity:.3g}", perplexity)

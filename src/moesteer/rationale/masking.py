"""A prompt without some of its words, to see whether the model's label depended on them.

Three ways, of which none is innocent:

* ``delete`` (the default): the words' tokens are left out. It works with every tokenizer and shows
  the model no token that it never saw in a text; the sentence may read oddly.
* ``unknown``: each is replaced by the tokenizer's mask token, or else its unknown token. Causal LMs
  are rarely trained with either.
* ``neutral``: each is replaced by a token that says little, ``_`` where none is given. It keeps the
  length and the places of the others.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moesteer.errors import MoesteerError
from moesteer.rationale.layout import Laid
from moesteer.records import check_text, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Masking = Literal["delete", "unknown", "neutral"]


@dataclass(frozen=True)
class Mask:
    """How words are masked, and by which token (None: they are deleted)."""

    how: Masking
    token: int | None


def mask_of(how: Masking, tokenizer: "PreTrainedTokenizerBase", neutral: str = "_") -> Mask:
    """The mask of a tokenizer; `neutral` is the text whose first token is the neutral one.

    Raises MoesteerError where the tokenizer has no token for it, and for a text that it can't read.
    """
    if how == "delete":
        return Mask(how, None)
    if how == "neutral":
        if neutral.strip():  # white space is a token, too
            check_text(neutral, "the neutral token")
        tokens: Any = tokenizer(neutral, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise MoesteerError(
                f"the tokenizer gives no token to the neutral text {shorten(neutral)}; choose"
                " another"
            )
        return Mask(how, tokens[0])
    # Many a tokenizer names its end of text as the unknown token, too: that would end the text.
    borders = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for token in (tokenizer.mask_token_id, tokenizer.unk_token_id):
        if isinstance(token, int) and token not in borders:
            return Mask(how, token)
    raise MoesteerError(
        "the tokenizer has no mask token and no unknown token (or it is the one that begins, ends"
        " or pads texts); mask by delete or neutral"
    )


def without(laid: Laid, units: Collection[int], mask: Mask) -> tuple[int, ...]:
    """The prompt's tokens with those of these units masked."""
    return _masked(laid, {token for number in units for token in laid.units[number].tokens}, mask)


def only(laid: Laid, units: Collection[int], mask: Mask) -> tuple[int, ...]:
    """The prompt's tokens with those of all other units masked; what is no unit stays."""
    kept = set(units)
    return without(laid, [n for n in range(len(laid.units)) if n not in kept], mask)


def _masked(laid: Laid, places: Collection[int], mask: Mask) -> tuple[int, ...]:
    shown = (mask.token if at in places else token for at, token in enumerate(laid.ids))
    return tuple(token for token in shown if token is not None)

"""Masked prompts against what is left of the words."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_laid import made_laid

from moesteer.errors import MoesteerError
from moesteer.rationale.layout import Laid
from moesteer.rationale.masking import Mask, mask_of, only, without

DELETE, NEUTRAL = Mask("delete", None), Mask("neutral", 99)
LAID = made_laid({"one": "A dog runs home", "two": "It moves"}, ("runs",))  # ids 5 to 12


def stand_in(**tokens: int | None) -> Any:
    """A tokenizer with these special tokens and no others."""
    names = ("mask", "unk", "bos", "eos", "pad")
    return SimpleNamespace(**{f"{name}_token_id": tokens.get(name) for name in names})


def test_masking_nothing_and_everything():
    every = range(len(LAID.units))
    for mask in (DELETE, NEUTRAL):
        assert without(LAID, [], mask) == only(LAID, every, mask) == LAID.ids
        assert without(LAID, every, mask) == only(LAID, [], mask)
    # What is no unit stays: here the first and the last token.
    assert without(LAID, every, DELETE) == (LAID.ids[0], LAID.ids[-1])
    assert without(LAID, every, NEUTRAL) == (LAID.ids[0], *[99] * 6, LAID.ids[-1])


def test_masked_words_by_hand():
    assert without(LAID, [1, 4], DELETE) == (5, 6, 8, 9, 11, 12)
    assert without(LAID, [1, 4], NEUTRAL) == (5, 6, 99, 8, 9, 99, 11, 12)
    assert only(LAID, [1, 4], DELETE) == (5, 7, 10, 12)
    assert only(LAID, [1, 4], NEUTRAL) == (5, 99, 7, 99, 99, 10, 99, 12)


@given(units=st.sets(st.integers(0, 5)))
def test_only_masks_what_without_keeps(units: set[int]):
    places = {token for n in units for token in LAID.units[n].tokens}
    others = {token for n in range(6) if n not in units for token in LAID.units[n].tokens}
    for mask in (DELETE, NEUTRAL):
        shown = [mask.token if at in places else t for at, t in enumerate(LAID.ids)]
        assert without(LAID, units, mask) == tuple(t for t in shown if t is not None)
        shown = [mask.token if at in others else t for at, t in enumerate(LAID.ids)]
        assert only(LAID, units, mask) == tuple(t for t in shown if t is not None)


def test_a_neutral_text_that_cannot_be_read_is_refused():
    for text, said in (("\udcff", "not valid Unicode"), ("_\0", "NUL")):
        with pytest.raises(MoesteerError, match=f"the neutral token: .*{said}"):
            mask_of("neutral", stand_in(), text)


def test_every_token_of_a_word_is_masked():
    word = LAID.units[1]
    longer = Laid(LAID.instance, LAID.ids, (type(word)("one", 2, 5, (2, 3, 4), True),), LAID.labels)
    assert without(longer, [0], NEUTRAL) == (5, 6, 99, 99, 99, 10, 11, 12)


def test_the_unknown_token_is_the_mask_token_or_else_the_unknown():
    assert mask_of("unknown", stand_in(mask=7, unk=8)) == Mask("unknown", 7)
    assert mask_of("unknown", stand_in(unk=0, eos=2)) == Mask("unknown", 0)


@pytest.mark.parametrize("tokens", [{}, {"unk": 2, "eos": 2}, {"unk": 1, "bos": 1, "eos": 2}])
def test_without_such_a_token_it_is_refused(tokens: dict[str, int]):
    with pytest.raises(MoesteerError, match="mask by delete or neutral"):
        mask_of("unknown", stand_in(**tokens))


def test_the_neutral_token_is_the_first_of_its_text():
    def encode(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text] + [2] * add_special_tokens}

    tokenizer: Any = encode
    assert mask_of("neutral", tokenizer) == Mask("neutral", ord("_"))
    assert mask_of("neutral", tokenizer, "the") == Mask("neutral", ord("t"))
    assert mask_of("delete", tokenizer) == DELETE
    with pytest.raises(MoesteerError, match="no token to the neutral text ''"):
        mask_of("neutral", tokenizer, "")

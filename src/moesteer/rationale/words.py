"""What a word is.

A run of letters, digits and the marks on them, with what joins two of them (don't, well-known,
3.5); other punctuation is part of no word. In a language written without spaces a whole clause
would be one word: take tokens there.
"""

import re
import unicodedata

_WORD = re.compile(r"\w+(?:(?:['’‐\u200c\u200d-]|(?<=\d)[.,:](?=\d))\w+)*")


def word_spans(text: str) -> list[tuple[int, int]]:
    """The words of a text, as characters `start` up to `end`."""
    # A mark (a vowel sign, an accent) belongs to its letter, but is none to a regular expression.
    letters = "".join("x" if unicodedata.category(c).startswith("M") else c for c in text)
    return [found.span() for found in _WORD.finditer(letters)]

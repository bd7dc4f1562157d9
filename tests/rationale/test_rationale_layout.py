"""Units and labels among the tokens, against counting bytes: a byte-level token has a letter a
byte."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import TEMPLATE
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.rationale.instances import Instance, TextSpan, filled
from moesteer.rationale.layout import Laid, lay_out
from moesteer.rationale.words import word_spans

TRIMMING = TEMPLATE.replace("m.content", "m.content | trim")
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<s>", "</s>"]


def byte_level(
    vocab_size: int, *, template: str | None = TEMPLATE, bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; with `bos` it begins texts with a token of its own and ends them with
    another."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["in New York, don't say yes or no. élan 3.5"] * 50, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 5)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


BYTES, BPE = byte_level(0), byte_level(320)
TOKENIZERS = {
    "bytes": BYTES,
    "bpe": BPE,
    "trimming": byte_level(320, template=TRIMMING),
    "bos": byte_level(320, bos=True),
}


def made(
    texts: dict[str, str],
    rationale: tuple[TextSpan, ...],
    prompt: str,
    labels: dict[str, str] | None = None,
) -> Instance:
    return Instance(
        "set:1", texts, "right", labels or {"right": "yes", "wrong": "no"}, rationale, prompt, {}
    )


def place(laid: Laid, number: int) -> str:
    unit = laid.units[number]
    return laid.instance.texts[unit.text][unit.start : unit.end]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


# -- words ---------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    "a don't well-known 3.5 12:30 1,000 हिन्दी éte e\u0301te\u0301 naïve it’s _x_ 한국 Ⅷ New York"
    " می\u200cخواهم".split()
)
GAPS = st.sampled_from(
    [" ", ", ", ". ", "\n\n", " - ", " (", ") ", "! ", "/", " 🧪 ", "…", "\u2028"]
)


@given(words=st.lists(WORDS, max_size=6), data=st.data())
def test_words_are_found_between_their_gaps(words: list[str], data: st.DataObject):
    text, expected = data.draw(GAPS), []
    for word in words:
        expected.append((len(text), len(text) + len(word)))
        text += word + data.draw(GAPS)
    assert word_spans(text) == expected


def test_quotes_and_hyphens_at_the_edge_are_no_part_of_a_word():
    text = "'tis -- 'dogs' - (well-) -1.5. A.M. x--y"
    assert [text[start:end] for start, end in word_spans(text)] == (
        "tis dogs well 1.5 A M x y".split()
    )


# -- units against counting bytes ----------------------------------------------------------------

PIECES = st.one_of(
    WORDS,
    GAPS,
    st.sampled_from(["New York", "<|end|>", "{", "  ", "yes", "no", "👩\u200d🔬", "\u00a0"]),
)
TEXTS = st.lists(PIECES, min_size=1, max_size=7).map("".join).filter(word_spans)
PROMPTS = st.sampled_from(
    ["{one}{two}", "A: {one}\nB: {two}\nWell?", "{two} x{one}x", "x {one} yes {two}"]
)


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    texts = {"one": draw(TEXTS), "two": draw(TEXTS)}
    if draw(st.booleans()):
        texts["two"] = texts["one"]
    name = draw(st.sampled_from(["one", "two"]))
    start, end = draw(st.sampled_from(word_spans(texts[name])))
    start = draw(st.integers(0, start))
    end = draw(st.integers(end, len(texts[name])))
    return made(texts, (TextSpan(name, start, end),), draw(PROMPTS))


def counted_bytes(tokenizer: PreTrainedTokenizerFast, rendered: str) -> list[set[int]]:
    """The characters of which each token has a byte."""
    character = [at for at, c in enumerate(rendered) for _ in c.encode()]
    covered, byte = [], 0
    ids: Any = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    for token in tokenizer.convert_ids_to_tokens(ids):
        size = len(token)  # special tokens are written in ASCII
        covered.append(set(character[byte : byte + size]))
        byte += size
    assert byte == len(character)
    return covered


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.filterwarnings("ignore:.*no token of their own")
@settings(max_examples=60, deadline=None)
@given(instance=instances())
def test_units_hold_the_tokens_that_counting_gives_them(
    which: str, plain: bool, instance: Instance
):
    tokenizer = TOKENIZERS[which]
    said, places = filled(instance)
    if plain:
        rendered, lead = said, 0
    else:
        trimmed = said.strip() if which == "trimming" else said
        rendered = f"<|user|>{trimmed}<|end|><|assistant|>"
        lead = len("<|user|>") - (len(said) - len(said.lstrip()) if trimmed != said else 0)
    first = 1 if plain and which == "bos" else 0  # a token that no character stands behind
    covered = counted_bytes(tokenizer, rendered)

    (words,) = lay_out([instance], tokenizer, plain=plain)
    (tokens,) = lay_out([instance], tokenizer, unit="token", plain=plain)
    assert words.ids == tokens.ids
    assert len(words.ids) == len(covered) + first
    if not (plain and which == "bos"):
        assert decoded(tokenizer, words.ids) == rendered

    # Each token's word by counting. White space around a text may be gone.
    seen = {
        name: [at for at, c in enumerate(text) if not c.isspace()]
        for name, text in instance.texts.items()
    }
    pieces = [
        (name, start, end) for name in places for start, end in word_spans(instance.texts[name])
    ]
    expected: dict[tuple[str, int, int], list[int]] = {}
    loose: list[tuple[str, int]] = []
    for token, characters in enumerate(covered, start=first):
        visible = {c for c in characters if not rendered[c].isspace()}
        shares = Counter(
            {
                (name, start, end): len(
                    visible & set(range(lead + places[name] + start, lead + places[name] + end))
                )
                for name, start, end in pieces
            }
        )
        if shares and max(shares.values()):
            expected.setdefault(max(shares, key=lambda piece: shares[piece]), []).append(token)
        in_text = Counter(
            {
                name: len(visible & {lead + at + n for n in seen[name]})
                for name, at in places.items()
            }
        )
        if max(in_text.values()):
            loose.append((max(in_text, key=lambda name: in_text[name]), token))
    found = {(unit.text, unit.start, unit.end): list(unit.tokens) for unit in words.units}
    assert found == expected
    assert list(found) == [piece for piece in pieces if piece in expected]
    assert [(unit.text, unit.tokens[0]) for unit in tokens.units] == loose

    # What people marked.
    for laid in (words, tokens):
        for unit in laid.units:
            marked = {
                at
                for span in instance.rationale
                if span.text == unit.text
                for at in range(span.start, span.end)
                if not instance.texts[unit.text][at].isspace()
            }
            assert unit.human == bool(marked & set(range(unit.start, unit.end)))
            shown = instance.texts[unit.text][unit.start : unit.end]
            assert shown == shown.strip() != ""


# -- labels --------------------------------------------------------------------------------------


def test_label_words_follow_the_prompt():
    instance = made(
        {"one": "It is."}, (TextSpan("one", 0, 2),), "{one} Is it?", {"right": "yes", "wrong": "no"}
    )
    for which, plain, begins in (("bpe", False, ""), ("bpe", True, " "), ("bos", True, " ")):
        tokenizer = TOKENIZERS[which]
        (laid,) = lay_out([instance], tokenizer, plain=plain)
        for label, words in instance.labels.items():
            assert decoded(tokenizer, laid.labels[label]) == begins + words
        ends = "Is it?" if plain else "<|assistant|>"
        assert decoded(tokenizer, laid.ids).endswith(ends)
        assert (laid.ids[0] == 4) == (which == "bos")


def test_label_words_that_join_the_prompts_last_token_are_tokenised_alone():
    instance = made({"one": "It is."}, (TextSpan("one", 0, 2),), "{one} Say ")
    (laid,) = lay_out([instance], BPE, plain=True)
    joined: Any = BPE("It is. Say yes")["input_ids"]
    assert tuple(joined[: len(laid.ids)]) != laid.ids
    assert decoded(BPE, laid.labels["right"]) == "yes"


def test_labels_whose_tokens_begin_alike_are_refused():
    instance = made(
        {"one": "It is."}, (TextSpan("one", 0, 2),), "{one}?", {"right": "no", "wrong": "none"}
    )
    with pytest.raises(MoesteerError, match=r"set:1: .*'none' \(wrong\) and 'no' \(right\)"):
        lay_out([instance], BYTES)


# -- refusals ------------------------------------------------------------------------------------


def test_a_prompt_over_the_context_is_refused_with_both_numbers():
    instance = made({"one": "It is."}, (TextSpan("one", 0, 2),), "{one} Is it?")
    (laid,) = lay_out([instance], BYTES)
    needed = len(laid.ids) + 3
    lay_out([instance], BYTES, max_tokens=needed)
    with pytest.raises(
        MoesteerError, match=rf"set:1: .*{len(laid.ids)} tokens.* 3, .*{needed - 1}"
    ):
        lay_out([instance], BYTES, max_tokens=needed - 1)


def test_marked_punctuation_is_no_word_but_a_token():
    instance = made({"one": "It is!"}, (TextSpan("one", 5, 6),), "{one} Is it?")
    with pytest.raises(MoesteerError, match=r"set:1: the marked characters belong to no unit"):
        lay_out([instance], BYTES)
    (laid,) = lay_out([instance], BYTES, unit="token")
    assert [place(laid, number) for number in laid.human] == ["!"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        (TEMPLATE.replace("m.content", "m.content | upper"), "leaves it out or changes it"),
        (TEMPLATE.replace("m.content }}", "m.content ~ m.content }}"), "repeats it 2 times"),
    ],
)
def test_a_template_that_does_not_keep_the_texts_is_refused(template: str | None, said: str):
    instance = made({"one": "It is."}, (TextSpan("one", 0, 2),), "{one} Is it?")
    tokenizer = byte_level(0, template=template)
    with pytest.raises(MoesteerError, match=f"set:1: .*{said}"):
        lay_out([instance], tokenizer)
    assert lay_out([instance], tokenizer, plain=True)


def test_a_slow_tokenizer_is_refused():
    slow: Any = type("Slow", (), {"is_fast": False})()
    with pytest.raises(MoesteerError, match="load the fast tokenizer"):
        lay_out([], slow)


def test_words_that_a_tokenizer_joins_are_counted():
    tokenizer = byte_level(320)
    tokenizer.add_tokens(["New York"])
    instance = made({"one": "in New York"}, (TextSpan("one", 7, 11),), "{one}")
    with pytest.warns(MoesteerWarning, match="^1 words have no token of their own"):
        (laid,) = lay_out([instance], tokenizer)
    assert [place(laid, n) for n in range(len(laid.units))] == ["in", "York"]


def test_options_reach_the_template():
    instance = made({"one": "It is."}, (TextSpan("one", 0, 2),), "{one}")
    (laid,) = lay_out([instance], BYTES, chat_options={"opening": "So:"})
    assert decoded(BYTES, laid.ids).endswith("<|assistant|>So:")


def test_many_are_laid_out_as_one_by_one():
    one = made({"one": "It is."}, (TextSpan("one", 0, 2),), "{one} Is it?")
    other = replace(one, texts={"one": "No, New York isn't."})
    both = lay_out([one, other], BPE)
    assert both == [*lay_out([one], BPE), *lay_out([other], BPE)]
    assert both[0].human == (0,)

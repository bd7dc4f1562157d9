"""Contrast pairs, checked against renderers and a byte-counting oracle written here.

Each chat template stands here twice: as Jinja, which the library is given, and as a Python function
that also says which characters are whose content. Which tokens overlap a target is recomputed from
the lengths of byte-level tokens, without offset mappings.
"""

import json
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from moesteer.chat import TokenisedConversation, render_prompt, tokenise_pairs
from moesteer.contrast import Conversation, Message, Span, pairs_hash, parse_pair, read_pairs
from moesteer.errors import MoesteerError

# --- chat templates, twice -----------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
# The system prompt is folded into the first user turn, and the whole turn is trimmed.
MISTRAL = (
    "<s>{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ (ns.system + m.content) | trim }} [/INST]"
    "{% set ns.system = '' %}"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
HARMONY = (
    "<|start|>system<|message|>You are a user's assistant.\nReasoning: "
    "{{ reasoning_effort | default('medium') }}<|end|>"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}"
    "<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% else %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('channel in content') }}{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
)
# Drops the thinking of earlier turns, and gives the last reply an empty thinking block.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
UPPER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>{% endfor %}"
)

Turns = list[tuple[str, str]]
Parts = list[str | tuple[int, str]]  # the template's words, or (message, its content as rendered)


def chatml(turns: Turns) -> Parts:
    parts: Parts = []
    for i, (role, content) in enumerate(turns):
        parts += [f"<|im_start|>{role}\n", (i, content), "<|im_end|>\n"]
    return parts


def llama(turns: Turns) -> Parts:
    parts: Parts = ["<|begin|>"]
    for i, (role, content) in enumerate(turns):
        parts += [f"<|head|>{role}<|/head|>\n\n", (i, content.strip()), "<|eot|>"]
    return parts


def mistral(turns: Turns) -> Parts:
    parts: Parts = ["<s>"]
    for i, (role, content) in enumerate(turns):
        if role == "user" and i and turns[i - 1][0] == "system":
            system = turns[i - 1][1].lstrip()
            parts += ["[INST] ", (i - 1, system), "\n\n", (i, content.rstrip()), " [/INST]"]
        elif role == "user":
            parts += ["[INST] ", (i, content.strip()), " [/INST]"]
        elif role == "assistant":
            parts += [" ", (i, content), "</s>"]
    return parts


def harmony(turns: Turns) -> Parts:
    opening = "<|start|>system<|message|>You are a user's assistant.\nReasoning: medium<|end|>"
    parts: Parts = [opening]
    for i, (role, content) in enumerate(turns):
        before = {
            "system": "<|start|>developer<|message|># Instructions\n\n",
            "user": "<|start|>user<|message|>",
            "assistant": "<|start|>assistant<|channel|>final<|message|>",
        }[role]
        last = role == "assistant" and i == len(turns) - 1
        parts += [before, (i, content), "<|return|>" if last else "<|end|>"]
    return parts


def thinking(turns: Turns) -> Parts:
    parts: Parts = []
    for i, (role, content) in enumerate(turns):
        parts.append(f"<|im_start|>{role}\n")
        if role == "assistant":
            if i == len(turns) - 1:
                parts.append("<think>\n\n</think>\n\n")
            content = content.lstrip("\n")
        parts += [(i, content), "<|im_end|>\n"]
    return parts


TEMPLATES: dict[str, tuple[str, Callable[[Turns], Parts]]] = {
    "chatml": (CHATML, chatml),
    "llama": (LLAMA, llama),
    "mistral": (MISTRAL, mistral),
    "harmony": (HARMONY, harmony),
    "thinking": (THINKING, thinking),
}
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<s>", "</s>",
    "[INST]", "[/INST]", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>",
]  # fmt: skip

# --- tokenizers ----------------------------------------------------------------------------------


def byte_level(
    vocab_size: int, *, trim_offsets: bool = False, nfc: bool = False, template: str = CHATML
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained here; at `vocab_size` 0 every byte is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the user asks the assistant,\n\nand the assistant says: Sure, hello! I can't help. "
    tokenizer.train_from_iterator([text * 20, "\n\n final(é) éé ###  ## \n\n\n" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


BYTES = byte_level(0)
TOKENIZERS = {
    "bytes": BYTES,
    "bpe": byte_level(360),
    "bpe, trimmed offsets": byte_level(360, trim_offsets=True),
}


def counted(
    tokenizer: PreTrainedTokenizerFast, side: TokenisedConversation
) -> tuple[str, list[str]]:
    """The decoded target, and its tokens."""
    ids = [token for token, counts in zip(side.ids, side.target, strict=True) if counts]
    return decode(tokenizer, ids), [decode(tokenizer, [token]) for token in ids]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def expected_target(
    tokenizer: PreTrainedTokenizerFast, text: str, ranges: list[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Ids and target of `text` by counting bytes: a byte-level token has a letter for each byte."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    byte_ranges = [(len(text[:s].encode()), len(text[:e].encode())) for s, e in ranges]
    target, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        end = at + len(token)
        target.append(any(at < e and end > s for s, e in byte_ranges))
        at = end
    assert at == len(text.encode())
    return ids, target


def pair_record(turns: Turns, target: object) -> dict[str, object]:
    """The turns against a side that differs from the first character on."""
    messages = [{"role": role, "content": content} for role, content in turns]
    other = [{**messages[0], "content": "≠" + turns[0][1]}, *messages[1:]]
    return {"a": messages, "b": other, "target": target}


# --- the span, on random conversations -----------------------------------------------------------

WORDS = st.sampled_from(
    [
        *("user", "assistant", "system", "final", "Sure", "the", "a", "###"),  # the templates' own
        *("<|im_end|>", "[INST]", "</s>", "<|end|>", "{{ m.content }}", "{% raw %}", "\\n", '"'),
        *("\n", "\n\n", " ", "  ", "\t", "\u2028", "\u00a0"),
        *("é", "e\u0301", "한", "🧪", "👩\u200d🔬", "\ue000", "\U000f0000", "\U000f0001"),
    ]
)
CONTENTS = st.one_of(
    st.lists(WORDS, min_size=1, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> Turns:
    turns: Turns = []
    if draw(st.booleans()):
        turns.append(("system", draw(CONTENTS)))
    for _ in range(draw(st.integers(1, 2))):
        turns += [("user", draw(CONTENTS)), ("assistant", draw(CONTENTS))]
    if draw(st.booleans()):  # the same text in several turns
        turns = [(role, turns[-1][1]) for role, _ in turns]
    if draw(st.booleans()):
        turns.pop()
    return turns


def content_of(turns: Turns, target: str) -> list[int]:
    replied = turns[-1][0] == "assistant"
    users = [i for i, (role, _) in enumerate(turns) if role == "user"]
    return {
        "reply": [len(turns) - 1],
        "prompt": list(range(len(turns) - replied)),
        "last_user": users[-1:],
    }[target]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    turns=conversations(),
    target=st.sampled_from(["reply", "prompt", "last_user"]),
    tokenizer=st.sampled_from(sorted(TOKENIZERS)),
)
def test_target_is_the_content_and_nothing_else(
    template: str, turns: Turns, target: str, tokenizer: str
):
    if target == "reply" and turns[-1][0] != "assistant":
        turns = [*turns, ("assistant", "Sure")]
    jinja, renderer = TEMPLATES[template]
    text, ranges = "", []
    for part in renderer(turns):
        if isinstance(part, str):
            text += part
            continue
        i, content = part
        if i in content_of(turns, target):
            start = len(text) + len(content) - len(content.lstrip())
            ranges.append((start, start + len(content.strip())))
        text += content
    used = TOKENIZERS[tokenizer]
    ids, expected = expected_target(used, text, ranges)

    pair = parse_pair(pair_record(turns, target), "here")
    (tokenised,) = tokenise_pairs([pair], used, chat_options={"chat_template": jinja})

    assert list(tokenised.a.ids) == ids
    assert list(tokenised.a.target) == expected
    if tokenizer == "bytes":
        intended = "".join(turns[i][1].strip() for i in content_of(turns, target))
        assert counted(used, tokenised.a)[0] == intended


@settings(max_examples=80, deadline=None)
@given(before=CONTENTS, text=CONTENTS, after=CONTENTS, template=st.sampled_from(sorted(TEMPLATES)))
def test_a_literal_target_is_where_it_occurs(before: str, text: str, after: str, template: str):
    turns = [("user", before), ("assistant", f"{before}{text}{after}")]
    places = sum(content.startswith(text, at) for _, content in turns for at in range(len(content)))
    record = pair_record(turns, {"a": text, "b": text})
    if places != 1:
        with pytest.raises(MoesteerError, match=f"occurs {places} times"):
            parse_pair(record, "here")
        record["target"] = {"last": text}
    pair = parse_pair(record, "here")
    jinja = TEMPLATES[template][0]
    (tokenised,) = tokenise_pairs([pair], BYTES, chat_options={"chat_template": jinja})
    assert counted(BYTES, tokenised.a)[0] == text.strip()
    # The position: what comes after the target in the reply is what stands behind it.
    last = len(tokenised.a.target) - tokenised.a.target[::-1].index(True)
    rest = decode(BYTES, tokenised.a.ids[last:])
    whole = turns[1][1]
    assert rest.startswith(whole[whole.rfind(text) + len(text.rstrip()) :].rstrip())


# --- tokens at the border ------------------------------------------------------------------------


def test_a_token_that_straddles_the_border_counts_for_a_visible_character():
    tokenizer = TOKENIZERS["bpe"]
    record = {"prompt": "say", "a": "hello assistants", "b": "no", "target": {"a": "t", "b": "n"}}
    record["target"] = {"a": "ssi", "b": "n"}
    (pair,) = tokenise_pairs([parse_pair(record, "here")], tokenizer)
    assert counted(tokenizer, pair.a)[1] == [" assistant"]

    # A leading space in the same token does not keep the token out …
    record["target"] = {"a": "assistants", "b": "n"}
    (pair,) = tokenise_pairs([parse_pair(record, "here")], tokenizer)
    assert counted(tokenizer, pair.a)[1] == [" assistant", "s"]

    # … and a token of white space at the border is not let in, though the text names it.
    record |= {"a": "Sure\n\nhello", "target": {"a": "\n\nhello", "b": "n"}}
    (pair,) = tokenise_pairs([parse_pair(record, "here")], tokenizer)
    text, tokens = counted(tokenizer, pair.a)
    assert text == "hello"
    assert "\n\n" not in tokens


def test_white_space_within_the_target_and_the_bytes_of_one_character_count():
    record = {"prompt": "say", "a": " x\n\n🧪 ", "b": "no"}
    (pair,) = tokenise_pairs([parse_pair(record, "here")], BYTES)
    assert counted(BYTES, pair.a)[0] == "x\n\n🧪"
    assert sum(pair.a.target) == 1 + 2 + 4


def test_characters_that_the_tokenizer_composes_are_no_error():
    tokenizer = byte_level(0, nfc=True)
    for reply, composed in (
        ("cafe\u0301", "café"),
        ("\u1112\u1161\u11ab", "한"),
        ("\u0958", "\u0915\u093c"),
    ):
        record = {"prompt": "say", "a": reply, "b": "no"}
        (pair,) = tokenise_pairs([parse_pair(record, "here")], tokenizer)
        assert counted(tokenizer, pair.a)[0] == composed


def test_sentencepiece_like_tokenizer():
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghilnoprstuy[]/.INST\n",
    ]
    bpe = models.BPE(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "▁h", "▁hi"]))},
        merges=[("▁", "h"), ("▁h", "i")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=MISTRAL)
    record = {"prompt": "hi there", "a": "hi, é hi", "b": "no"}
    (pair,) = tokenise_pairs([parse_pair(record, "here")], tokenizer)
    text, tokens = counted(tokenizer, pair.a)
    assert text == " hi, é hi"
    assert tokens[0] == tokens[-1] == " hi"


def test_a_tokenizer_that_drops_characters_is_refused():
    # Its offsets are wrong behind a dropped character: here "n" would be taken for "h".
    letters = sorted({*CHATML, *"useraitn<|>_"})
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML)
    record = {"prompt": "ßtß", "a": "tin", "b": "n"}
    with pytest.raises(MoesteerError, match=r"pairs:7: side a: the tokenizer drops characters"):
        tokenise_pairs([parse_pair(record, "pairs:7")], tokenizer)
    record["prompt"] = "t"
    (pair,) = tokenise_pairs([parse_pair(record, "pairs:7")], tokenizer)
    assert counted(tokenizer, pair.a)[1] == ["t", "i", "n"]


def test_a_target_that_the_tokenizer_folds_into_another_letter_is_refused():
    record = {"prompt": "say", "a": "cafe\u0301", "b": "no", "target": {"a": "\u0301", "b": "no"}}
    with pytest.raises(MoesteerError, match=r"side a: the tokenizer gives no token to the target"):
        tokenise_pairs([parse_pair(record, "here")], byte_level(0, nfc=True))


# --- templates that rewrite ----------------------------------------------------------------------


def refused(record: Mapping[str, object], template: str) -> str:
    with pytest.raises(MoesteerError) as error:
        tokenise_pairs(
            [parse_pair(record, "pairs.jsonl:3")], BYTES, chat_options={"chat_template": template}
        )
    assert str(error.value).startswith("pairs.jsonl:3: side a: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_template_that_rewrites_the_target_is_refused():
    message = refused({"prompt": "Say it.", "a": "Hello", "b": "No"}, UPPER)
    assert "'Hello'" in message
    assert "leaves it out or changes it" in message
    twice = "{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}"
    assert "repeats it 2 times" in refused({"prompt": "Say it.", "a": "Hello", "b": "No"}, twice)
    squeezed = "{% for m in messages %}{{ m.content | replace('  ', ' ') }}{% endfor %}"
    assert "changes it" in refused({"prompt": "Say it.", "a": "a  b", "b": "No"}, squeezed)
    no_system = "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}"
    record = pair_record([("system", "Be kind."), ("user", "kind?")], "prompt")
    assert "'Be kind.'" in refused(record, no_system)


def test_what_the_template_does_elsewhere_does_not_matter():
    record = {"system": "Be kind.", "prompt": "Say it.", "a": "Hello", "b": "No"}
    loud = CHATML.replace("m.content", "(m.content if loop.last else m.content | upper)")
    (pair,) = tokenise_pairs(
        [parse_pair(record, "here")], BYTES, chat_options={"chat_template": loud}
    )
    assert counted(BYTES, pair.a)[0] == "Hello"


def test_thinking_of_earlier_turns_is_dropped_and_only_a_target_within_it_suffers():
    earlier = "<think>\nhm\n</think>\n\nYes."
    turns = [("user", "Q?"), ("assistant", earlier), ("user", "R?"), ("assistant", "Yes.")]
    options = {"chat_template": THINKING}
    (pair,) = tokenise_pairs(
        [parse_pair(pair_record(turns, "reply"), "here")], BYTES, chat_options=options
    )
    assert counted(BYTES, pair.a)[0] == "Yes."
    assert decode(BYTES, pair.a.ids).count("Yes.") == 2
    assert "hm" in refused(pair_record(turns, "prompt"), THINKING)

    # A last reply with its thinking is laid out anew; the answer alone can still be the target.
    last = [("user", "Q?"), ("assistant", "<think>hm</think>Yes.")]
    refused(pair_record(last, "reply"), THINKING)
    (pair,) = tokenise_pairs(
        [parse_pair(pair_record(last, "Yes."), "here")], BYTES, chat_options=options
    )
    assert counted(BYTES, pair.a)[0] == "Yes."


def test_a_template_that_fails_is_reported_with_its_words():
    record = {"prompt": "Say it.", "a": "<|channel|>final", "b": "No"}
    assert "channel in content" in refused(record, HARMONY)
    assert "refuses this conversation" in refused(record, "{% for %}")


# --- rendering -----------------------------------------------------------------------------------

ASK = (Message("system", "Be kind."), Message("user", "Hi?"))


def test_render_prompt_ends_where_the_reply_begins():
    assert render_prompt(ASK, BYTES) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_options_reach_the_template():
    options = {"chat_template": THINKING, "enable_thinking": False}
    assert render_prompt(ASK, BYTES, options).endswith("assistant\n<think>\n\n</think>\n\n")
    options = {"chat_template": HARMONY, "reasoning_effort": "low"}
    assert "Reasoning: low" in render_prompt(ASK, BYTES, options)
    record = {"prompt": "Say it.", "a": "low", "b": "No"}
    (pair,) = tokenise_pairs([parse_pair(record, "here")], BYTES, chat_options=options)
    text = decode(BYTES, pair.a.ids)
    assert "Reasoning: low" in text
    assert counted(BYTES, pair.a)[0] == "low"
    assert (
        text[: text.rfind("low")].encode()
        == decode(BYTES, pair.a.ids[: pair.a.target.index(True)]).encode()
    )


def test_render_prompt_errors():
    bare = byte_level(0)
    bare.chat_template = None
    with pytest.raises(MoesteerError, match=r"no chat template.*--chat-template FILE"):
        render_prompt(ASK, bare)
    assert render_prompt(ASK, bare, {"chat_template": "{{ messages[1].content }}"}) == "Hi?"
    with pytest.raises(MoesteerError, match="'tokenize' is set by moesteer"):
        render_prompt(ASK, BYTES, {"tokenize": True})


def test_a_slow_tokenizer_is_refused():
    slow = types.SimpleNamespace(is_fast=False, chat_template=CHATML)
    with pytest.raises(MoesteerError, match="load the fast tokenizer"):
        tokenise_pairs([], slow)  # pyright: ignore[reportArgumentType]


def test_special_tokens_are_those_of_the_template_only():
    tokenizer = byte_level(0, template=LLAMA)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|eot|>",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|begin|>", "<|eot|>")],
    )
    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    assert tokenizer("x")["input_ids"][0] == begin  # so there is something to leave out
    (pair,) = tokenise_pairs([parse_pair({**SAY, "a": "Sure"}, "here")], tokenizer)
    assert pair.a.ids.count(begin) == 1
    assert counted(tokenizer, pair.a)[0] == "Sure"


def test_many_pairs_keep_their_order_across_batches():
    pairs = [
        parse_pair({"prompt": "Say it.", "a": f"a{i}", "b": f"b{i}"}, f"f:{i}") for i in range(300)
    ]
    for i, pair in enumerate(tokenise_pairs(pairs, BYTES)):
        assert pair.source == f"f:{i}"
        assert counted(BYTES, pair.a)[0] == f"a{i}"
        assert counted(BYTES, pair.b)[0] == f"b{i}"


def test_max_tokens():
    record = {"prompt": "Say it.", "a": "Hello", "b": "No"}
    pair = parse_pair(record, "pairs.jsonl:3")
    (whole,) = tokenise_pairs([pair], BYTES)
    needed = len(whole.a.target) - whole.a.target[::-1].index(True)
    (cut,) = tokenise_pairs([pair], BYTES, max_tokens=needed)
    assert cut.a.ids == whole.a.ids[:needed]
    assert cut.a.target == whole.a.target[:needed]
    with pytest.raises(
        MoesteerError,
        match=f"pairs.jsonl:3: side a: the target ends at token {needed}, .* {needed - 1} tokens",
    ):
        tokenise_pairs([pair], BYTES, max_tokens=needed - 1)


# --- records -------------------------------------------------------------------------------------


def test_the_two_forms_say_the_same():
    short = parse_pair({"system": "S", "prompt": "P", "a": "A", "b": "B"}, "x:1")
    opening = [{"role": "system", "content": "S"}, {"role": "user", "content": "P"}]
    sides = {
        side: [*opening, {"role": "assistant", "content": side.upper()}] for side in ("a", "b")
    }
    assert parse_pair(sides, "x:1") == short
    messages = (Message("system", "S"), Message("user", "P"), Message("assistant", "A"))
    assert short.a == Conversation(messages, "reply", (Span(2, 0, 1),))


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("target", "rule", "a", "b"),
    [
        ("prompt", "prompt", "D. Who? ", "Who?"),
        ("last_user", "last_user", "D. Who? ", "Who?"),
        ("Who", "text", "Who", "Who"),
        ({"a": "D", "b": "?"}, "text", "D", "?"),
        ({"last": "Who? "}, "last", None, None),
        ({"last": "Who?"}, "last", "Who?", "Who?"),
    ],
)
def test_targets(target: object, rule: str, a: str | None, b: str | None):
    record = {"a": user("D. Who? "), "b": user("Who?"), "target": target}
    if a is None:
        with pytest.raises(MoesteerError, match=r"x:1: side b: .*'Who\? ' does not occur"):
            parse_pair(record, "x:1")
        return
    pair = parse_pair(record, "x:1")
    assert (pair.a.target, pair.b.target) == (rule, rule)
    for side, text in ((pair.a, a), (pair.b, b)):
        (span,) = side.spans
        assert side.messages[span.message].content[span.start : span.end] == str(text).strip()


def test_a_rules_name_per_side_is_a_text():
    record = {"a": user("a reply"), "b": user("the reply"), "target": {"a": "reply", "b": "reply"}}
    assert parse_pair(record, "x:1").a.spans == (Span(0, 2, 7),)


SAY = {"prompt": "p", "a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "a": "x"}, "missing key 'b'; a record has prompt, a, b and may have"),
        ({"prompt": "p", "b": "x"}, "missing key 'a'"),
        ({"a": user("x")}, "missing key 'b'"),
        ({}, "missing key 'a'; missing key 'b'"),
        ({"promt": "p", "a": "x", "b": "y"}, "missing key 'prompt'; unknown key 'promt'"),
        ({**SAY, "note": "n"}, "unknown key 'note'"),
        ({**SAY, "a": 3}, "a: input should be a valid string"),
        ({**SAY, "a": ""}, "a holds no visible character"),
        ({**SAY, "b": " \n"}, "b holds no visible character"),
        ({**SAY, "prompt": "p\0"}, "prompt holds a NUL character"),
        ({**SAY, "a": "\ud83d"}, "a is not valid Unicode"),
        ({**SAY, "b": "x"}, "a and b are the same"),
        ({**SAY, "target": "prompt"}, "the same up to the end of the target"),
        ({**SAY, "target": 3}, "target must be reply, prompt, last_user, a text"),
        ({**SAY, "target": {"a": "x"}}, "target must be"),
        ({**SAY, "target": "replies"}, "side a: the target text 'replies' does not occur"),
        ({"a": [], "b": user("x")}, "a: list should have at least 1 item"),
        ({"a": "x", "b": user("x")}, "missing key 'prompt'"),
        ({"a": [{"role": "bot", "content": "x"}], "b": user("y")}, "a[0].role is 'bot', not 's"),
        ({"a": [{"role": "user"}], "b": user("y")}, "missing key 'a[0].content'"),
        ({"a": user("x"), "b": user("y")}, "side a: the target is the reply, but the last mess"),
        (
            {"a": user("aaa"), "b": user("b"), "target": {"a": "aa", "b": "b"}},
            "side a: the target text 'aa' occurs 2 times",
        ),
        (
            {"a": [{"role": "assistant", "content": "x"}], "b": user("y"), "target": "prompt"},
            "side a: the target is the prompt, but nothing stands before the reply",
        ),
        (
            {"a": [{"role": "assistant", "content": "x"}], "b": user("y"), "target": "last_user"},
            "side a: the target is the last user message, but there is none",
        ),
    ],
)
def test_malformed_records(record: dict[str, object], message: str):
    with pytest.raises(MoesteerError) as error:
        parse_pair(record, "pairs.jsonl:3")
    assert str(error.value).startswith("pairs.jsonl:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_text_is_shortened_in_an_error():
    with pytest.raises(MoesteerError) as error:
        parse_pair({**SAY, "target": "long\n" * 1000}, "x:1")
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


def test_pairs_hash():
    pair = parse_pair({"prompt": "p", "a": "x z", "b": "y"}, "one:1")
    same = replace(parse_pair({**SAY, "a": "x z", "target": "reply"}, "two:9"), source="three:5")
    assert pairs_hash([pair]) == pairs_hash([same])
    assert len(pairs_hash([pair])) == 64
    others = [
        {"prompt": "p", "a": "x  z", "b": "y"},
        {"prompt": "p", "a": "y", "b": "x z"},
        {"prompt": "p", "a": "x z", "b": "y", "target": {"a": "x", "b": "y"}},
        {"prompt": "p", "a": "x z", "b": "y", "system": "s"},
    ]
    hashes = {pairs_hash([parse_pair(record, "x:1")]) for record in others}
    assert len(hashes | {pairs_hash([pair]), pairs_hash([pair, pair]), pairs_hash([])}) == 7


# --- files and data sets -------------------------------------------------------------------------


def test_jsonl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = ["", json.dumps({**SAY, "a": "x\u2028x"}, ensure_ascii=False), "  ", json.dumps(SAY)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    pairs = read_pairs(path)
    assert [pair.source for pair in pairs] == [f"{path}:2", f"{path}:4"]
    assert pairs[0].a.messages[-1].content == "x\u2028x"
    assert read_pairs(str(path)) == pairs


def test_csv(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(
        'a,b,prompt,target,system\r\n"x\ny, z",no,p,,\r\n\r\nx q,y q,p,q,kind\r\n', newline=""
    )
    pairs = read_pairs(path)
    assert [pair.source for pair in pairs] == [f"{path}:2", f"{path}:5"]
    assert pairs[0].a == parse_pair({**SAY, "a": "x\ny, z", "b": "no"}, "").a
    assert pairs[1] == parse_pair(
        {"prompt": "p", "a": "x q", "b": "y q", "target": "q", "system": "kind"}, f"{path}:5"
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b"", ": holds no records"),
        ("p.jsonl", b"\n \n", ": holds no records"),
        ("p.jsonl", b'\n{"prompt": ', ":2: not JSON (Expecting value, column"),
        ("p.jsonl", b"[1, 2]", ":1: not an object but '[1, 2]'; give one object a line"),
        ("p.jsonl", b"[" * 100_000, ":1: "),
        ("p.jsonl", b'{"a": "x"}', ":1: missing key 'prompt'"),
        ("p.jsonl", b'\n{"prompt": "\xff"}', ":2: byte 0xff is not UTF-8"),
        ("p.csv", b"", ": holds no records"),
        ("p.csv", b"prompt,a,b\n", ": holds no records"),
        ("p.csv", b"prompt,a\np,x\n", ":1: missing column 'b'; a record has prompt, a, b and may"),
        ("p.csv", b"prompt,a,b,c\np,x,y,z\n", ":1: unknown column 'c'"),
        ("p.csv", b"prompt,a,b,a\np,x,y,z\n", ":1: column 'a' twice"),
        ("p.csv", b'prompt,a,b\n"p\np",x,y\np,x,y,z\n', ":4: 4 cells for 3 columns"),
        ("p.csv", b'prompt,a,b\n"p,x,y\n', ":2: CSV that cannot be read"),
        ("p.csv", b"prompt,a,b\np,,y\n", ":2: a holds no visible character"),
        ("p.csv", b"prompt,a,b\np,x\0,y\n", ":2: a holds a NUL character"),
        ("p.json", b"[]", ": cannot tell the format; the file's name must end in .jsonl or .csv"),
    ],
)
def test_unusable_files(tmp_path, name: str, data: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(MoesteerError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "data/pairs.jsonl", "data/pairs.csv:train", "", "a/b/c"]
)
def test_neither_file_nor_data_set(source: str):
    with pytest.raises(MoesteerError, match="neither an existing file nor a data set"):
        read_pairs(source)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(MoesteerError, match="neither an existing file"):
        read_pairs(tmp_path)


def test_data_set_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MoesteerError, match=r'pip install "moesteer\[data\]"'):
        read_pairs("org/name")


def test_data_set(monkeypatch):
    rows = {"train": [{**SAY, "system": None}], "test": [SAY, {**SAY, "b": "z"}]}

    def load_dataset(name: str, split: str | None):
        if name != "org/na.me":
            raise FileNotFoundError("Dataset 'x' doesn't exist\non the Hub")
        return rows if split is None else rows[split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    pairs = read_pairs("org/na.me:test")
    assert [pair.source for pair in pairs] == ["org/na.me:test:1", "org/na.me:test:2"]
    with pytest.raises(MoesteerError, match=r"the splits train, test; .* org/na.me:train"):
        read_pairs("org/na.me")
    del rows["test"]
    assert [pair.source for pair in read_pairs("org/na.me")] == ["org/na.me:train:1"]
    with pytest.raises(MoesteerError, match=r"failed: Dataset 'x' doesn't exist$"):
        read_pairs("org/other")


def test_importing_is_cheap():
    code = (
        "import sys, moesteer.contrast, moesteer.pair_builders; "
        "print({'torch', 'transformers', 'datasets', 'tokenizers', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""The transformers engine against brute force: one text at a time, one token at a time."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from oracle import watch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moesteer.chat import TokenisedConversation, render_prompt
from moesteer.contrast import Message
from moesteer.engines.base import Counted
from moesteer.engines.evidence import LayerEvidence, summed
from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

FAMILIES = [
    "dbrx",
    "deepseek_v3",
    "ernie4_5_moe",
    "gpt_oss",
    "jamba",
    "llama4_text",
    "longcat_flash",
    "phimoe",
    "qwen3_moe",
]

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [*SPECIAL, *map(chr, range(32, 127))]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and four special ones; it fits the vocabulary of tiny models."""
    characters = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


@cache
def engine(model_type: str) -> TransformersEngine:
    return TransformersEngine(tiny_model(model_type), tokenizer(), id=model_type)


def conversations() -> list[TokenisedConversation]:
    """Of different lengths; the first has no target at all, the last nothing else."""
    rng = np.random.default_rng(0)
    made = []
    for share, length in ((0.0, 6), (0.5, 11), (0.3, 4), (0.7, 9), (1.0, 1)):
        ids = rng.integers(3, 99, length).tolist()
        target = (rng.random(length) < share).tolist()
        made.append(TokenisedConversation(tuple(ids), tuple(target)))
    return made


def by_brute_force(
    e: TransformersEngine, conversation: TokenisedConversation, counted: Counted
) -> np.ndarray:
    """[layer, expert]: one text alone through the whole model, tokens counted in a loop."""
    with torch.no_grad(), watch(e.model) as seen:
        e.model(torch.tensor([conversation.ids]))
    counts = np.zeros((len(e.facts.layers), max(s.experts for s in e.facts.layers)), dtype=int)
    for row, shape in enumerate(e.facts.layers):
        for token, weights in enumerate(seen[shape.layer].weights.tolist()):
            if not conversation.target[token]:
                continue
            for expert in range(shape.experts):
                chosen = weights[expert] == max(weights) if counted == "top-1" else weights[expert]
                counts[row, expert] += bool(chosen)
    return counts


# -- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", ["top-k", "top-1"])
@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_those_of_brute_force(name: str, counted: Counted) -> None:
    e, texts = engine(name), conversations()
    expected = np.stack([by_brute_force(e, text, counted) for text in texts])
    found = e.count_selections(texts, counted)
    if (name, counted) == ("phimoe", "top-1"):  # both of its experts may weigh 1: either will do
        assert (found <= expected).all()
    else:
        np.testing.assert_array_equal(found, expected)
    k = 1 if counted == "top-1" else np.array([shape.top_k for shape in e.facts.layers])
    targets = np.array([sum(text.target) for text in texts])
    assert (found.sum(-1) == targets[:, None] * k).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_do_not_depend_on_the_batch(name: str) -> None:
    e, texts = engine(name), conversations()
    together = e.count_selections(texts)
    alone = np.concatenate([e.count_selections([text]) for text in texts])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(e.count_selections(texts[::-1]), together[::-1])


def test_counting_sees_steering_and_leaves_nothing_behind() -> None:
    e, texts = engine("qwen3_moe"), conversations()
    before = e.count_selections(texts)
    with steer(e.model, Profile(((0, 1),), ((1, 2),)), e.layers):
        steered = e.count_selections(texts)
    targets = [sum(text.target) for text in texts]
    assert steered[:, 0, 1].tolist() == targets
    assert not steered[:, 1, 2].any()
    with pytest.raises(IndexError):
        e.count_selections([TokenisedConversation((5, 10**6), (True, True))])
    assert not any(layer.experts and layer.experts._forward_pre_hooks for layer in e.layers)
    np.testing.assert_array_equal(e.count_selections(texts), before)


# -- generating ----------------------------------------------------------------------------------

PROMPTS = ["Tell me.", "No", "How are you, on a day like this?", "Yes, sure!", "Why"]


def profiles_of(e: TransformersEngine) -> list[Profile | None]:
    low, high = e.facts.layers[0].layer, e.facts.layers[-1].layer
    first = Profile(((low, 1),), ((high, 0),), name="first")
    second = Profile((), ((low, 2), (high, 3)), name="second")
    return [first, None, second, first, None]


def by_hand(e: TransformersEngine, prompt: str, profile: Profile | None, length: int) -> str:
    """Greedy decoding without a cache, one forward pass a token."""
    ids = [WORDS.index(character) for character in prompt]
    start = len(ids)
    with torch.no_grad(), nullcontext() if profile is None else steer(e.model, profile, e.layers):
        while len(ids) < start + length and ids[-1] != tokenizer().eos_token_id:
            ids.append(int(e.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return "".join(WORDS[token] for token in ids[start:] if len(SPECIAL) <= token < len(WORDS))


@pytest.mark.parametrize("batch_size", [64, 2])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "jamba"])
def test_each_prompt_gets_its_own_profile(name: str, batch_size: int) -> None:
    e = engine(name)
    profiles, done = profiles_of(e), []
    made = e.generate(
        PROMPTS, profiles, max_new_tokens=5, batch_size=batch_size, progress=done.append
    )
    expected = [by_hand(e, *each, 5) for each in zip(PROMPTS, profiles, strict=True)]
    assert made.replies == expected
    assert expected != [by_hand(e, prompt, None, 5) for prompt in PROMPTS]
    assert sum(done) == len(PROMPTS)
    assert {(seen.profile, seen.layer) for seen in made.evidence} == {
        (profile.name, shape.layer)
        for profile in profiles[:3]
        if profile is not None
        for shape in (e.facts.layers[0], e.facts.layers[-1])
    }
    assert len(made.evidence) == 4
    assert all(seen.obeyed and seen.tokens for seen in made.evidence)


def test_one_profile_for_all_or_none() -> None:
    e = engine("qwen3_moe")
    profile = profiles_of(e)[0]
    for asked in (profile, None):
        made = e.generate(PROMPTS, asked, max_new_tokens=4)
        assert made.replies == [by_hand(e, prompt, asked, 4) for prompt in PROMPTS]
        assert len(made.evidence) == (0 if asked is None else 2)
    assert e.generate([], None, max_new_tokens=4).replies == []


def test_profiles_that_share_a_name_keep_their_evidence() -> None:
    """`Profile()` is named "profile" unless told otherwise."""
    e = engine("qwen3_moe")
    profiles = [Profile(((0, 1),)), Profile(((0, 2),)), Profile(((0, 1),))]
    made = e.generate(PROMPTS[:3], profiles, max_new_tokens=3, batch_size=1)
    routed = [seen for seen in made.evidence if isinstance(seen, LayerEvidence)]
    assert sorted(expert for seen in routed for expert in seen.activated) == [1, 2]
    assert all(seen.obeyed for seen in made.evidence)


def test_evidence_of_batches_is_summed() -> None:
    batches = [
        LayerEvidence("p", 0, 10, {1: 10}, {2: 0}),
        LayerEvidence("p", 1, 10, {3: 10}, {}),
        LayerEvidence("p", 0, 5, {1: 4}, {2: 1}),
    ]
    assert summed(batches) == [LayerEvidence("p", 0, 15, {1: 14}, {2: 1}), batches[1]]


def test_sampling_repeats_with_its_seed() -> None:
    e = engine("qwen3_moe")

    def sampled(seed: int) -> list[str]:
        options: Any = {"max_new_tokens": 12, "temperature": 1.5, "seed": seed}
        return e.generate(PROMPTS, profiles_of(e), **options).replies

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert sampled(1) != e.generate(PROMPTS, profiles_of(e), max_new_tokens=12).replies


def test_a_chat_prompt_is_tokenised_as_it_was_rendered() -> None:
    """The template has written the special tokens; the tokenizer must not add its own."""
    e = engine("qwen3_moe")
    prompt = render_prompt([Message("user", "Hi")], e.tokenizer)
    assert prompt == "<s>user: Hi</s><s>assistant: "
    ids = e.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        first = int(e.model(torch.tensor([ids])).logits[0, -1].argmax())
    reply = e.tokenizer.decode([first], skip_special_tokens=True)
    assert e.generate([prompt], max_new_tokens=1).replies == [reply]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "profiles", "message"),
    [
        (["Hi", ""], None, "prompt 2 is empty"),
        (["Hi", "Why"], [None], "there are 2 prompts, but 1 profiles"),
        (["Hi"], Profile(((0, 99),)), "does not exist"),
        (["Hi"], [Profile(((99, 0),))], "names layer 99"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    prompts: Sequence[str], profiles: Any, message: str
) -> None:
    with pytest.raises(MoesteerError, match=message):
        engine("qwen3_moe").generate(prompts, profiles, max_new_tokens=2)


def test_prompts_too_long_for_the_context_are_refused() -> None:
    e = engine("qwen3_moe")
    assert e.max_tokens is not None
    longest = "x" * (e.max_tokens - 2)
    assert len(e.generate([longest], max_new_tokens=2).replies) == 1
    with pytest.raises(MoesteerError, match=rf"prompt 2 has {len(longest)} tokens; with 3 new"):
        e.generate(["Hi", longest], max_new_tokens=3)


def test_a_profile_of_another_model_is_refused() -> None:
    other = Profile(((0, 1),), model=engine("gpt_oss").facts, name="theirs")
    with pytest.raises(MoesteerError, match="theirs was made on gpt_oss and does not fit qwen3"):
        engine("qwen3_moe").generate(["Hi"], other, max_new_tokens=1)
    ours = Profile(((0, 1),), model=engine("qwen3_moe").facts)
    assert engine("qwen3_moe").generate(["Hi"], ours, max_new_tokens=1).evidence[0].obeyed


# -- loading -------------------------------------------------------------------------------------


def test_a_saved_model_loads_as_itself(tmp_path: Path) -> None:
    e = engine("deepseek_v3")
    e.model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = load_transformers(str(tmp_path), dtype="float32")
    assert loaded.facts.config_hash == e.facts.config_hash
    assert loaded.facts.tokenizer_hash == e.facts.tokenizer_hash
    assert loaded.facts.layers == e.facts.layers
    assert loaded.facts.id == str(tmp_path)
    texts = conversations()
    np.testing.assert_array_equal(loaded.count_selections(texts), e.count_selections(texts))
    assert loaded.generate(PROMPTS, max_new_tokens=3) == e.generate(PROMPTS, max_new_tokens=3)


def test_a_dense_model_is_refused_by_its_config_alone(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2)
    config.architectures = [LlamaForCausalLM.__name__]
    config.save_pretrained(tmp_path)  # there are no weights to load
    with pytest.raises(MoesteerError, match="is not a Mixture-of-Experts model"):
        load_transformers(str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesteerError, match="holds no model"):
        load_transformers(str(tmp_path))


def test_an_offloaded_model_counts_and_generates() -> None:
    e, texts = engine("qwen3_moe"), conversations()
    model = tiny_model("qwen3_moe")
    cpu_offload(model, execution_device=torch.device("cpu"))
    offloaded = TransformersEngine(model, tokenizer(), id="offloaded")
    np.testing.assert_array_equal(offloaded.count_selections(texts), e.count_selections(texts))
    profiles = profiles_of(e)
    made = offloaded.generate(PROMPTS, profiles, max_new_tokens=3)
    assert made == e.generate(PROMPTS, profiles, max_new_tokens=3)

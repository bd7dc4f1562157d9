"""The text that the testbed's models read, and their tokenizer: a byte-level BPE with a chat
template.

Byte level, so any text round-trips; the offsets of the tokens cover the text without gaps, so a
span of characters is a span of tokens.
"""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moesteer.testbed import classification, world

CLASSIFIED = 0.3
"""The share of the training text that is of classification tasks, where there are any."""
VOCABULARY = {False: 1100, True: 1400}
"""Tokens of a text without and with classification tasks."""
BOS, EOS, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def training_example(rng: random.Random, tasks: bool) -> world.Example:
    """Draw one example of the behaviours' text or, among them, of the classification tasks."""
    if tasks and rng.random() < CLASSIFIED:
        return classification.training_example(rng)
    return world.training_example(rng)


def train_tokenizer(seed: int, tasks: bool, examples: int = 20_000) -> PreTrainedTokenizerFast:
    """Learn the merges from the training text. The template adds BOS, the tokenizer nothing."""
    rng = random.Random(f"tokenizer {seed}")
    drawn = (training_example(rng, tasks) for _ in range(examples))
    text = (part for e in drawn for part in (*e.earlier, e.prompt, e.a, e.b))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        (*text, *world.SYSTEMS),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY[tasks],
            special_tokens=[PAD, BOS, EOS, *ROLES],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast

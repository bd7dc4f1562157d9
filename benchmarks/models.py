"""The models that are measured: the bundled testbed, and larger ones with random weights."""

from functools import cache

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from moesteer.chat import TokenisedConversation, tokenise_pairs
from moesteer.contrast import read_pairs
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.profile import Profile
from moesteer.testbed import ground_truth
from moesteer.testbed.world import BEHAVIOURS


@cache
def testbed() -> TransformersEngine:
    return load_transformers("testbed")


@cache
def random_model() -> TransformersEngine:
    """16 layers × 64 experts, k = 8, hidden 1024, bf16: 1.7 billion random parameters."""
    config = Qwen3MoeConfig(
        vocab_size=len(testbed().tokenizer),
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,  # pyright: ignore[reportCallIssue]
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        tie_word_embeddings=True,
    )
    return _random(config, torch.bfloat16)


def middle_model() -> TransformersEngine:
    """8 layers × 32 experts, k = 4, hidden 512, fp32: 150 million random parameters."""
    return _random(
        Qwen3MoeConfig(
            vocab_size=len(testbed().tokenizer),
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=64,  # pyright: ignore[reportCallIssue]
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=352,
            tie_word_embeddings=True,
            bos_token_id=1,  # inseq asks for one
        ),
        torch.float32,
    )


def dense_model() -> TransformersEngine:
    """8 layers, hidden 512, fp32, without experts: 26 million random parameters."""
    return _random(
        LlamaConfig(
            vocab_size=len(testbed().tokenizer),
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            intermediate_size=1408,
            tie_word_embeddings=True,
            bos_token_id=1,  # inseq asks for one
        ),
        torch.float32,
    )


def conversations(behaviour: str) -> list[TokenisedConversation]:
    """Both sides of the testbed's pairs of a behaviour."""
    pairs = tokenise_pairs(read_pairs(f"testbed:{behaviour}"), testbed().tokenizer)
    return [side for pair in pairs for side in (pair.a, pair.b)]


def all_conversations() -> list[TokenisedConversation]:
    return [conversation for behaviour in BEHAVIOURS for conversation in conversations(behaviour)]


def planted_profile() -> Profile:
    """What a user of the testbed steers: the three planted experts of a behaviour."""
    return Profile(activated=ground_truth().behaviours["refusal"].planted, name="planted")


def everywhere_profile(engine: TransformersEngine) -> Profile:
    """The worst case: in every layer one expert activated and two deactivated."""
    layers = [layer.layer for layer in engine.layers]
    return Profile(
        activated=tuple((layer, layer % 5) for layer in layers),
        deactivated=tuple((layer, expert) for layer in layers for expert in (7, 11)),
        name="every layer",
    )


def spread_profile(engine: TransformersEngine) -> Profile:
    """5 activated and 20 deactivated experts, spread over all layers."""
    layers = [layer.layer for layer in engine.layers]
    return Profile(
        activated=tuple((layer, 3) for layer in layers[:: len(layers) // 5][:5]),
        deactivated=tuple((layers[i % len(layers)], 5 + 2 * i) for i in range(20)),
        name="spread",
    )


def _random(config: PretrainedConfig, dtype: torch.dtype) -> TransformersEngine:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return TransformersEngine(model, testbed().tokenizer, id="random")

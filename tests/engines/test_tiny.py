"""Every MoE causal LM of the installed transformers, built tiny, run, and found not degenerate."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moesteer.engines.tiny import moe_model_types, tiny_config, tiny_model
from moesteer.errors import MoesteerError

TYPES = moe_model_types()


@cache
def built(model_type: str) -> Any:
    return tiny_model(model_type)


def tokens(model: PreTrainedModel, rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def recorders(model: PreTrainedModel) -> dict[type[nn.Module], int]:
    """The class that the model records router logits from, and their place in what it returns."""
    found: dict[type[nn.Module], int] = {}
    for cls in vars(sys.modules[type(model).__module__]).values():
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            recorded = (getattr(cls, "_can_record_outputs", None) or {}).get("router_logits", [])
            for recorder in recorded if isinstance(recorded, list) else [recorded]:
                found[recorder.target_class] = recorder.index
    return found


def routers(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    places = recorders(model)
    return [(module, places[type(module)]) for module in model.modules() if type(module) in places]


@contextmanager
def routing(model: PreTrainedModel) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Router logits [T, E] and the experts selected [T, k], a pair for each call of a router."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(index: int, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        logits = parts[index if isinstance(output, tuple) else 0].flatten(0, -2)
        chosen = [part for part in parts if torch.is_tensor(part) and part.dtype == torch.int64]
        # Where the router does not return its choice (dbrx, llama4, doge) the largest is chosen.
        seen.append((logits, chosen[-1] if chosen else logits.argmax(-1)))

    handles = [
        module.register_forward_hook(lambda _m, _a, output, index=index: note(index, output))
        for module, index in routers(model)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_the_list_names_each_architecture_once() -> None:
    assert sorted(set(TYPES)) == TYPES
    assert {"olmoe", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_5_moe_text"} <= set(TYPES)
    assert not {"llama4", "qwen3_5_moe", "gemma4", "llama"} & set(TYPES)
    configs = [type(CONFIG_MAPPING[name]()) for name in TYPES]
    classes = [MODEL_FOR_CAUSAL_LM_MAPPING[config] for config in configs]
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize("model_type", TYPES)
def test_builds_small_with_two_moe_layers(model_type: str) -> None:
    model = built(model_type)
    assert model.config.model_type == model_type
    assert not model.training
    assert model.num_parameters() < 2_000_000
    assert len(routers(model)) >= 2
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("model_type", TYPES)
def test_forward_is_finite_and_depends_on_the_routing(model_type: str) -> None:
    model = tiny_model(model_type)
    batch = tokens(model, 2, 12)
    with torch.no_grad():
        before = model(**batch).logits
        for module, _ in routers(model):
            for weight in module.parameters():
                weight.neg_()
        after = model(**batch).logits
    assert before.shape[:2] == (2, 12)
    assert before.isfinite().all()
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", TYPES)
def test_routing_is_not_degenerate(model_type: str) -> None:
    model = built(model_type)
    with routing(model) as seen, torch.no_grad():
        model(**tokens(model, 4, 50))
    for logits, _ in seen:
        assert logits.isfinite().all()
        assert logits.std(-1).median() > 0.05
    used = [chosen.unique().numel() / logits.shape[-1] for logits, chosen in seen]
    assert max(used) >= 0.75


@pytest.mark.parametrize("model_type", TYPES)
def test_the_seed_decides_the_weights(model_type: str) -> None:
    state = torch.get_rng_state()
    first, again = built(model_type).state_dict(), tiny_model(model_type).state_dict()
    other = tiny_model(model_type, seed=1).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("model_type", TYPES)
def test_generates_greedily_with_a_cache(model_type: str) -> None:
    model = built(model_type)
    batch = tokens(model, 2, 12)
    out = model.generate(
        **batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0
    )
    assert out.shape == (2, 15)


@pytest.mark.parametrize("model_type", TYPES)
def test_no_weight_is_left_to_chance(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to is filled with NaN here, so `tiny_model` would refuse it."""
    settings: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(settings, "fill_uninitialized_memory", True)
    try:
        tiny_model(model_type)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_tiny_config_stays_as_it_is(model_type: str) -> None:
    config = built(model_type).config
    assert tiny_config(config).to_dict() == tiny_config(tiny_config(config)).to_dict()


def test_the_weights_have_the_dtype_asked_for() -> None:
    assert tiny_model("olmoe", dtype=torch.bfloat16).dtype == torch.bfloat16


def yarn(factor: float, positions: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": positions,
        **more,
    }


# Essential values of published config.json files.
REAL: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
            "quant_method": "mxfp4",
        },
        "rope_scaling": yarn(32.0, 4096, truncate=False),
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "rope_scaling": yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "DeepSeek-V2": {
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 1,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 128,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 60,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "routed_scaling_factor": 16.0,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
    "GLM-4.5": {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
        "first_k_dense_replace": 3,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 92,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1000000,
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "use_qk_norm": True,
        "vocab_size": 151552,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "clip_qkv": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "vocab_size": 50304,
    },
    "Phi-3.5-MoE": {
        "model_type": "phimoe",
        "attention_bias": True,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "lm_head_bias": True,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0 + i / 2 for i in range(64)],
            "short_factor": [1.0 + i / 32 for i in range(64)],
            "long_mscale": 1.243163121016122,
            "short_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 10000.0,
        "router_jitter_noise": 0.01,
        "sliding_window": 131072,
        "vocab_size": 32064,
    },
    "Llama-4-Scout": {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text",
            "attention_chunk_size": 8192,
            "eos_token_id": [200001, 200007, 200008],
            "pad_token_id": 200018,
            "head_dim": 128,
            "hidden_size": 5120,
            "interleave_moe_layer_step": 1,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "max_position_embeddings": 10485760,
            "num_attention_heads": 40,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "rope_scaling": {
                "factor": 16.0,
                "high_freq_factor": 1.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "use_qk_norm": True,
            "vocab_size": 202048,
        },
        "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 1408},
    },
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next",
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 151936,
    },
    "Qwen3.5-35B-A3B": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "head_dim": 256,
            "hidden_size": 2048,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
            "num_attention_heads": 16,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
            },
            "vocab_size": 248320,
        },
    },
    "Jamba-1.5-Mini": {
        "model_type": "jamba",
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_dt_rank": 256,
        "mamba_expand": 2,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 65536,
    },
}

# What decides how a router scores and selects; kept to the letter.
ROUTING = (
    "norm_topk_prob",
    "scoring_func",
    "topk_method",
    "routed_scaling_factor",
    "attention_bias",
    "router_jitter_noise",
    "n_shared_experts",
    "use_qk_norm",
    "swiglu_limit",
    "lm_head_bias",
)


def config_of(values: dict[str, Any]) -> PreTrainedConfig:
    return CONFIG_MAPPING[values["model_type"]](**values)


@pytest.mark.parametrize("name", REAL)
def test_real_configs_shrink_and_run(name: str) -> None:
    config = config_of(REAL[name])
    before = config.to_dict()
    tiny = tiny_config(config)
    assert config.to_dict() == before

    text = config.get_text_config()
    assert tiny.model_type == text.model_type
    for flag in ROUTING:
        assert getattr(tiny, flag, None) == getattr(text, flag, None), flag
    kinds = getattr(text, "layer_types", None) or []
    assert set(getattr(tiny, "layer_types", None) or []) == set(kinds)
    assert not hasattr(tiny, "quantization_config")

    k = text.num_experts_per_tok
    assert (tiny.num_experts_per_tok == 1) == (k == 1)
    assert tiny.num_experts_per_tok <= min(k, 3)

    model = tiny_model(config)
    assert model.num_parameters() < 2_000_000
    assert len(routers(model)) >= 2
    with torch.no_grad():
        assert model(**tokens(model, 2, 12)).logits.isfinite().all()


def test_groups_stay_groups() -> None:
    tiny = tiny_config(config_of(REAL["DeepSeek-V3"]))
    assert (tiny.n_routed_experts, tiny.n_group, tiny.topk_group) == (8, 4, 2)
    tiny = tiny_config(config_of(REAL["DeepSeek-V2"]))
    assert 1 <= tiny.topk_group < tiny.n_group
    assert tiny.topk_group * tiny.n_routed_experts // tiny.n_group >= tiny.num_experts_per_tok


def test_dense_layers_stay_before_sparse_ones() -> None:
    model = tiny_model(config_of(REAL["DeepSeek-V3"]))
    assert model.config.first_k_dense_replace == 2
    assert model.config.num_hidden_layers - len(routers(model)) == 2


def test_unusable_types_are_refused_with_the_reason() -> None:
    with pytest.raises(MoesteerError, match=r"model type no_such: unknown to the installed"):
        tiny_model("no_such")
    with pytest.raises(MoesteerError, match=r"model type clip: .* no causal LM"):
        tiny_model("clip")
    config = config_of(REAL["Mixtral-8x7B"])
    config.hidden_act = "no_such_activation"
    with pytest.raises(MoesteerError, match="model type mixtral: a tiny model cannot be built"):
        tiny_model(config)

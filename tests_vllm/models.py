"""Tiny models that transformers and stock vLLM both load, and agree on to 2e-5 in float32.

Random weights, wired by `moesteer.engines.tiny` from a config. `MODELS` says what the config needs
beside its defaults: heads of 32 at least (vLLM's CPU attention knows no smaller ones), and what the
published checkpoints of an architecture say where the defaults of transformers differ from them.

Not among them, because vLLM's CPU router does not run them: ERNIE 4.5 (a selection bias without
groups is dropped) and MiniMax-M2 (so are sigmoid scores without groups). `UNSTEERABLE` are models
that vLLM runs and that can't be steered there.

Phi-3.5-MoE agrees as it stands here. In general the two engines differ on it in two things:
vLLM loads the head's bias and never adds it, and chooses the long or the short factors of LongRoPE
once, by `max_model_len`, where transformers goes by the sequence. (vLLM also takes the router's
jitter to be 0.01, as published, whatever the config says.)
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from moesteer import testbed
from moesteer.engines.tiny import tiny_model

# The hidden size is 64, so that two heads are of 32 where the config has no field for that.
_TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
# DeepSeek's latent attention: heads of 16 + 16, and its own rotary embedding, because a plain one
# turns only the first of these heads in vLLM's CPU kernel.
_LATENT = {
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163_840,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}

# name: model type of transformers, and fields of its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # softmax, then top-k
    "olmoe": ("olmoe", _TWO_HEADS),
    "qwen2_moe": ("qwen2_moe", _TWO_HEADS),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32}),
    "mixtral": ("mixtral", {"head_dim": 32}),
    # top-k, then softmax
    "gpt_oss": ("gpt_oss", {"head_dim": 32}),
    "granitemoe": ("granitemoe", _TWO_HEADS),
    # sparsemixer. vLLM always has these biases; unfilled they would be whatever lay in memory.
    "phi35": ("phimoe", {**_TWO_HEADS, "attention_bias": True, "lm_head_bias": True}),
    # softmax with groups
    "deepseek_v2": (
        "deepseek_v2",
        {
            **_LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
        },
    ),
    # sigmoid with a selection bias and groups; transformers knows no other way of this type
    "deepseek_v3": (
        "deepseek_v3",
        {**_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "glm4_moe": ("glm4_moe", {"head_dim": 32, "n_group": 4, "topk_group": 2}),
}

UNSTEERABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _TWO_HEADS),  # no experts
    "ernie4_5_moe": ("ernie4_5_moe", _TWO_HEADS),
}

# Where vLLM knows an architecture by another name than transformers writes.
_NAMES_IN_VLLM = {"phi35": "PhiMoEForCausalLM"}


def write(name: str, folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write the model called `name`, with the testbed's tokenizer.

    Args:
        name: a key of `MODELS` or `UNSTEERABLE`.
        folder: to write to; it is returned.
        seed: of the weights.
        fields: of the config at its full size; they go before those of `MODELS`.
    """
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path())
    model_type, own = (MODELS | UNSTEERABLE)[name]
    model = tiny_model(CONFIG_MAPPING[model_type](**own | fields), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    _fit_vocabulary(model, len(tokenizer), generator)
    _draw_selection_biases(model, generator)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, token, getattr(tokenizer, token))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name in _NAMES_IN_VLLM:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"architectures": [_NAMES_IN_VLLM[name]]}
        path.write_text(json.dumps(config, indent=2))
    return folder


def _fit_vocabulary(model: PreTrainedModel, size: int, generator: torch.Generator) -> None:
    """As many rows as the tokenizer has tokens, as large as `tiny_model` draws them; no bias."""
    model.resize_token_embeddings(size, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert isinstance(module, nn.Embedding | nn.Linear)
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _draw_selection_biases(model: PreTrainedModel, generator: torch.Generator) -> None:
    """As large as the differences of the scores that they are added to, so that they decide.

    That of expert 0 is so low that no score outweighs it.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(tensor, std=0.2, generator=generator)
            with torch.no_grad():
                tensor.view(-1)[0] = -2

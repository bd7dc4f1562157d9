"""A model small enough to build in a moment, and otherwise the same: a scale model.

Whether an architecture can be steered is a question about its wiring (where the router sits, how it
scores, what its experts expect), not about its weights. So the wiring is kept as the config
describes it and only the sizes are capped: a table says, by the name of a config's field, how large
that field may be. Layers are dropped by kind, two of each kind staying. The weights are drawn so
that every matrix passes a signal of unit size on: router logits then spread, and routing is decided
by them rather than by ties.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from moesteer.errors import MoesteerError

_MIN_LAYERS = 4
_PER_KIND = 2

_EXPERTS = 8
_TOP_K = 3
_GROUPS = 4

# Fields that configs name differently and that the rules below read as well as the table
_QUERY_HEADS = ("num_attention_heads", "n_heads")
_HEADS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
)
_LENGTHS = ("max_position_embeddings", "max_seq_len", "model_max_length")
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K_COUNTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)

# The largest value a field keeps. Fields that are absent, None or smaller stay as they are, and so
# does every field that is not named here: flags, scoring functions, activations, multipliers.
_CAPS: dict[str, int] = {
    # Width
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(
        (
            "intermediate_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "prefix_dense_intermediate_size",
            "ffn_hidden_size",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "moe_latent_size",
            "router_hidden_size",
        ),
        32,
    ),
    "hidden_size_per_layer_input": 16,
    # Length; a multiple of the usual factors of stretched rotary embeddings (16, 32, 40, 64)
    **dict.fromkeys(_LENGTHS, 2560),
    **dict.fromkeys(
        (
            "sliding_window",
            "sliding_window_size",
            "attention_chunk_size",
            "log_scaling_n_floor",
            "block_size",
            "mamba_chunk_size",
            "chunk_size",
        ),
        8,
    ),
    "rel_extent": 16,
    # Experts
    **dict.fromkeys(_EXPERT_COUNTS, _EXPERTS),
    **dict.fromkeys(_TOP_K_COUNTS, _TOP_K),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 2),
    "zero_expert_num": _EXPERTS // 2,
    # Attention; the heads' numbers divide one another because all are powers of two
    **dict.fromkeys((*_QUERY_HEADS, "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    "qk_rope_head_dim": 16,
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("o_groups", "num_kv_shared_layers"), 2),
    **dict.fromkeys(("gated_norm_rank", "hc_lowrank", "d_rel"), 16),
    "rotary_dim": 16,
    # Sparse attention: fewer keys than a short test sequence has. The heads' scores are cut off at
    # zero and summed, so that with few heads many keys tie at zero and the choice is arbitrary.
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 16),
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 32),
    **dict.fromkeys(("index_topk", "indexer_budget", "index_block_size"), 4),
    **dict.fromkeys(("index_topk_blocks", "indexer_compress_ratio"), 2),
    # Linear attention and state spaces
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 2),
    "mamba_dt_rank": 4,
    # Hashed n-gram embeddings
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    # Layouts told by a period; the rest is shortened with the layers
    **dict.fromkeys(
        (
            "decoder_sparse_step",
            "expert_layer_period",
            "attn_layer_period",
            "interleave_moe_layer_step",
            "moe_layer_interval",
            "n_layers_per_attn_res_block",
        ),
        2,
    ),
    # Extra layers that predict further tokens are not part of the forward pass
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), 0),
}

_GROUP_COUNTS = ("n_group", "num_expert_group")
LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers")
# Fields that count the layers of another kind at the start
_PREFIXES = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# Fields that list layers by number, and the number of the first layer
_LAYER_NUMBERS = {"moe_layers": 0, "mlp_only_layers": 0, "local_layer_ids": 0, "ple_layer_ids": 1}
_PERIODS = (
    ("expert_layer_period", "expert_layer_offset"),
    ("attn_layer_period", "attn_layer_offset"),
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Of the checkpoint, not of the architecture
_DROPPED = ("quantization_config", "dtype", "torch_dtype", "transformers_version")

# Where a size of the general table does not fit.
_FITTED: dict[str, dict[str, Any]] = {
    # Experts are addressed by a pair of keys, so that their number is a square.
    "doge": {"num_experts": 16},
    # The compressed blocks must be shorter than a test sequence for the compressor to run.
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    },
}

# Fields without which a class cannot be built, yet whose default is None.
_UNSET: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
}

# What to ask for where the defaults describe another model than the one meant: a dense one, one
# without attention, one with a single MoE layer, one that lacks a field of every real config. Only
# for a type given by name: a config that says the same may well mean it.
_MEANT: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0}},
    "doge": {"is_moe": True},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2},
}


def moe_model_types() -> list[str]:
    """Every model type of the installed transformers whose causal LM records its router's logits.

    Returns:
        Keys of `CONFIG_MAPPING`, sorted. A composite type (vision and text) is listed under the
        name of its text config, which is what the causal LM's class takes.
    """
    return sorted(
        name
        for name, model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if _records_router(_own_class(name, model_class))
    )


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture at the smallest useful size; `config` itself is left as it is.

    Args:
        config: of any MoE causal LM. Of a composite config the text config is used where the causal
            LM's class takes it.

    Returns:
        A config of the same model type with the same routing (scoring, groups, biases, shared
        experts, k = 1 or more), at most 8 routed experts in most architectures, top-3 at most, and
        two layers of every kind, at least four where there are as many. Quantisation is dropped. Of
        a dense config (Gemma 4 without its MoE block) the tiny one is dense as well.

    Raises:
        MoesteerError: the installed transformers has no causal LM for this model type, or refuses
            the shrunk config.
    """
    with _explained(config.model_type, "no tiny config can be made of it"):
        config = _text_config(config)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise MoesteerError(
                f"model type {config.model_type}: the installed transformers "
                f"({transformers.__version__}) has no causal LM for it"
            )
        old = {name: value for name, value in config.to_dict().items() if name not in _DROPPED}
        unset = _UNSET.get(config.model_type, {})
        old |= {name: value for name, value in unset.items() if old.get(name) is None}
        new = _shrink(old) | _FITTED.get(config.model_type, {})
        new |= _shorten(old, new, layers=config.num_hidden_layers)
        return type(config)(**new)


def tiny_model(
    config_or_type: PreTrainedConfig | str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model of the architecture, in eval mode, with routing that is not degenerate.

    Args:
        config_or_type: a config of any size, or a model type as `moe_model_types` lists it.
        seed: of the weights; the same seed gives the same model. The global random state is kept.
        dtype: of the weights; a model class may keep some modules in float32.

    Raises:
        MoesteerError: the model type is unknown, or has no causal LM in the installed transformers,
            or cannot be built; the message tells which.
    """
    if isinstance(config_or_type, str):
        if config_or_type not in CONFIG_MAPPING:
            raise MoesteerError(
                f"model type {config_or_type}: unknown to the installed transformers "
                f"({transformers.__version__}); upgrade it, or correct the name"
            )
        with _explained(config_or_type, "its default config is not valid"):
            config_or_type = CONFIG_MAPPING[config_or_type](**_MEANT.get(config_or_type, {}))
    config = tiny_config(config_or_type)
    with _explained(config.model_type, "a tiny model cannot be built"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        _redraw(model, torch.Generator().manual_seed(seed))
    return model


@contextmanager
def _explained(model_type: str, what: str) -> Iterator[None]:
    """Whatever transformers refuses is told with the model type; the cause stays attached."""
    try:
        yield
    except MoesteerError:
        raise
    except Exception as error:
        raise MoesteerError(f"model type {model_type}: {what}: {error}") from error


def _own_class(name: str, model_class: str | tuple[str, ...]) -> type[PreTrainedModel] | None:
    """The causal LM's class, if `name` is the model type of the very config that it takes."""
    found = getattr(transformers, model_class if isinstance(model_class, str) else model_class[0])
    config_class = found.config_class
    is_own = config_class.model_type == name and not hasattr(config_class, "text_config")
    return found if is_own else None


def _records_router(model_class: type[PreTrainedModel] | None) -> bool:
    if model_class is None:
        return False
    classes = vars(sys.modules[model_class.__module__]).values()
    return any(
        "router_logits" in (getattr(found, "_can_record_outputs", None) or {})
        for found in classes
        if isinstance(found, type) and issubclass(found, PreTrainedModel)
    )


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    text = config.get_text_config(decoder=True)
    return text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config


def _shrink(old: dict[str, Any]) -> dict[str, Any]:
    """Every size capped, and the sizes that must fit one another fitted."""
    new = {name: _capped(name, value) for name, value in old.items()}

    # As many key heads as query heads where it was so, else grouped queries, else a single one.
    for queries, keys in _HEADS:
        if old.get(keys) is not None:
            new[keys] = min(old[keys], 4 if old[keys] == old.get(queries) else 2)
    if old.get("linear_num_value_heads"):
        ratio = old["linear_num_value_heads"] // old["linear_num_key_heads"]
        new["linear_num_key_heads"] = max(1, new["linear_num_value_heads"] // ratio)

    # Multi-head latent attention rotates a part of the head, which keeps its share.
    if old.get("qk_rope_head_dim"):
        if old.get("head_dim"):
            new["head_dim"] = new["qk_rope_head_dim"] * old["head_dim"] // old["qk_rope_head_dim"]
        if old.get("qk_head_dim"):
            new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]

    # A token's experts come from the best groups: as large a share of the groups as it was, and
    # experts enough in them.
    for name in _GROUP_COUNTS:
        if (old.get(name) or 1) > 1:
            experts, k = _first(new, _EXPERT_COUNTS), _first(new, _TOP_K_COUNTS)
            groups = math.gcd(experts, min(_GROUPS, old[name]))
            share = math.ceil(groups * old["topk_group"] / old[name])
            new |= {name: groups, "topk_group": max(share, math.ceil(k * groups / experts))}

    for period, offset in _PERIODS:
        if old.get(offset):
            new[offset] = old[offset] % new[period]

    rotated, length = _head_dim(new) / _head_dim(old), _first(new, _LENGTHS) / _first(old, _LENGTHS)
    for name in ("rope_parameters", "rope_scaling"):
        if old.get(name):
            new[name] = _shrink_rope(old[name], rotated, length)
    return new


def _capped(name: str, value: Any) -> Any:
    if name.endswith("_token_id"):
        small = _TOKENS.get(name, 3)
        return [small] if isinstance(value, list) else value if value is None else small
    if isinstance(value, int) and not isinstance(value, bool) and name in _CAPS:
        return min(value, _CAPS[name])
    if isinstance(value, dict) and "model_type" in value:
        return {inner: _capped(inner, size) for inner, size in value.items()}
    return value


def _first(sizes: dict[str, Any], names: tuple[str, ...]) -> int:
    return next((sizes[name] for name in names if sizes.get(name)), 1)


def _head_dim(sizes: dict[str, Any]) -> int:
    """Of the part of a head that rotary embeddings turn, up to a factor that does not change."""
    explicit = _first(sizes, ("qk_rope_head_dim", "head_dim", "kv_channels"))
    if explicit > 1:
        return explicit
    return _first(sizes, ("hidden_size", "d_model")) // _first(sizes, _QUERY_HEADS)


def _shrink_rope(rope: dict[str, Any], rotated: float, length: float) -> dict[str, Any]:
    """Rotary parameters, possibly one dict a layer type, for heads and positions so much fewer."""
    new = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            new[name] = _shrink_rope(value, rotated, length)
        elif name in ("short_factor", "long_factor"):
            new[name] = value[: int(len(value) * rotated)]
        elif name == "mrope_section":
            sections = [int(section * rotated) for section in value]
            new[name] = [int(sum(value) * rotated) - sum(sections[1:]), *sections[1:]]
        elif name == "original_max_position_embeddings":
            new[name] = max(1, round(value * length))
    return new


def _shorten(old: dict[str, Any], new: dict[str, Any], layers: int) -> dict[str, Any]:
    """What changes when only the layers stay that show every kind of layer."""
    lists = {
        name: value
        for name, value in old.items()
        if isinstance(value, list)
        and len(value) == layers
        and name not in _LAYER_NUMBERS
        and not name.startswith("mtp_")
        and not name.endswith("_token_id")
    }
    numbers = {
        name: (base, set(old[name])) for name, base in _LAYER_NUMBERS.items() if old.get(name)
    }
    prefixes = {name: old[name] for name in _PREFIXES if isinstance(old.get(name), int)}
    overrides = {int(layer): sizes for layer, sizes in (old.get("per_layer_config") or {}).items()}

    def kind(layer: int) -> str:
        return repr(
            (
                [value[layer] for value in lists.values()],
                [layer + base in value for base, value in numbers.values()],
                [layer < value for value in prefixes.values()],
                overrides.get(layer),
            )
        )

    kept = _two_of_each_kind([kind(layer) for layer in range(layers)])

    short: dict[str, Any] = {name: [value[i] for i in kept] for name, value in lists.items()}
    for name, (base, value) in numbers.items():
        short[name] = [at + base for at, layer in enumerate(kept) if layer + base in value]
    for name, value in prefixes.items():
        short[name] = sum(layer < value for layer in kept)
    if overrides:
        # In proportion, because what differs from layer to layer is to differ still.
        short["per_layer_config"] = {
            at: {
                name: max(1, new[name] * size // old[name]) if name in _CAPS else size
                for name, size in overrides[layer].items()
            }
            for at, layer in enumerate(kept)
            if layer in overrides
        }
    if "num_attention_heads_per_layer" in short:
        short["num_attention_heads_per_layer"] = [new["num_attention_heads"]] * len(kept)
    if old.get("moe_layer_end_index"):
        short["moe_layer_end_index"] = min(old["moe_layer_end_index"], len(kept) - 1)
    return short | {name: len(kept) for name in LAYER_COUNTS if name in old}


def _two_of_each_kind(kinds: list[str]) -> list[int]:
    """The first two layers of every kind, in order, filled up with the first of the others."""
    kept = {at for at, kind in enumerate(kinds) if kinds[:at].count(kind) < _PER_KIND}
    others = [at for at in range(len(kinds)) if at not in kept]
    return sorted(kept | set(others[: max(0, _MIN_LAYERS - len(kept))]))


def _redraw(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights of unit gain, so that neither routing nor the logits are near a tie."""

    def draw(tensor: torch.Tensor, std: float) -> None:
        values = torch.empty(tensor.shape, dtype=torch.float32)
        tensor.copy_(values.normal_(0.0, std, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                continue
            for name, tensor in _own_tensors(module):
                if name == "tid2eid":
                    # A router by table, empty until a checkpoint fills it.
                    experts = torch.rand(
                        tensor.shape[0], model.config.n_routed_experts, generator=generator
                    )
                    tensor.copy_(experts.argsort(-1)[:, : tensor.shape[1]])
                elif name == "scale" and hasattr(module, "scalar_root_size"):
                    # Gemma 4 divides a router's input by √hidden and learns what undoes it.
                    tensor.fill_(tensor.numel() ** 0.5)
                elif isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                    # Experts come as [E, in, out] or as [E, out, in]: the larger size will do.
                    fan_in = tensor.shape[-1] if tensor.ndim == 2 else max(tensor.shape[-2:])
                    draw(tensor, fan_in**-0.5)
                elif "bias" in name and tensor.is_floating_point() and not tensor.any():
                    draw(tensor, 0.05)

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise MoesteerError(
                f"model type {model.config.model_type}: {name} of the tiny model is not finite"
            )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)

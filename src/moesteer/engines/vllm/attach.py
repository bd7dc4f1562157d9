"""Put a loaded vLLM model under the seam, or say why that can't be.

Routed layers are found by vLLM's own class for them (`MoERunner`), so no list of architectures is
kept. Each is tested before it is trusted: its router is given random logits, the expert chosen most
is deactivated and the one chosen least activated, and the choice is read. A layer that does not
obey, or a way of running that splits tokens where their rows can't follow, is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moesteer.engines.vllm.directions import Directed
from moesteer.engines.vllm.guarded_selection import Selection, is_known
from moesteer.engines.vllm.hooks import attach_directions
from moesteer.engines.vllm.readings import Readings
from moesteer.engines.vllm.rows import Rows
from moesteer.engines.vllm.seam import RoutedLayer, guarded_routing
from moesteer.engines.vllm.stream import find_stream
from moesteer.engines.vllm.tables import Tables
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.rules import rewritten_logits

PROBE_TOKENS = 32

SALTLESS = ("ExampleConnector", "HF3FSKVConnector", "LMCacheConnectorV1")
"""KV connectors whose keys are the tokens alone, so that profiles would share what they store."""


def attach(model: nn.Module, vllm_config: Any, device: torch.device, room: int) -> Rows:
    """Put each routed layer of the model under the seam; MoesteerError with the reason if not.

    `room`: for how many vectors of a profile's directions; where there is none, the stream is left
    alone. A model without experts can have directions only.
    """
    check_config(vllm_config)
    runners = find_runners(model, dense=room > 0)
    shapes = [_shape(runner) for runner in runners]
    selections = [_selection(runner, shape) for runner, shape in zip(runners, shapes, strict=True)]
    for runner, shape, selection in zip(runners, shapes, selections, strict=True):
        _self_test(runner, shape, selection, vllm_config.model_config.dtype, device)
    scheduler = vllm_config.scheduler_config
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    tables = Tables(
        shapes,
        scheduler.max_num_seqs + 1,
        max(scheduler.max_num_batched_tokens, captured),
        device,
        static=is_static(vllm_config),
    )
    layers = []
    for number, (runner, shape, selection) in enumerate(
        zip(runners, shapes, selections, strict=True)
    ):
        layer = RoutedLayer(number, shape, tables, selection)
        layers.append(layer)
        runner.__dict__["moesteer_layer"] = layer
        runner.router._compute_routing = guarded_routing(runner.router._compute_routing, layer)
    readings = Readings(model, vllm_config.model_config.get_vocab_size())
    directed = None
    if room:
        config = vllm_config.model_config
        hidden = config.get_hidden_size()
        directed = Directed(find_stream(model, hidden, config.dtype), tables, room, hidden)
        attach_directions(directed, layers)
    return Rows(tables, shapes, readings, directed)


def is_static(vllm_config: Any) -> bool:
    """Whether steps replay captured graphs, in which no Python runs."""
    mode = vllm_config.compilation_config.cudagraph_mode
    return mode is not None and mode.name != "NONE"


def check_config(vllm_config: Any) -> None:
    """Refuse ways of running in which a token's row can't be told."""
    parallel = vllm_config.parallel_config
    refused = {
        "micro-batches (--enable-dbo) split the tokens of a step": parallel.use_ubatching,
        "sequence-parallel experts split the tokens of a step": parallel.use_sequence_parallel_moe,
        "prefill context parallelism splits the tokens of a step": (
            parallel.prefill_context_parallel_size > 1
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise MoesteerError(f"{reason}, so whose a token is can't be told. Start without it.")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise MoesteerError(
            "--kv-sharing-fast-prefill runs later layers on some tokens of a step only, so whose a"
            " token is can't be told. Start without it."
        )
    if getattr(vllm_config.speculative_config, "enable_adaptive_verification", False):
        raise MoesteerError(
            "adaptive verification moves the tokens of a step on the device, so whose a token is"
            " can't be told. Start without it."
        )
    for connector in sorted(_kv_connectors(vllm_config.kv_transfer_config) & set(SALTLESS)):
        raise MoesteerError(
            f"{connector} keeps the cache by tokens alone, so that what one profile computed would"
            " serve the requests of another. Use another connector."
        )


def _kv_connectors(config: Any) -> set[str]:
    """The external caches that requests may read, those inside others too."""
    if config is None:
        return set()
    inner = (config.kv_connector_extra_config or {}).get("connectors", ())
    return {config.kv_connector, *(one.get("kv_connector") for one in inner)} - {None}


def find_runners(model: nn.Module, *, dense: bool = False) -> list[Any]:
    """The model's routed layers, in layer order; none only where a `dense` model will do."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    name = type(model).__name__
    if ".models.transformers" in type(model).__module__:
        raise MoesteerError(
            f"{name} runs through vLLM's Transformers backend, whose experts receive weights that"
            " are chosen already. Use a model that vLLM implements itself."
        )
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    if not runners and not dense:
        raise MoesteerError(
            f"{name} has no layer that routes through vLLM's MoERunner: it is not a"
            " Mixture-of-Experts model, or its class routes in its own way."
        )
    numbers = [runner.layer_id for runner in runners]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise MoesteerError(
            f"{name} has several sets of experts in layer {twice[0]}, each for some tokens of"
            " a step, so whose a token is can't be told."
        )
    return sorted(runners, key=lambda runner: runner.layer_id)


def _shape(runner: Any) -> LayerShape:
    config = runner.moe_config
    experts = getattr(config, "num_logical_experts", None) or config.num_experts
    return LayerShape(runner.layer_id, experts, runner.router.top_k)


def _selection(runner: Any, shape: LayerShape) -> Selection | None:
    """How the layer chooses, where the guard is needed; MoesteerError where it can't be guarded."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    router = runner.router
    where = f"layer {shape.layer} ({type(router).__name__})"
    if not isinstance(router, BaseRouter):
        raise MoesteerError(f"{where} does not choose experts in a way that can be read.")
    if not _is_plain(runner):
        raise MoesteerError(
            f"layer {shape.layer} is a {type(runner).__name__}, which runs experts in its own way."
        )
    if getattr(router, "num_fused_shared_experts", 0):
        raise MoesteerError(
            f"{where} appends its shared experts to the chosen ones, which is not supported yet."
        )
    if getattr(router, "_hash_indices_table", None) is not None:
        raise MoesteerError(f"{where} routes by token id, not by logits; nothing can be steered.")
    if hasattr(router, "zero_expert_type"):
        raise MoesteerError(f"{where} has zero experts, which are not supported yet.")
    if runner.routed_experts.quant_method.is_monolithic:
        raise MoesteerError(
            f"{where} runs a kernel that chooses experts inside, where the choice can't be read."
            " Choose another one with --moe-backend."
        )
    if getattr(router, "custom_routing_function", None) is not None:
        return None  # unknown inside; the self-test says whether lifted logits decide
    selection = Selection.of(router)
    if selection is not None and not is_known(selection):
        raise MoesteerError(
            f"{where} scores experts by {selection.scoring}, which is not supported."
        )
    return selection


def _is_plain(runner: Any) -> bool:
    """Whether the runner routes where the seam is: it may add to vLLM's own, not replace it."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    seam = ("_forward_impl", "_maybe_dispatch", "_apply_quant_method")
    return all(getattr(type(runner), name) is getattr(MoERunner, name) for name in seam)


def _self_test(
    runner: Any,
    shape: LayerShape,
    selection: Selection | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Steer the router alone on random logits; MoesteerError where it does not obey."""
    generator = torch.Generator().manual_seed(shape.layer)
    logits = torch.randn(PROBE_TOKENS, shape.experts, generator=generator).to(device, dtype)
    where = f"layer {shape.layer} ({type(runner.router).__name__})"
    route = runner.router._compute_routing
    try:
        if selection is not None and not selection.agrees(runner.router, logits):
            raise MoesteerError(f"{where} chooses experts otherwise than its settings say.")
        free = route(logits, logits, None)[1].clamp(0, shape.experts - 1)
        forced, forbidden = _probe(free, shape)
        lifted = rewritten_logits(logits, forced, forbidden)
        if selection is None:
            index = route(lifted, lifted, None)[1]
        else:
            index = selection.select(lifted, forced, forbidden)[1]
    except MoesteerError:
        raise
    except Exception as error:  # whatever a kernel says of a call that it does not expect
        raise MoesteerError(f"{where} can't be tested: {error}") from error
    if not bool(((index >= 0) & (index < shape.experts)).all()):
        raise MoesteerError(f"{where} chooses experts that there are not.")
    chosen = _members(index, shape.experts)
    if not bool((chosen | ~forced).all()) or bool((chosen & forbidden).any()):
        raise MoesteerError(f"{where} does not obey lifted and lowered logits.")


def _probe(index: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor]:
    """The expert that is chosen least, to be forced, and the one chosen most, to be forbidden."""
    uses = _members(index, shape.experts).sum(0)
    forced, forbidden = (
        torch.zeros(index.shape[0], shape.experts, dtype=torch.bool, device=index.device)
        for _ in range(2)
    )
    if shape.experts > shape.top_k:
        forced[:, int(uses.argmin())] = True
        forbidden[:, int(uses.argmax())] = True
    return forced, forbidden


def _members(index: Tensor, experts: int) -> Tensor:
    """Which experts each token chose, [token, expert]."""
    members = torch.zeros(index.shape[0], experts, dtype=torch.bool, device=index.device)
    return members.scatter_(-1, index.long(), True)

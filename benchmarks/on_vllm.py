"""vLLM with every request steered against none; eight profiles against one; counting in a prefill.

Runs in vLLM's own environment. Both contestants are requests to one engine, so that they differ in
nothing but what the plugin does for them.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, so one clock
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from paired import Figure, relative_speed
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from moesteer.chat import TokenisedConversation
from moesteer.engines.vllm_engine import VllmEngine, load_vllm
from moesteer.profile import Profile
from moesteer.testbed import model_path

LAYERS, EXPERTS = 16, 64
REQUESTS = 16
PROMPT_TOKENS, NEW_TOKENS = 24, 16
SECTION = "vLLM: 16 layers × 64 experts, hidden 512, batch 16, on the same engine"


def figures() -> list[Figure]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for kind, eager, bar in (("eager", True, 0.95), ("compiled", False, 0.98)):
            with engine(folder, eager) as running:
                found += _of_engine(running, kind, bar)
    return found


def _of_engine(running: VllmEngine, kind: str, bar: float) -> list[Figure]:
    one = [profiles()[0]] * REQUESTS
    eight = [profiles()[request % 8] for request in range(REQUESTS)]
    nothing = [None] * REQUESTS
    in_vain = [replace(profiles()[0], dose=0.0)] * REQUESTS
    speed = partial(relative_speed, rounds=7, warm_up=1)
    prefill = [partial(_count, running)], [partial(_prefill, running)]
    return [
        Figure(SECTION, f"{kind}: every request steered, in units of none", speed(
            [partial(_generate, running, one)], [partial(_generate, running, nothing)]
        ), bar),
        Figure(SECTION, f"{kind}: every request at dose 0, the same experts running", speed(
            [partial(_generate, running, in_vain)], [partial(_generate, running, nothing)]
        )),
        Figure(SECTION, f"{kind}: eight profiles in the batch, in units of one", speed(
            [partial(_generate, running, eight)], [partial(_generate, running, one)]
        ), 0.95),
        Figure(SECTION, f"{kind}: counting, in units of the plain prefill", speed(*prefill), 0.90),
    ]  # fmt: skip


def write_model(folder: Path) -> None:
    """Qwen3-MoE with random weights, k = 8, bf16, and the testbed's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("planted"))
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,  # pyright: ignore[reportCallIssue]
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def engine(folder: str, eager: bool) -> Iterator[VllmEngine]:
    running = load_vllm(
        folder, options={"enforce_eager": eager, "max_model_len": 256, "max_num_seqs": REQUESTS}
    )
    try:
        yield running
    finally:
        running.llm.llm_engine.engine_core.shutdown()


def profiles() -> list[Profile]:
    """Eight, each with 5 activated and 20 deactivated experts, spread over all layers."""
    return [
        Profile(
            activated=tuple((layer, (3 + which) % EXPERTS) for layer in range(0, LAYERS, 3))[:5],
            deactivated=tuple((i % LAYERS, (13 + 2 * i + which) % EXPERTS) for i in range(20)),
            name=f"profile {which}",
        )
        for which in range(8)
    ]


def _generate(running: VllmEngine, steered_by: Sequence[Profile | None]) -> None:
    from vllm import SamplingParams

    names = running.llm.llm_engine.input_processor.moesteer
    params = []
    for profile in steered_by:
        if profile is not None and profile.fingerprint not in names.known:
            running._load(profile)
        extra = None if profile is None else {"moesteer": profile.fingerprint}
        params.append(
            SamplingParams(
                temperature=0,
                ignore_eos=True,
                max_tokens=NEW_TOKENS,
                detokenize=False,
                skip_reading_prefix_cache=True,
                extra_args=extra,
            )
        )
    running.llm.generate(_prompts(PROMPT_TOKENS, REQUESTS), params, use_tqdm=False)


def _count(running: VllmEngine) -> None:
    texts = [tuple(prompt["prompt_token_ids"]) for prompt in _prompts(96, 32)]
    running.count_selections(
        [TokenisedConversation(ids, tuple(n >= 48 for n in range(len(ids)))) for ids in texts]
    )


def _prefill(running: VllmEngine) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True
    )
    running.llm.generate(_prompts(96, 32), params, use_tqdm=False)


def _prompts(tokens: int, number: int) -> list[Any]:
    ids = torch.arange(tokens * number).mul(7919).remainder(900).add(5).view(number, -1)
    return [{"prompt_token_ids": row} for row in ids.tolist()]

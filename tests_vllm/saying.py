"""What each engine says of the same prompts: log-probabilities after every token, and replies."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams, TokensPrompt

from moesteer.engines.transformers.steering import steer
from moesteer.profile import Profile

NEW_TOKENS = 16


@dataclass(frozen=True)
class Said:
    """Of one prompt: log-probabilities after each token but the last, [T - 1, V], and the reply."""

    logs: Tensor
    reply: list[int]

    def error(self, other: "Said") -> float:
        """The largest difference of a log-probability."""
        return (self.logs - other.logs).abs().max().item()


def prompts(lengths: Sequence[int] = (3, 17, 90)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(5, 1000, (length,), generator=generator).tolist() for length in lengths]


def vllm_says(
    llm: LLM, name: str | None = None, asked: Sequence[list[int]] | None = None
) -> list[Said]:
    """Under the profile that the engine knows by `name`."""
    parameters = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        prompt_logprobs=-1,
        extra_args=None if name is None else {"moesteer": name},
    )
    requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in asked or prompts()]
    said = []
    for output in llm.generate(requests, parameters, use_tqdm=False):
        assert output.prompt_logprobs is not None
        rows = [at for at in output.prompt_logprobs if at is not None]
        logs = torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])
        said.append(Said(logs, list(output.outputs[0].token_ids)))
    return said


def transformers_says(
    model: PreTrainedModel,
    profile: Profile | None = None,
    asked: Sequence[list[int]] | None = None,
) -> list[Said]:
    """Without a cache: each token of a reply from the whole text before it."""
    said = []
    for prompt in asked or prompts():
        ids = torch.tensor([prompt])
        with torch.no_grad(), nullcontext() if profile is None else steer(model, profile):
            logs = model(ids).logits[0, :-1].log_softmax(-1)
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        said.append(Said(logs, ids[0, len(prompt) :].tolist()))
    return said

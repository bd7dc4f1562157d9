"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft.

Beside a linear map W of an attention stands a trained map of low rank, B·A, which starts at 0. Only
attention's projections get one: what experts and routers compute of a token stays the function it
was, so that a model keeps its experts and its routing, and what changes is what tokens carry to
them. Experts are, besides, stacked in one tensor in transformers, and most of a model's weights.

An adapter stays beside the weights of its model and is never merged into them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesteer.engines.checkpoint import ADAPTER_CONFIG
from moesteer.engines.transformers.routers import describe
from moesteer.errors import MoesteerError
from moesteer.records import first_line

if TYPE_CHECKING:
    from peft import PeftModel


def attention_projections(model: PreTrainedModel) -> list[str]:
    """The names of the linear maps in a model's attention; MoesteerError where it has none."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        if "attention" in kind or "attn" in kind:
            for own, part in module.named_modules(prefix=name):
                if isinstance(part, (nn.Linear, Conv1D)):
                    found[own] = None
    if not found:
        raise MoesteerError(
            f"{describe(model)} has no attention whose projections an adapter could stand beside;"
            " train all weights with --full."
        )
    return list(found)


def add_adapter(
    model: PreTrainedModel, rank: int, base: str, revision: str | None = None
) -> "PeftModel":
    """Put a new adapter beside the model's attention projections, in place; only it is trained.

    `base` names the model in the adapter's config. Random numbers are torch's.
    """
    peft = require_peft()
    names = attention_projections(model)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    with _quiet():
        adapted = peft.get_peft_model(model, config)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base
    config.revision = revision
    return adapted


def load_adapter(
    model: PreTrainedModel, folder: str | Path, *, trainable: bool = False
) -> "PeftModel":
    """Put the adapter of a folder beside its model's weights, in place.

    Raises MoesteerError where it belongs to another architecture, or adds tokens to the prompt.
    """
    peft = require_peft()
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise MoesteerError(
                f"{folder} holds an adapter of the kind {config.peft_type.value}, which writes into"
                " the prompt; only those beside weights, as LoRA, can be read."
            )
        with _quiet():
            return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except MoesteerError:
        raise
    except Exception as error:  # whatever peft says of other people's files
        raise MoesteerError(
            f"the adapter {Path(folder) / ADAPTER_CONFIG} can't be put beside {describe(model)}:"
            f" {first_line(error)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """peft asks transformers by names that it gives up; that is between those two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def require_peft() -> Any:
    """The package peft; MoesteerError, with how to install it, where it is missing."""
    try:
        return import_module("peft")
    except ImportError as error:
        missing = error.name or "peft"
        raise MoesteerError(
            f"adapters need the package {missing}, which is missing: pip install"
            ' "moesteer[finetune]"'
        ) from None

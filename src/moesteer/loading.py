"""How a model is asked for, and loaded: the same words for the commands and for harnesses."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.profile import Profile


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded and addressed.

    Parameters
    ----------
    engine
        transformers, or vllm (to be installed with moesteer[vllm]).
    engine_option
        KEY=VALUE for vLLM, one of its engine arguments, e.g. tensor_parallel_size=2. May be
        repeated.
    revision
        Branch, tag or commit of the model.
    dtype
        auto, float32, bfloat16 or float16.
    device
        Device map for loading in transformers: auto (all GPUs, then the CPU), cpu, cuda:0, …
    max_memory
        DEVICE=SIZE, e.g. 0=20GiB or cpu=60GiB: no more of the weights there. May be repeated.
    offload
        A folder for weights that no device has room for; they are read again in each pass.
    tensor_parallel
        Split each layer over so many processes of this machine, one a GPU (transformers).
    expert_parallel
        The same, each process holding whole experts.
    chat_template
        A file with a chat template, for models without one.
    chat_option
        KEY=VALUE for the chat template, e.g. enable_thinking=false. May be repeated; a profile's
        own options hold otherwise.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    engine_option: list[str] | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    max_memory: list[str] | None = None
    offload: str | None = None
    tensor_parallel: int | None = None
    expert_parallel: int | None = None
    chat_template: str | None = None
    chat_option: list[str] | None = None


DEFAULT = ModelOptions()


def load_engine(
    model: str,
    options: ModelOptions = DEFAULT,
    *profiles: "Profile | None",
    dense: bool = False,
) -> "Engine":
    """The model in the engine that was asked for; MoesteerError where an option is another's.

    `profiles` are those it is for: vLLM is started with room for their directions, if they have
    any. With `dense`, a model without experts will do.
    """
    from moesteer.errors import MoesteerError
    from moesteer.options import parse_options
    from moesteer.records import read_text

    template = options.chat_template
    read = None if template is None else read_text(Path(template))
    if options.engine == "vllm":
        for name in ("device", "max_memory", "offload", "tensor_parallel", "expert_parallel"):
            if getattr(options, name) is not None:
                raise MoesteerError(
                    f"--{name.replace('_', '-')} is for transformers; vLLM places its weights by"
                    " its own options, e.g. --engine-option tensor_parallel_size=2."
                )
        given = parse_options(
            options.engine_option or [], "engine option", "tensor_parallel_size=2"
        )
        return _load_vllm(model, options, read, given, [p for p in profiles if p is not None])
    if options.engine_option:
        raise MoesteerError("--engine-option is for --engine vllm.")
    from transformers.utils.logging import disable_progress_bar

    from moesteer.engines.transformers_engine import load_transformers

    if not sys.stderr.isatty():
        disable_progress_bar()
    given: dict[str, Any] = {
        "revision": options.revision,
        "dtype": options.dtype,
        "device_map": options.device,
        "max_memory": _limits(options.max_memory or []),
        "offload_folder": options.offload,
        "chat_template": read,
        "dense": dense,
    }
    tensor, expert = options.tensor_parallel, options.expert_parallel
    if tensor is None and expert is None:
        return load_transformers(model, **given)
    if tensor is not None and expert is not None:
        raise MoesteerError("give --tensor-parallel or --expert-parallel, not both.")
    from moesteer.engines.led import load_split

    if expert is not None:
        return load_split(model, "expert", expert, **given)
    assert tensor is not None
    return load_split(model, "tensor", tensor, **given)


def _limits(texts: list[str]) -> dict[int | str, str]:
    """DEVICE=SIZE texts by device: a GPU's number, or a name."""
    from moesteer.errors import MoesteerError

    found: dict[int | str, str] = {}
    for text in texts:
        device, _, size = text.partition("=")
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)? ?[KMGT]i?B", size) or not device:
            raise MoesteerError(f"--max-memory {text} is not DEVICE=SIZE, as 0=20GiB is.")
        found[int(device) if device.isdigit() else device] = size.replace(" ", "")
    return found


def _load_vllm(
    model: str,
    options: ModelOptions,
    chat_template: str | None,
    given: dict,
    profiles: "list[Profile]",
) -> "Engine":
    # Of what vLLM and torch report on their way, only problems; their processes inherit it.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ["MOESTEER_APART"] = "1"
    from moesteer.engines.vllm_engine import load_vllm

    return load_vllm(
        model,
        revision=options.revision,
        dtype=options.dtype,
        chat_template=chat_template,
        options=given,
        profiles=profiles,
    )

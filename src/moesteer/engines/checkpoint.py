"""Where a model lies, and what can be read of it before any weight is: config, tokenizer, files.

A model is named by a folder, by its name on the Hub, or as one of the bundled ones.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from moesteer import testbed
from moesteer.errors import MoesteerError
from moesteer.records import first_line

BUNDLED = {
    "testbed": "planted",
    "testbed-twin": "twin",
    "testbed-reader": "reader",
    "testbed-expert": "expert",
    "testbed-attention": "attention",
}
"""Names of the models that come with moesteer."""
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter stands beside, as its config names it."""

    model: str
    revision: str | None


def resolve(model: str) -> str:
    """The folder of a bundled model, or the name as it is."""
    return str(testbed.model_path(BUNDLED[model])) if model in BUNDLED else model


def adapter_base(path: str, revision: str | None = None) -> AdapterBase | None:
    """Which model the adapter in a folder stands beside; None where the folder holds none.

    Raises MoesteerError where its config names no model, and where a revision of it is asked for.
    """
    file = Path(path) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    if revision is not None:
        raise _no_revisions(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise MoesteerError(f"{file} can't be read: {first_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise MoesteerError(f"{file} names no model; write it at base_model_name_or_path.")
    return AdapterBase(base, revision)


def read_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """A model's config alone; MoesteerError where there is none or its architecture is unknown."""
    looks_local = path.startswith((".", "/", "~")) or Path(path).exists()
    if looks_local and not (Path(path) / "config.json").is_file():
        if (Path(path) / ADAPTER_CONFIG).is_file():
            raise MoesteerError(
                f"{path} holds an adapter and no model; only the transformers engine loads both."
            )
        raise MoesteerError(f"{path} holds no model: there is no {Path(path) / 'config.json'}.")
    if looks_local and revision is not None:
        raise _no_revisions(path)
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except Exception as error:  # whatever transformers says of other people's files
        raise MoesteerError(f"{path} can't be read as a model: {first_line(error)}") from error


def _no_revisions(path: str) -> MoesteerError:
    return MoesteerError(f"{path} is a folder, which has no revisions; leave out --revision.")


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit on the Hub that a model's config came from; None of a model in a folder."""
    try:
        return extract_commit_hash(cached_file(path, CONFIG_NAME, revision=revision), None)
    except OSError:
        return None


def read_tokenizer(
    path: str, revision: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, under another chat template if one is given."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except Exception as error:  # whatever transformers says of other people's files
        raise MoesteerError(
            f"{path} has no tokenizer that transformers can load: {first_line(error)}"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def without_weights(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal LM that a config describes, its weights on the meta device: shapes, no memory.

    As it is before quantisation. Raises MoesteerError where transformers has no such class.
    """
    bare = copy.deepcopy(config)
    vars(bare).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(bare, **({"dtype": dtype} if dtype else {}))
    except ValueError:  # its message lists every class there is
        raise MoesteerError(
            f"model type {config.model_type} is not a causal LM of the installed transformers;"
            " give a model that generates text."
        ) from None


def weight_files(path: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model's weights, from the Hub if they are not in its cache.

    Empty where the weights are kept in another format, or can't be had.
    """

    def find(name: str) -> str | None:
        return cached_file(
            path, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )

    try:
        whole = find(SAFE_WEIGHTS_NAME)
        if whole is not None:
            return [Path(whole)]
        index = find(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            return []
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        files = [find(name) for name in sorted(set(names))]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return []  # no connection, or an index that is none
    return [Path(file) for file in files if file is not None] if None not in files else []

"""Loading a judge that is a model of transformers, and reading texts with it in batches."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from moesteer.errors import MoesteerError
from moesteer.records import first_line


def load_judge(auto: str, model: str, revision: str | None) -> tuple[Any, Any]:
    """A model, by the name of its Auto class, and its tokenizer; MoesteerError where it fails."""
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, revision=revision)
        loaded, found = getattr(transformers, auto).from_pretrained(
            model,
            revision=revision,
            dtype="auto",
            device_map="auto" if torch.cuda.is_available() else None,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers says of other people's files
        raise MoesteerError(
            f"the judge {model} can't be loaded: {first_line(error)} Give a folder or a name on"
            " the Hub; models whose terms must be accepted need that, and `hf auth login`."
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers makes them up at random
        raise MoesteerError(
            f"the judge {model} holds no weights {missing[0]}, so it is no trained {auto[9:]}; give"
            " one that is."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if loaded.config.get_text_config().pad_token_id is None:  # a classifier of batches needs it
        loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return loaded.eval(), tokenizer


_Text = TypeVar("_Text")
_Said = TypeVar("_Said")


def short_batches(
    texts: Sequence[_Text], size: int, read: Callable[[list[_Text]], list[_Said]]
) -> list[_Said]:
    """What `read` says of each text, in order; texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda i: len(str(texts[i])))
    said: dict[int, _Said] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        said |= zip(chosen, read([texts[i] for i in chosen]), strict=True)
    return [said[i] for i in range(len(texts))]

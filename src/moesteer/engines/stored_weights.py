"""The weights of a checkpoint's files, one parameter at a time, as transformers would load them.

Files name and cut weights in other ways than models do; most hold a tensor for each expert where
the model holds one for all. Which of a file's tensors make which parameter is said by transformers'
own conversion, applied here as `from_pretrained` applies it, but without ever holding more than
what makes one parameter. Of parameters that stack experts, only the first expert is read.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


def stored_dtype(file: Path) -> torch.dtype | None:
    """Of a file's first floating-point tensor: a model is loaded in it if its config names none."""
    slices = (stored.get_slice(name) for name, stored in _open([file]).items())
    dtypes = (slice[:0].dtype for slice in slices if slice.get_shape())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


@dataclass
class _Source:
    """What makes a parameter: tensors of the files, by the converter's pattern that they match."""

    converter: WeightConverter | None
    tensors: dict[str, list[str]] = field(default_factory=dict)


class StoredWeights:
    """The parameters of a model, itself without weights, as the files of a checkpoint hold them."""

    def __init__(self, model: PreTrainedModel, files: Sequence[Path]) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        plan = model._get_dtype_plan(model.dtype)
        self._kept = [(name.replace("*", ".*"), dtype) for name, dtype in plan.items()]
        self._files = _open(files)
        self._sources = self._find_sources()

    def under(self, module: str) -> Iterator[tuple[str, Tensor | None]]:
        """Name and value of each parameter of a module; None for one that can't be read as it is.

        Parameters that stack several matrices come with a single one. Those that are in no file
        don't come at all.
        """
        for target, source in self._sources.items():
            if target.startswith(f"{module}.") and target in self._parameters:
                try:
                    found = self._read(target, source)
                except Exception:  # a damaged file, or a conversion that does not fit it
                    found = {target: None}
                for name, value in found.items():
                    yield name, value if self._fits(name, value) else None

    def _find_sources(self) -> dict[str, _Source]:
        """By the (first) parameter that is made of them, as `from_pretrained` assigns them."""
        transforms = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        known, prefix = self._model.state_dict(), self._model.base_model_prefix
        sources: dict[str, _Source] = {}
        for name in sorted(self._files, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, pattern = rename_source_key(name, [], [], prefix, known)
            converter = None if pattern is None else by_pattern[pattern]
            source = sources.setdefault(target, _Source(converter))
            source.tensors.setdefault(pattern or name, []).append(name)
        return sources

    def _read(self, target: str, source: _Source) -> dict[str, Tensor | None]:
        stacked = self._parameters[target].dim() > 2
        dtype = self._dtype(target)
        if source.converter is None:
            (name,) = next(iter(source.tensors.values()))
            return {target: self._tensor(name, dtype, first=stacked)}
        # A copy, because a converter holds the tensors that it is given.
        converter = copy.deepcopy(source.converter)
        merging = isinstance(converter.operations[0], MergeModulelist)
        first = stacked and _keep_experts_apart(converter.operations)
        for pattern, names in source.tensors.items():
            for name in names[:1] if first and merging else names:
                tensor = self._tensor(name, dtype, first=first and not merging)
                if tensor is None:
                    return {target: None}
                converter.add_tensor(target, name, pattern, tensor)  # pyright: ignore
        made = converter.convert(target, model=self._model, config=self._model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

    def _tensor(self, name: str, dtype: torch.dtype, *, first: bool) -> Tensor | None:
        """A tensor of the files in the model's type, or its first slice; None if quantised."""
        stored = self._files[name].get_slice(name)
        tensor: Tensor = stored[:1] if first else stored[...]
        if dtype.is_floating_point and not (tensor.is_floating_point() and tensor.itemsize > 1):
            return None
        return tensor.to(dtype)

    def _dtype(self, target: str) -> torch.dtype:
        """What `from_pretrained` would cast a parameter to: some models keep some in float32."""
        kept = (dtype for pattern, dtype in self._kept if re.search(pattern, target))
        return next(kept, self._parameters[target].dtype)

    def _fits(self, name: str, value: Tensor | None) -> bool:
        if value is None or name not in self._parameters:
            return False
        shape, expected = value.shape, self._parameters[name].shape
        return shape == expected or (len(shape) > 2 and shape == (1, *expected[1:]))


def _open(files: Sequence[Path]) -> dict[str, Any]:
    """The open file that holds each tensor, by the tensor's name; a damaged file holds none."""
    found: dict[str, Any] = {}
    for file in files:
        try:
            stored: Any = safe_open(file, framework="pt")
        except (OSError, SafetensorError):
            continue
        found |= dict.fromkeys(stored.keys(), stored)
    return found


def _keep_experts_apart(operations: Sequence[ConversionOps]) -> bool:
    """Whether what a conversion makes of the first expert depends on that expert alone."""
    return all(
        op.dim == 0 if isinstance(op, MergeModulelist) else getattr(op, "dim", 0) > 0
        for op in operations
    )

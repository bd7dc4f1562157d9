"""The file of a reference: counts and held-out scores as tensors, everything else as JSON header.

One safetensors file. The thresholds stand in the header too, for who reads it without moesteer; a
file whose thresholds are not those of its scores is refused.
"""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np

from moesteer.errors import MoesteerError
from moesteer.files import write_atomically
from moesteer.monitoring.drift import PRIOR
from moesteer.monitoring.reference import Origin, Reference

SCHEMA = 1
HEADER_KEY = "moesteer_watch"
TENSORS = ("selected", "tokens", "drift", "linked")


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference atomically; MoesteerError if the file can't be written."""
    from safetensors.numpy import save_file

    header = {"schema": SCHEMA, **_told(reference), **asdict(reference.origin)}
    metadata = {HEADER_KEY: json.dumps(header, ensure_ascii=False)}
    arrays = {name: np.ascontiguousarray(getattr(reference, name)) for name in TENSORS}
    write_atomically(path, lambda file: save_file(arrays, file, metadata=metadata))


def load_reference(path: Path) -> Reference:
    """Read and check a reference; MoesteerError says what is wrong with the file."""
    from pydantic import TypeAdapter, ValidationError
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MoesteerError(f"{path}: there is no such file; `moesteer watch fit` writes one.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if HEADER_KEY not in metadata:
                raise MoesteerError(
                    f"{path} is a safetensors file, but no reference of `moesteer watch fit`."
                )
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(metadata[HEADER_KEY])
        schema = header.pop("schema", None)
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise MoesteerError(f"{path} is not a readable reference: {error}.") from None
    if schema != SCHEMA:
        raise MoesteerError(
            f"{path} has watch schema {schema}; this version of moesteer reads schema {SCHEMA}."
        )
    told = {key: header.pop(key, None) for key in ("prior", "limits")}
    if wrong := sorted({entry.name for entry in fields(Origin)} ^ set(header)):
        what = "unknown" if wrong[0] in header else "missing"
        raise MoesteerError(f"{path}: {wrong[0]} is {what} in the header; fit the reference anew.")
    try:
        origin = TypeAdapter(Origin).validate_json(json.dumps(header), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MoesteerError(f"{path}: {where}: {first['msg']}.") from None
    _check_arrays(path, origin, arrays)
    try:
        found = Reference(origin, **arrays)
    except MoesteerError as error:
        raise MoesteerError(f"{path}: {error}") from None
    for key, value in _told(found).items():
        if told[key] != value:
            raise MoesteerError(f"{path}: {key} is {told[key]!r}, but its scores give {value!r}.")
    return replace(found, name=path.name)


def _told(reference: Reference) -> dict[str, object]:
    """What follows from the rest, as JSON has it."""
    return {"prior": PRIOR, "limits": [asdict(limits) for limits in reference.limits]}


def _check_arrays(path: Path, origin: Origin, arrays: dict[str, np.ndarray]) -> None:
    if sorted(arrays) != sorted(TENSORS):
        raise MoesteerError(
            f"{path} holds tensors {', '.join(sorted(arrays))}; expected {', '.join(TENSORS)}."
        )
    layers = origin.model.layers
    shape = (len(layers), max((one.experts for one in layers), default=0))
    if arrays["selected"].shape != shape:
        raise MoesteerError(
            f"{path}: selected has shape {arrays['selected'].shape}, but the model in the header"
            f" has {shape[0]} routed layers of {shape[1]} experts."
        )
    for name, array in arrays.items():
        whole = name in ("selected", "tokens")
        if array.dtype != (np.int64 if whole else np.float64):
            raise MoesteerError(f"{path}: {name} is of {array.dtype}.")
        if name != "selected" and array.ndim != 1:
            raise MoesteerError(f"{path}: {name} has {array.ndim} dimensions, not one.")
        if not np.isfinite(array).all():
            raise MoesteerError(f"{path}: {name} holds NaN or infinite values.")

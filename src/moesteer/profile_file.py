"""The file of a profile: vectors and scores as tensors, everything else as a JSON header.

One safetensors file that says what is done, how, where and on which model, so that a saved profile
can't be applied in another way, at another place or to another model than it was made for. A file
that says less, or contradicts itself, is refused.

A gate is a key of the header that files without one lack: these are read as ever, also by versions
that know no gates, which refuse a file with one by that key's name.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from moesteer.direction import Candidates, Direction, Kind
from moesteer.errors import MoesteerError
from moesteer.files import write_atomically
from moesteer.gate import DirectionProbe, Gate, RoutingProbe
from moesteer.model_facts import ModelFacts
from moesteer.profile import Profile, Scores

SCHEMA = 3
HEADER_KEY = "moesteer"
DIRECTION_KEYS = {entry.name for entry in fields(Direction)}
GATE_KEYS = {
    "routing": {entry.name for entry in fields(RoutingProbe)} - {"weights"},
    "direction": {entry.name for entry in fields(DirectionProbe)} - {"vector"},
}
"""What the header says of a gate's probe, beside kind, threshold and evidence."""
GATE_NUMBERS = "gate.numbers"
"""The tensor of a probe's weights, in the order of its experts, or of its vector."""


def write(profile: Profile, path: Path) -> None:
    """Write a profile atomically; MoesteerError if the file can't be written."""
    from safetensors.numpy import save_file

    arrays = _arrays(profile)
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise MoesteerError(f"{path}: {key} holds NaN or infinite values.")
    header = {"schema": SCHEMA, **_as_json(profile)}
    metadata = {HEADER_KEY: json.dumps(header, ensure_ascii=False)}
    write_atomically(path, lambda file: save_file(arrays, file, metadata=metadata))


def read(path: Path) -> Profile:
    """Read and check a profile; MoesteerError says what is wrong with the file."""
    header, arrays = _read(path)
    return _parse(path, header, arrays)


def as_text(profile: Profile) -> str:
    """Everything a profile holds but candidates, as one JSON object; scores as a list."""
    scores = []
    if profile.scores is not None and profile.model is not None:
        arrays = vars(profile.scores)
        scores = [
            {"layer": shape.layer, "expert": expert}
            | {key: float(array[row, expert]) for key, array in arrays.items()}
            for row, shape in enumerate(profile.model.layers)
            for expert in range(shape.experts)
        ]
    vectors = [direction.vector for direction in profile.directions]
    header = {"schema": SCHEMA, **_as_json(profile), "scores": scores, "vectors": vectors}
    if profile.gate is not None:
        header["gate"] |= {"numbers": _numbers(profile.gate)}
    return json.dumps(header, ensure_ascii=False, indent=2)


def from_text(text: str, where: str | Path) -> Profile:
    """What `as_text` wrote; MoesteerError, beginning with `where`, for anything else."""
    try:
        header = json.loads(text)
        name, experts = header["name"], header.pop("scores")
        arrays = _arrays_of(experts, header["model"]["layers"]) if experts else {}
        for number, vector in enumerate(header.pop("vectors")):
            arrays[f"directions.{number}"] = np.array(vector, dtype=np.float64)
        if "gate" in header:
            arrays[GATE_NUMBERS] = np.array(header["gate"].pop("numbers"), dtype=np.float64)
        header["candidates"] = None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise MoesteerError(f"{where} holds no profile that can be read: {error!r}.") from None
    return replace(_parse(Path(where), header, arrays), name=name)


# -- reading -------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MoesteerError(f"{path}: there is no such profile file.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if HEADER_KEY not in metadata:  # a model's weights, perhaps: read none of them
                raise MoesteerError(f"{path} is a safetensors file, but not a profile of moesteer.")
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise MoesteerError(f"{path} is not a readable profile: {error}.") from None
    try:
        header = json.loads(metadata[HEADER_KEY])
    except json.JSONDecodeError as error:
        raise MoesteerError(f"{path}: the header is not JSON: {error}.") from None
    if not isinstance(header, dict):
        raise MoesteerError(f"{path}: the header is not a JSON object.")
    return header, arrays


def _parse(path: Path, header: dict, arrays: Mapping[str, np.ndarray]) -> Profile:
    from pydantic import TypeAdapter, ValidationError

    schema = header.pop("schema", None)
    if schema != SCHEMA:
        raise MoesteerError(
            f"{path} has profile schema {schema}; this version of moesteer reads schema {SCHEMA}."
        )
    told = {key: header.pop(key, None) for key in ("operation", "hook_points")}
    known = {entry.name for entry in fields(Profile)} - {"scores"}
    known -= {"gate"} - set(header)
    if wrong := sorted(known ^ set(header)):  # a default in its place would steer otherwise
        what = "unknown" if wrong[0] in header else "missing"
        raise MoesteerError(f"{path}: {wrong[0]} is {what} in the header; write the profile anew.")
    header["directions"] = _with_vectors(path, header["directions"], arrays)
    header["gate"] = _gate(path, header.get("gate"), arrays)
    candidates = header.pop("candidates")
    try:
        profile = TypeAdapter(Profile).validate_json(json.dumps(header), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MoesteerError(f"{path}: {where}: {first['msg']}.") from None
    except MoesteerError as error:
        raise MoesteerError(f"{path}: {error}") from None
    for key, value in _does(profile).items():
        if told[key] != value:
            raise MoesteerError(f"{path}: {key} is {told[key]!r}, but the file holds {value!r}.")
    table = {key: array for key, array in arrays.items() if "." not in key}
    return replace(
        profile,
        scores=_scores(path, profile, table),
        candidates=_candidates(path, profile, candidates, arrays),
        name=path.name,
    )


def _arrays_of(experts: list[dict], layers: list[dict]) -> dict[str, np.ndarray]:
    """Arrays [layer, expert] from a list of experts with their scores."""
    rows = {shape["layer"]: row for row, shape in enumerate(layers)}
    table = np.zeros((len(rows), max(shape["experts"] for shape in layers)))
    arrays = {entry.name: table.copy() for entry in fields(Scores)}
    for expert in experts:
        for key, array in arrays.items():
            array[rows[expert["layer"]], expert["expert"]] = expert[key]
    return arrays


def _scores(path: Path, profile: Profile, arrays: Mapping[str, np.ndarray]) -> Scores | None:
    if not arrays:
        return None
    expected = [entry.name for entry in fields(Scores)]
    if set(arrays) != set(expected):
        raise MoesteerError(
            f"{path} holds tensors {', '.join(sorted(arrays))}; expected {', '.join(expected)}."
        )
    if profile.model is None:
        raise MoesteerError(f"{path} has scores but does not say of which model.")
    shape = (len(profile.model.layers), max((s.experts for s in profile.model.layers), default=0))
    for key, array in arrays.items():
        if array.shape != shape:
            raise MoesteerError(
                f"{path}: {key} has shape {array.shape}, but the model in the header has"
                f" {shape[0]} routed layers of {shape[1]} experts."
            )
        if not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0]
            layer = profile.model.layers[row].layer
            raise MoesteerError(
                f"{path}: {key} of expert ({layer}, {column}) is {array[row, column]}; it must be"
                " a finite number."
            )
    return Scores(**{key: np.asarray(array, dtype=np.float64) for key, array in arrays.items()})


def _with_vectors(path: Path, told: object, arrays: Mapping[str, np.ndarray]) -> list[dict]:
    """The header's directions, each with its vector, checked against the norm that is told."""
    if not isinstance(told, list) or not all(isinstance(one, dict) for one in told):
        raise MoesteerError(f"{path}: directions is no list of objects.")
    found = []
    for number, one in enumerate(told):
        vector = arrays.get(f"directions.{number}")
        if vector is None or vector.ndim != 1:
            raise MoesteerError(f"{path} lacks the vector of direction {number}.")
        norm, _sign = one.pop("norm", None), one.pop("sign", None)
        if wrong := sorted((DIRECTION_KEYS - {"vector"}) ^ set(one)):
            what = "unknown" if wrong[0] in one else "missing"
            raise MoesteerError(
                f"{path}: {wrong[0]} of direction {number} is {what}; write the profile anew."
            )
        if np.isfinite(vector).all() and not (
            isinstance(norm, float) and abs(norm - np.linalg.norm(vector)) <= 1e-6 * norm
        ):
            raise MoesteerError(
                f"{path}: direction {number} has norm {np.linalg.norm(vector):.6g}, but the header"
                f" says {norm}."
            )
        found.append({**one, "vector": vector.tolist()})
    return found


def _gate(path: Path, told: object, arrays: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The header's gate with its numbers, in the form of `Gate`; None where there is none."""
    numbers = arrays.get(GATE_NUMBERS)
    if told is None:
        if numbers is not None:  # without its header, every request would be steered
            raise MoesteerError(
                f"{path} has {GATE_NUMBERS}, but its header says nothing of a gate."
            )
        return None
    keys = GATE_KEYS.get(str(told.get("kind"))) if isinstance(told, dict) else None
    if not isinstance(told, dict) or keys is None:
        raise MoesteerError(f"{path}: gate is of none of the kinds {' and '.join(GATE_KEYS)}.")
    if numbers is None or numbers.ndim != 1:
        raise MoesteerError(f"{path} lacks the tensor {GATE_NUMBERS} of its gate.")
    if wrong := sorted((keys | {"kind", "threshold", "evidence"}) ^ set(told)):
        what = "unknown" if wrong[0] in told else "missing"
        raise MoesteerError(f"{path}: {wrong[0]} of gate is {what}; write the profile anew.")
    if not np.isfinite(numbers).all():
        raise MoesteerError(f"{path}: {GATE_NUMBERS} holds NaN or infinite values.")
    name = "weights" if told["kind"] == "routing" else "vector"
    probe = {key: told[key] for key in keys} | {name: numbers.tolist()}
    return {"probe": probe, "threshold": told["threshold"], "evidence": told["evidence"]}


WHERE = ("layer", "position", "expert")
"""Whole numbers that say where a candidate was read, and whose it is."""


def _candidates(
    path: Path, profile: Profile, told: Any, arrays: Mapping[str, np.ndarray]
) -> Candidates | None:
    if told is None:
        return None
    scores = {
        key.removeprefix("candidates.scores."): array
        for key, array in arrays.items()
        if key.startswith("candidates.scores.")
    }
    try:
        found = {name: arrays[f"candidates.{name}"] for name in (*WHERE, "vector")}
    except KeyError as error:
        raise MoesteerError(f"{path} lacks the tensor {error}.") from None
    if told not in get_args(Kind):
        raise MoesteerError(f"{path}: candidates is {told!r}; it is one of {get_args(Kind)}.")
    shapes = {name: array.shape for name, array in (found | scores).items()}
    rows = {shape[0] for shape in shapes.values() if shape}
    dimensions = {name: 1 + (name == "vector") for name in shapes}
    if len(rows) != 1 or any(len(shapes[name]) != n for name, n in dimensions.items()):
        raise MoesteerError(f"{path}: its candidates ({told}) have tensors of unequal shapes.")
    for name, array in (found | scores).items():
        if not np.isfinite(array).all():
            number = int(np.argwhere(~np.isfinite(array))[0][0])
            raise MoesteerError(f"{path}: {name} of candidate {number} holds NaN or infinity.")
    for name in WHERE:
        if found[name].dtype.kind != "i":
            raise MoesteerError(
                f"{path}: {name} of its candidates is of {found[name].dtype}, not whole numbers."
            )
    candidates = Candidates(told, **found, scores=scores)
    _check_candidates(path, candidates, profile.model)
    return candidates


def _check_candidates(path: Path, candidates: Candidates, model: ModelFacts | None) -> None:
    """Refuse candidates of layers, experts or a width that the model does not have."""
    if model is None:
        raise MoesteerError(f"{path} has candidates but does not say of which model.")
    width = candidates.vector.shape[1]
    if model.hidden and width != model.hidden:
        raise MoesteerError(
            f"{path}: its candidates have {width} numbers, but the hidden states of {model.id}"
            f" have {model.hidden}."
        )
    experts = {shape.layer: shape.experts for shape in model.layers}
    places = zip(*(getattr(candidates, name).tolist() for name in WHERE), strict=True)
    for number, (layer, position, expert) in enumerate(places):
        of_stream = candidates.kind == "residual"
        if (
            not 0 <= layer < (model.decoder_layers or layer + 1)
            or position > 0
            or (expert != -1 if of_stream else not 0 <= expert < experts.get(layer, 0))
        ):
            raise MoesteerError(
                f"{path}: candidate {number} ({candidates.kind}) is of layer {layer}, position"
                f" {position}, expert {expert}; {model.id} has none such."
            )


SIGN = "a positive coefficient steers towards a: mean of side a less mean of side b"


def _does(profile: Profile) -> dict[str, object]:
    """What a profile does, and where: stated in the file, because a file that is applied at another
    place is silently wrong."""
    sites = dict.fromkeys(site for d in profile.directions for site in d.sites)
    operations = sorted({f"{d.operation} directions" for d in profile.directions})
    routing = bool(profile.steered_layers) or not profile.directions
    return {
        "operation": " and ".join([*["steer experts"] * routing, *operations]),
        "hook_points": [
            *["router logits"] * routing,
            *(f"{place} of layer {layer}" for layer, place in sorted(sites)),
        ],
    }


def _as_json(profile: Profile) -> dict:
    header = asdict(replace(profile, scores=None, candidates=None, directions=(), gate=None))
    del header["scores"], header["gate"]
    if profile.gate is not None:
        gate = profile.gate
        probe = {key: getattr(gate.probe, key) for key in sorted(GATE_KEYS[gate.kind])}
        evidence = None if gate.evidence is None else asdict(gate.evidence)
        header["gate"] = {
            "kind": gate.kind,
            **probe,
            "threshold": gate.threshold,
            "evidence": evidence,
        }
    header["directions"] = [
        {
            "sites": direction.sites,
            "operation": direction.operation,
            "coefficient": direction.coefficient,
            "window": direction.window,
            "expert": direction.expert,
            "norm": direction.norm,
            "sign": SIGN,
        }
        for direction in profile.directions
    ]
    header["candidates"] = None if profile.candidates is None else profile.candidates.kind
    return {**_does(profile), **header}


def _arrays(profile: Profile) -> dict[str, np.ndarray]:
    """Every tensor of the file, by name."""
    arrays = dict(vars(profile.scores)) if profile.scores is not None else {}
    for number, direction in enumerate(profile.directions):
        arrays[f"directions.{number}"] = np.array(direction.vector)
    if profile.candidates is not None:
        for name, value in vars(profile.candidates).items():
            if isinstance(value, np.ndarray):
                arrays[f"candidates.{name}"] = value
        for name, value in profile.candidates.scores.items():
            arrays[f"candidates.scores.{name}"] = value
    if profile.gate is not None:
        arrays[GATE_NUMBERS] = np.array(_numbers(profile.gate), dtype=np.float64)
    return {key: np.ascontiguousarray(array) for key, array in arrays.items()}


def _numbers(gate: Gate) -> tuple[float, ...]:
    probe = gate.probe
    return probe.weights if isinstance(probe, RoutingProbe) else probe.vector

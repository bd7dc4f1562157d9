"""Directions as a control vector for llama.cpp: a GGUF file with one tensor a layer.

llama.cpp adds `direction.N` to what block N (from 0) puts out, at every token, and knows no vector
for block 0: `llama_adapter_cvec::init` and `apply_to` in its src/llama-adapter.cpp, the names in
`common_control_vector_load` in common/common.cpp (github.com/ggml-org/llama.cpp, pull request
5970). What enters our layer l is what block l − 1 puts out, so an addition there is
`direction.(l − 1)`, from l = 2 on. Nothing else that a profile does is an addition to a block's
output; it is refused, because a file that does something else than its profile is silently wrong.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moesteer.direction import Direction
from moesteer.errors import MoesteerError
from moesteer.files import write_atomically
from moesteer.profile import Profile
from moesteer.profile_fit import check_ungated

LLAMA_CPP_NAMES = {
    "mixtral": "llama",
    "mistral": "llama",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
"""Model types of transformers that llama.cpp calls quite differently."""


def export_gguf(profile: Profile, path: str | Path) -> list[int]:
    """Write a profile's directions as a control vector; the N of its tensors `direction.N`.

    Coefficients are multiplied in and directions of one layer added up, in fp64, then fp32: to be
    used with scale 1. MoesteerError where the profile does anything that llama.cpp would not do, or
    does not say of which model it is.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise MoesteerError(
            'the package `gguf` is missing: pip install "moesteer[gguf]"'
        ) from error

    vectors = control_vectors(profile)
    model = profile.model
    if model is None or not model.decoder_layers:
        raise MoesteerError(
            f"{profile.name} does not say how many layers its model has; export a profile"
            " that was made on the model (moesteer direction, moesteer aim)."
        )

    def write(file: Path) -> None:
        writer = GGUFWriter(file, "controlvector")
        writer.add_string("controlvector.model_hint", llama_cpp_name(model.model_type))
        writer.add_int32("controlvector.layer_count", model.decoder_layers - 1)
        for number, vector in vectors.items():
            writer.add_tensor(f"direction.{number}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(Path(path), write)
    return list(vectors)


def control_vectors(profile: Profile) -> dict[int, np.ndarray]:
    """What to add [hidden] to the outputs of llama.cpp's blocks, by their numbers, ascending."""
    check_ungated(profile, "a control vector of llama.cpp")
    if profile.steered_layers:
        raise MoesteerError(
            f"{profile.name} steers routers, which no control vector can; only added directions"
            " can be exported."
        )
    if not profile.directions:
        raise MoesteerError(f"{profile.name} holds no directions; there is nothing to export.")
    sums: dict[int, np.ndarray] = {}
    for number, direction in enumerate(profile.directions):
        for reason in _hindrances(direction):
            raise MoesteerError(
                f"{profile.name}: direction {number} ({direction.words}) {reason}, but llama.cpp"
                " only adds to what enters a layer, from layer 2 on, at all tokens."
            )
        vector = direction.coefficient * np.array(direction.vector, dtype=np.float64)
        for layer, _ in direction.sites:
            sums[layer - 1] = sums.get(layer - 1, 0) + vector
    return {block: np.asarray(sums[block], dtype=np.float32) for block in sorted(sums)}


def _hindrances(direction: Direction) -> Iterator[str]:
    """Why a direction is none of llama.cpp's."""
    if direction.operation != "add":
        yield "is ablated"
    if direction.expert is not None:
        yield f"is weighted by the router's probability of expert {direction.expert}"
    if direction.window != "all":
        yield f"is used on the tokens of the {direction.window} alone"
    for layer, place in direction.sites:
        if place != "input":
            yield f"is used at the {place} of layer {layer}"
        elif layer < 2:
            yield f"is used at what enters layer {layer}"


def llama_cpp_name(model_type: str) -> str:
    """llama.cpp's name of an architecture; the model type itself where it has none like it.

    A hint for the reader of the file: llama.cpp loads it for any model of the same width.
    """
    from gguf import MODEL_ARCH_NAMES

    def bare(name: str) -> str:
        return re.sub(r"[-_]", "", name).lower()

    known = {bare(name): name for name in MODEL_ARCH_NAMES.values()}
    return LLAMA_CPP_NAMES.get(model_type) or known.get(bare(model_type), model_type)

"""Any direction of a file, put to any use: what becomes of it, and what is refused."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from moesteer.detection.selecting import select_experts
from moesteer.direction import Candidates
from moesteer.directions.aiming import Aim, aimed, find_candidates
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Profile, Scores

MODEL = ModelFacts(
    *("m", None, "t", "c", "h", "f"),
    layers=(LayerShape(1, 4, 2), LayerShape(2, 4, 2)),
    decoder_layers=3,
    hidden=5,
)


def profile(kind: str, experts: tuple[int, ...]) -> Profile:
    """A direction for layers 1 and 2, positions −2 and −1, and each expert; 1 and 3 are kept."""
    places = list(product((1, 2), (-2, -1), experts))
    layer, position, expert = (np.array(column) for column in zip(*places, strict=True))
    vector = np.arange(len(places) * 5, dtype=np.float32).reshape(-1, 5) + 1
    kept = np.isin(expert, (1, 3)) & (layer == 2)
    return Profile(
        model=MODEL,
        candidates=Candidates(
            kind,  # pyright: ignore
            *(layer, position, expert, vector),
            {"kept": kept.astype(float)},
        ),
        name="p",
    )


STREAM, EXPERTS = profile("residual", (-1,)), profile("forced", (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("aim", "sites", "toward"),
    [
        (Aim(), ((2, "input"),), "a"),
        (Aim(coefficient=-2), ((2, "input"),), "b"),
        (Aim(place="attention"), ((2, "attention"),), "a"),
        (Aim(place="mlp", window="prompt"), ((2, "mlp"),), "a"),
        (Aim("ablate"), tuple(product(range(3), ("input", "attention", "mlp"))), "b"),
        (Aim("ablate", place="attention"), tuple((n, "attention") for n in range(3)), "b"),
        (Aim("ablate", window="generation", place="mlp"), tuple((n, "mlp") for n in range(3)), "b"),
    ],
)
def test_uses_of_a_direction_of_the_stream(aim: Aim, sites: tuple, toward: str):
    (number,) = find_candidates(STREAM, 2, -2, [])
    steering = aimed(STREAM, [number], aim)
    (direction,) = steering.directions
    assert steering.candidates is STREAM.candidates
    assert direction.vector == tuple(STREAM.candidates.vector[number])  # pyright: ignore
    assert direction.sites == sites
    assert direction.window == aim.window
    assert (direction.operation, direction.coefficient) == (aim.operation, aim.coefficient)
    assert direction.expert is None
    assert steering.toward == toward


def test_experts_are_used_at_their_output():
    numbers = find_candidates(EXPERTS, 2, -1, [3, 0])
    steering = aimed(EXPERTS, numbers, Aim(coefficient=4))
    assert [d.expert for d in steering.directions] == [3, 0]
    assert {d.sites for d in steering.directions} == {((2, "mlp"),)}
    assert aimed(EXPERTS, numbers, Aim("ablate")).directions[0].operation == "ablate"


def test_without_experts_the_kept_ones():
    numbers = find_candidates(EXPERTS, 2, -1, [])
    assert [d.expert for d in aimed(EXPERTS, numbers, Aim()).directions] == [1, 3]
    with pytest.raises(MoesteerError, match=r"of layer 1 no expert's routing .* --expert"):
        find_candidates(EXPERTS, 1, -1, [])


@pytest.mark.parametrize(
    ("which", "where", "message"),
    [
        (STREAM, (0, -1, []), r"no direction of layer 0, position -1; .* layers \[1, 2\]"),
        (STREAM, (1, -3, []), r"position -3; .* positions \[-2, -1\]"),
        (STREAM, (1, -1, [0]), "belong to no expert; leave out --expert"),
        (EXPERTS, (1, -1, [4]), "no direction of layer 1, position -1 of expert 4"),
        (EXPERTS, (1, -1, [2, 0, 2]), "expert 2 twice"),
        (EXPERTS, (0, -1, []), "no direction of layer 0"),
        (replace(STREAM, candidates=None), (1, -1, []), "p holds no directions to choose from"),
    ],
)
def test_what_is_not_there(which: Profile, where: tuple[int, int, list[int]], message: str):
    with pytest.raises(MoesteerError, match=message):
        find_candidates(which, *where)


@pytest.mark.parametrize(
    ("operation", "coefficient", "message"),
    [
        ("add", 0.0, "coefficient is 0"),
        ("add", float("nan"), "coefficient is nan"),
        ("ablate", 2.0, "ablation has none"),
        ("remove", 1.0, "operation is 'remove'"),
    ],
)
def test_uses_that_make_no_sense(operation: str, coefficient: float, message: str):
    with pytest.raises(MoesteerError, match=message):
        Aim(operation, coefficient)  # pyright: ignore


def test_an_expert_has_one_place():
    assert aimed(EXPERTS, [0], Aim(place="mlp")).directions[0].sites == ((1, "mlp"),)
    with pytest.raises(MoesteerError, match="leave out --place attention"):
        aimed(EXPERTS, [0], Aim(place="attention"))


def test_experts_and_a_direction_steer_to_one_side():
    """What would pull both ways is refused, whichever comes first."""
    side_b = replace(STREAM, activated=((1, 0),), toward="b", name="p")
    (number,) = find_candidates(side_b, 2, -1, [])
    assert aimed(side_b, [number], Aim(coefficient=-1)).toward == "b"
    with pytest.raises(MoesteerError, match=r"experts towards b.* can't be aimed towards a"):
        aimed(side_b, [number], Aim())
    scores = Scores(*(np.arange(8.0, 0, -1).reshape(2, 4) for _ in range(7)))
    towards_a = replace(aimed(STREAM, [number], Aim()), scores=scores)
    assert select_experts(towards_a, activate=1, deactivate=0, toward="a").steered_layers == (1,)
    with pytest.raises(MoesteerError, match=r"steers towards a.* can't be selected towards b"):
        select_experts(towards_a, activate=1, deactivate=0, toward="b")

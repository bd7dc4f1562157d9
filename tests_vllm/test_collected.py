"""What workers counted, put together, and when it proves nothing."""

import pytest

from moesteer.direction import Direction
from moesteer.engines.evidence import DirectionEvidence, LayerEvidence, check_fired
from moesteer.engines.vllm.collected import Move, evidence_of, merged, plus
from moesteer.errors import DidNotFire
from moesteer.profile import Profile

PROFILE = Profile(activated=((1, 0),), deactivated=((2, 1),), name="mine")


def worker(**layers: list[int]) -> dict:
    selected = {int(layer.removeprefix("layer")): counts for layer, counts in layers.items()}
    return {"key": {"tokens": 5, "selected": selected, "directed": []}}


def test_workers_of_a_pipeline_have_different_layers() -> None:
    found = merged([worker(layer1=[5, 3, 2]), worker(layer2=[4, 0, 6])], "key")
    assert found == (5, {1: [5, 3, 2], 2: [4, 0, 6]}, {})
    evidence = evidence_of(PROFILE, *found)
    assert evidence == [
        LayerEvidence("mine", 1, 5, {0: 5}, {}),
        LayerEvidence("mine", 2, 5, {}, {1: 0}),
    ]
    check_fired(PROFILE, evidence)


def test_workers_of_a_tensor_parallel_group_count_the_same_tokens_once() -> None:
    one = worker(layer1=[5, 3, 2], layer2=[4, 0, 6])
    assert merged([one, one], "key") == merged([one], "key")


@pytest.mark.parametrize(
    ("workers", "where"),
    [
        ([], "layer 1: no token"),  # nobody counted
        ([worker(layer1=[5, 3, 2])], "layer 2: no token"),  # a layer is missing
        ([worker(layer1=[5, 3, 2], layer2=[0, 0, 0])], "layer 2: no token"),  # nothing recorded
        ([worker(layer1=[4, 4, 2], layer2=[4, 0, 6])], "expert 0 was selected by 4 of 5"),
        ([worker(layer1=[5, 3, 2], layer2=[4, 1, 5])], "expert 1 was still selected by 1 of 5"),
    ],
)
def test_what_does_not_prove_that_it_fired(workers: list[dict], where: str) -> None:
    with pytest.raises(DidNotFire, match=where):
        check_fired(PROFILE, evidence_of(PROFILE, *merged(workers, "key")))


# -- directions ----------------------------------------------------------------------------------

DIRECTED = Profile(
    directions=(
        Direction((0.0, 2.0), ((0, "mlp"), (1, "mlp")), coefficient=-1.0),
        Direction((1.0, 0.0), ((1, "input"),), "ablate"),
        Direction((3.0, 4.0), ((1, "mlp"),), expert=2),
    ),
    name="mine",
)
LOWER = [[0, 0, "mlp", 5, 9.9, 10.0, 0.5, 0.0, 0.02]]
UPPER = [
    [0, 1, "mlp", 5, 10.0, 10.0, 0.0, 0.0, 0.02],
    [1, 1, "input", 5, 0.0, 0.0, 0.0, 0.001, 0.02],
    [2, 1, "mlp", 5, 4.9, 5.0, 0.0, 0.0, 0.02],
]


def moved(*told: list) -> dict:
    return {"key": {"tokens": 5, "selected": {}, "directed": list(told)}}


def test_each_site_of_a_direction_is_its_own_evidence() -> None:
    found = evidence_of(DIRECTED, *merged([moved(*LOWER), moved(*UPPER)], "key"))
    assert found == [
        DirectionEvidence("mine", 0, "mlp", None, "add", 5, 9.9 / 5, 2.0, 0.1),
        DirectionEvidence("mine", 1, "mlp", None, "add", 5, 2.0, 2.0),
        DirectionEvidence("mine", 1, "input", None, "ablate", 5, 0.001, 0.0, number=1),
        DirectionEvidence("mine", 1, "mlp", 2, "add", 5, 4.9 / 5, 1.0, number=2),
    ]
    check_fired(DIRECTED, found)


def test_moves_of_several_requests_are_added_up_and_the_largest_share_is_kept() -> None:
    one = {(0, 1, "mlp"): Move(2, 1.0, 1.5, 0.25), (1, 1, "input"): Move(2, left=0.3)}
    other = {(1, 1, "input"): Move(3, left=0.1), (2, 1, "mlp"): Move(1, 4.0, 4.0)}
    assert plus(one, other) == {
        (0, 1, "mlp"): Move(2, 1.0, 1.5, 0.25),
        (1, 1, "input"): Move(5, left=0.3),
        (2, 1, "mlp"): Move(1, 4.0, 4.0),
    }


@pytest.mark.parametrize(
    ("lower", "upper", "where"),
    [
        ([], UPPER, "mlp of layer 0: no token of its window"),
        (LOWER, UPPER[:1] + UPPER[2:], "input of layer 1: no token of its window"),
        ([[0, 0, "mlp", 5, 0.0, 10.0, 0.0, 0.0, 0.02]], UPPER, "moved by 0 along it, not by 2"),
        (
            LOWER,
            [UPPER[0], [1, 1, "input", 5, 0.0, 0.0, 0.0, 0.3, 0.02], UPPER[2]],
            r"up to 30\.00%",
        ),
        (
            LOWER,
            [*UPPER[:2], [2, 1, "mlp", 5, 9.0, 5.0, 0.0, 0.0, 0.02]],
            r"layer 1 \(expert 2\): tokens",
        ),
    ],
)
def test_what_does_not_prove_that_directions_fired(lower: list, upper: list, where: str) -> None:
    found = evidence_of(DIRECTED, *merged([moved(*lower), moved(*upper)], "key"))
    with pytest.raises(DidNotFire, match=where):
        check_fired(DIRECTED, found)

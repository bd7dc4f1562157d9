"""What workers counted, put together, and when it proves nothing."""

import pytest

from moesteer.engines.evidence import check_fired
from moesteer.engines.vllm.collected import evidence_of, merged
from moesteer.errors import DidNotFire
from moesteer.profile import Profile

PROFILE = Profile(activated=((1, 0),), deactivated=((2, 1),), name="mine")


def worker(**layers: list[int]) -> dict:
    selected = {int(layer.removeprefix("layer")): counts for layer, counts in layers.items()}
    return {"key": {"tokens": 5, "selected": selected}}


def test_workers_of_a_pipeline_have_different_layers() -> None:
    tokens, counts = merged([worker(layer1=[5, 3, 2]), worker(layer2=[4, 0, 6])], "key")
    assert (tokens, counts) == (5, {1: [5, 3, 2], 2: [4, 0, 6]})
    evidence = evidence_of(PROFILE, tokens, counts)
    assert [(e.layer, e.tokens, e.activated, e.deactivated) for e in evidence] == [
        (1, 5, {0: 5}, {}),
        (2, 5, {}, {1: 0}),
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

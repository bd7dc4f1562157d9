"""A model split over processes: tensor parallelism and expert parallelism of transformers.

Each process holds a share of the weights and runs the same calls on the same tokens. Tensor
parallelism cuts every matrix; expert parallelism gives each process whole experts, and cuts the
matrices of attention. Either way the router is whole in every process, and the experts are called
with the numbers of all experts before anything is cut, so that routing is read and rewritten as in
one process. (transformers up to 5.19 cut the selection at the router instead: there the self-test
finds experts that don't obey, and the model is refused.)
"""

import os
from typing import Literal

from transformers import PreTrainedModel

from moesteer.engines.transformers.routers import describe
from moesteer.errors import MoesteerError

Split = Literal["tensor", "expert"]


def processes_of(model: PreTrainedModel) -> int:
    """Over how many processes a model is split."""
    return getattr(model, "_tp_size", None) or 1


def check_whole(model: PreTrainedModel, what: str) -> None:
    """MoesteerError where the model is split and `what` needs it whole."""
    if (processes := processes_of(model)) > 1:
        raise MoesteerError(
            f"{describe(model)} is split over {processes} processes, and {what} need a model in one"
            " process; spread it over devices instead (--device auto)."
        )


def distributed_config(split: Split) -> object:
    """What `from_pretrained` is told in each process; MoesteerError outside of a group of them."""
    from transformers.distributed.configuration_utils import DistributedConfig

    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number < 2:
        raise MoesteerError(
            "a model is split over several processes, and this is the only one: start your script"
            " with torchrun --nproc-per-node N, or a command with --tensor-parallel N."
        )
    return DistributedConfig(tp_size=number, ep_size=number if split == "expert" else 1)

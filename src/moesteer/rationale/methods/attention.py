"""Attention: what the token that decides looks at.

Three readings of attention weights, means over heads, each a share for every token, which sum to 1:

* last: what the deciding token attends to in the last layer;
* mean: the same, the mean over layers;
* rollout: attention mixes tokens in every layer, so what is looked at above is a mixture of what
  was looked at below. With half of each token staying its own by the residual connection,

      Ã_l = ½ A_l + ½ I,      rollout = last row of  Ã_L · … · Ã_1

  (Abnar and Zuidema 2020, arXiv 2005.00928).

Attention says where a model looks, not whether what it sees there decides (Jain and Wallace 2019,
arXiv 1902.10186).
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from torch import Tensor


def last(maps: 'Float[Tensor, "layer token token"]') -> Float[np.ndarray, " token"]:
    """The last token's row in the last layer."""
    return maps[-1, -1].numpy()


def mean(maps: 'Float[Tensor, "layer token token"]') -> Float[np.ndarray, " token"]:
    """The last token's row, the mean over layers."""
    return maps[:, -1].mean(0).numpy()


def rollout(maps: 'Float[Tensor, "layer token token"]') -> Float[np.ndarray, " token"]:
    """The last token's row of the product of all layers; only that row is computed, from above."""
    row = maps.new_zeros(maps.shape[-1])
    row[-1] = 1
    for layer in maps.flip(0):
        row = (row @ layer + row) / 2
    return row.numpy()

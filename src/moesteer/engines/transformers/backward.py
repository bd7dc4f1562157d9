"""What every backward pass through a model needs: weights that take no part, layers run again."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moesteer.engines.transformers.routers import replace_forward


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """No weight takes part in gradients meanwhile.

    One that is offloaded, and was put back in inference mode, can't be marked again and stays out.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            if not weight.is_inference():
                weight.requires_grad_(True)


@contextmanager
def checkpointed(decoder: Sequence[nn.Module], *, drops_out: bool = False) -> Iterator[None]:
    """Each decoder layer keeps only what enters it, and runs again in the backward pass.

    Chen et al. 2016 (arXiv 1604.06174). `drops_out`: layers may draw random numbers, and draw the
    same again. Not by transformers' own switch, which asks for layers in training mode: dropout of
    a layer's own would come on with it.
    """
    with ExitStack() as stack:
        # A layer that runs again runs to its end, so that hooks in it see each token twice.
        stack.enter_context(set_checkpoint_early_stop(False))
        for module in decoder:
            again = partial(_again, module.forward, drops_out)
            stack.callback(replace_forward(module, again))
        yield


def _again(forward: Any, drops_out: bool, *args: Any, **kwargs: Any) -> Any:
    run = partial(forward, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=drops_out)

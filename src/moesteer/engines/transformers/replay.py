"""Lower layers computed once: what a profile does not reach need not be run again.

Steering in layer l leaves the layers below it as they are. So the unsteered decoder runs once, the
hidden states that enter layer l are kept, and every run under a profile whose lowest layer is l
begins there: the layers below hand on what they get, and layer l gets what was kept.

Some architectures carry more from layer to layer than hidden states (residual streams, shared keys
and values, summaries of blocks). Whether layer l can be entered so is tried out on dummy tokens,
once; where it can't, the full model runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesteer.engines.transformers.routers import MoELayer, dummy_tokens, replace_forward
from moesteer.engines.transformers.stream import find_decoder


class Replay:
    """The decoder layers of a model, and which of them can be entered from kept states."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoELayer]) -> None:
        self._model = model
        self._decoder: Sequence[nn.Module] = find_decoder(model, layers)
        self._saves: dict[int, bool] = {}

    def saves(self, start: int) -> bool:
        """Whether layers below `start` need not be run again."""
        if start not in self._saves:
            self._saves[start] = start > 0 and self._is_exact(start)
        return self._saves[start]

    @contextmanager
    def keep(self, starts: set[int]) -> Iterator[Mapping[int, Tensor]]:
        """Collect what enters the layers `starts` in a forward pass, [row, position, …]."""
        kept: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for start in starts:

                def see(_module: object, args: tuple, kwargs: dict, start: int = start) -> None:
                    kept[start] = _hidden(args, kwargs)

                hook = self._decoder[start].register_forward_pre_hook(see, with_kwargs=True)
                stack.callback(hook.remove)
            yield kept

    @contextmanager
    def put(self, start: int, hidden: Tensor | None, copies: int) -> Iterator[None]:
        """Enter layer `start` with the kept states, `copies` times over; None: run all layers."""
        if hidden is None:
            yield
            return
        repeated = hidden.repeat(copies, *[1] * (hidden.dim() - 1))

        def enter(_module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (repeated, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": repeated}

        with ExitStack() as stack:
            for module in self._decoder[:start]:
                stack.callback(replace_forward(module, lambda *args, **kw: _hidden(args, kw)))
            hook = self._decoder[start].register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(hook.remove)
            yield

    @torch.inference_mode()
    def _is_exact(self, start: int) -> bool:
        """Whether entering at `start` gives what the full model gives, which may vary on a GPU."""
        ids = dummy_tokens(self._model, 24).view(2, 12)
        with self.keep({start}) as kept, self._handed_on(start) as handed_on:
            full = self._logits(ids)
        if start not in kept or not all(isinstance(output, Tensor) for output in handed_on):
            return False
        try:
            with self.put(start, kept[start], 1):
                entered = self._logits(ids)
        except Exception:  # whatever a layer says that misses what lower ones hand it
            return False
        varies = (self._logits(ids) - full).abs().max()
        return bool((entered - full).abs().max() <= 4 * varies)

    @contextmanager
    def _handed_on(self, start: int) -> Iterator[list[object]]:
        """Collect what the layers below `start` return."""
        outputs: list[object] = []
        with ExitStack() as stack:
            for module in self._decoder[:start]:
                hook = module.register_forward_hook(lambda _m, _args, out: outputs.append(out))
                stack.callback(hook.remove)
            yield outputs

    def _logits(self, ids: Tensor) -> Tensor:
        attention = torch.ones_like(ids)
        output = self._model(input_ids=ids, attention_mask=attention, use_cache=False)
        return output.logits.float()


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states among a decoder layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]

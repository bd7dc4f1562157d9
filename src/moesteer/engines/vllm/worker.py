"""What the plugin adds to vLLM's workers: the rows, and the calls by which frontends reach them.

Called through vLLM's `collective_rpc` by name; each worker answers for its own layers.
"""

from typing import Any

from moesteer.engines.vllm.attach import attach, is_static
from moesteer.engines.vllm.directions import room_for
from moesteer.engines.vllm.payload import payload_of
from moesteer.engines.vllm.settings import settings_of
from moesteer.errors import MoesteerError
from moesteer.profile import Profile


def after_load(worker: Any, missing: list[str]) -> None:
    """Put the worker's model under the seam; `missing` are parts of vLLM that were not found."""
    settings = settings_of(worker.vllm_config)
    profiles = [Profile.load(path) for path in settings.profiles.values()]
    worker.moesteer_rows, worker.moesteer_refused = None, None
    try:
        if missing:
            raise MoesteerError(
                f"this vLLM has no {', '.join(missing)}; see the versions that moesteer supports."
            )
        runner = worker.model_runner
        room = max(settings.directions, room_for(profiles))
        worker.moesteer_rows = attach(runner.get_model(), worker.vllm_config, runner.device, room)
        runner.moesteer_rows = worker.moesteer_rows
    except MoesteerError as refusal:
        if settings.explicit:
            raise MoesteerError(f"this engine can't be steered: {refusal}") from None
        worker.moesteer_refused = str(refusal)
        return
    except Exception as error:  # a model of a kind never seen: who asked for nothing still runs it
        if settings.explicit:
            raise
        worker.moesteer_refused = f"its layers can't be read ({type(error).__name__}: {error})."
        return
    for profile in profiles:
        worker.moesteer_rows.load(payload_of(profile))


class WorkerCalls:
    """Methods of every worker; `self` is vLLM's."""

    moesteer_rows: Any
    moesteer_refused: str | None
    vllm_config: Any

    def moesteer_describe(self) -> dict[str, Any]:
        """Why this worker can't be steered, if so, and its layers as [layer, experts, k]."""
        shapes = [] if self.moesteer_rows is None else self.moesteer_rows.layers
        return {
            "refused": self.moesteer_refused,
            "layers": [[shape.layer, shape.experts, shape.top_k] for shape in shapes],
            "static": is_static(self.vllm_config),
        }

    def moesteer_load(self, payload: dict[str, Any]) -> str | None:
        """Know a profile from now on; the reason where that can't be."""
        if self.moesteer_rows is None:
            return self.moesteer_refused
        try:
            self.moesteer_rows.load(payload)
        except MoesteerError as refused:
            return str(refused)
        return None

    def moesteer_collect(self, keys: list[str]) -> dict[str, dict[str, Any]]:
        """What was counted under each key: see `Rows.collect`."""
        return {} if self.moesteer_rows is None else self.moesteer_rows.collect(keys)

    def moesteer_log_probabilities(self, asked: list[tuple[str, int, int]]) -> list[float] | None:
        """log P of each (key, position, token): see `Readings`."""
        return self.moesteer_rows.readings.log_probabilities(asked)

    def moesteer_divergences(self, asked: list[tuple[str, str, int]]) -> list[float] | None:
        """KL of each (key, key, position): see `Readings`."""
        return self.moesteer_rows.readings.divergences(asked)

    def moesteer_drop(self, keys: list[str]) -> None:
        """Let go of what was kept for reading."""
        self.moesteer_rows.readings.drop(keys)

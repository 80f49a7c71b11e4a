"""What a scheduler of diffusers tells about the noise of its steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from tap_diffusion.timeline import Prediction, Timeline

_PREDICTIONS: dict[str, Prediction] = {
    "flow_prediction": "flow",
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
}


_RANDOM = ("LCM", "TCD", "Ancestral", "SDE", "DDPM")  # parts of the names of schedulers whose steps are random


def timeline(scheduler: Any, first: int) -> Timeline | None:
    """The noise from the step with index ``first`` on.

    Args:
        scheduler: after ``set_timesteps``.
        first: index into its timesteps, where a trajectory begins (image to image begins later than at 0).

    Returns:
        None where it can't be told, or does not fall from step to step (Heun evaluates twice at some noise). What is
        predicted is not told for schedulers that take random steps, or that scale the model's output (EDM).
    """
    timesteps = scheduler.timesteps
    sigmas = getattr(scheduler, "sigmas", None)
    products = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(sigmas, Tensor) and len(sigmas) >= len(timesteps):
        values = sigmas[first : len(timesteps)].double().tolist()
        if _is_flow(scheduler):
            values = [value / (1 - value) if value < 1 else float("inf") for value in values]
    elif isinstance(products, Tensor) and not timesteps.is_floating_point():
        kept = products[timesteps[first:].to(products.device)].double().tolist()
        values = [((1 - product) / product) ** 0.5 if product > 0 else float("inf") for product in kept]
    else:
        return None
    if not values or values[-1] <= 0 or not all(a > b for a, b in pairwise(values)):
        return None
    return Timeline(tuple(values), _prediction(scheduler))


def _is_flow(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas", False)


def _prediction(scheduler: Any) -> Prediction | None:
    config, name = scheduler.config, type(scheduler).__name__
    if (
        any(part in name for part in _RANDOM)
        or config.get("stochastic_sampling", False)
        or config.get("algorithm_type", "").startswith("sde")
        or hasattr(scheduler, "precondition_outputs")
    ):
        return None
    return "flow" if _is_flow(scheduler) else _PREDICTIONS.get(config.get("prediction_type", "epsilon"))

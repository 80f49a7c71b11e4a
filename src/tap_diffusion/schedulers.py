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


def timeline(scheduler: Any, first: int) -> Timeline | None:
    """The noise from the step with index ``first`` on.

    Args:
        scheduler: after ``set_timesteps``.
        first: index into its timesteps, where a trajectory begins (image to image begins later than at 0).

    Returns:
        None where it can't be told: for schedulers that evaluate twice at some noise (Heun), that scale the model's
        output themselves (EDM), or that keep their noise in a form of their own.
    """
    config = getattr(scheduler, "config", {})
    timesteps = scheduler.timesteps
    sigmas = getattr(scheduler, "sigmas", None)
    products = getattr(scheduler, "alphas_cumprod", None)
    prediction = _PREDICTIONS.get(config.get("prediction_type", "epsilon"))
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False):
        prediction = "flow"
    if prediction is None or hasattr(scheduler, "precondition_outputs"):
        return None
    if isinstance(sigmas, Tensor) and len(sigmas) >= len(timesteps):
        values = sigmas[first : len(timesteps)].double().tolist()
        if prediction == "flow":
            values = [value / (1 - value) if value < 1 else float("inf") for value in values]
    elif isinstance(products, Tensor) and not timesteps.is_floating_point():
        kept = products[timesteps[first:].to(products.device)].double().tolist()
        values = [((1 - product) / product) ** 0.5 if product > 0 else float("inf") for product in kept]
    else:
        return None
    if not values or values[-1] <= 0 or not all(a > b for a, b in pairwise(values)):
        return None
    return Timeline(tuple(values), prediction)

"""One method by its name, on pairs of one length; and what is recorded of it."""

from mi_pipe.attribution.atp import Attribution, PairTokens, atp
from mi_pipe.attribution.atp_star import atp_star
from mi_pipe.attribution.config import AttributionConfig
from mi_pipe.attribution.integrated import ig_activations, ig_inputs
from mi_pipe.attribution.nodes import Kind
from mi_pipe.attribution.recording import RunMetric
from mi_pipe.circuits.eap import ig_alphas
from mi_pipe.models.model import Model
from mi_pipe.patching.metrics import Direction
from mi_pipe.prompts.prompt_set import PairGroup


def pair_tokens(model: Model, group: PairGroup, direction: Direction) -> PairTokens:
    """Return base and donor prompts of some pairs on the model's device."""
    clean, corrupted = group.clean.to(model.device), group.corrupted.to(model.device)
    return PairTokens(corrupted, clean) if direction == "denoising" else PairTokens(clean, corrupted)


def attribute(
    model: Model, pairs: PairTokens, metric: RunMetric, kinds: list[Kind], config: AttributionConfig
) -> Attribution:
    """Attribute the metric to every node of these kinds by the method of the config."""
    if config.method == "atp":
        return atp(model, pairs, metric, kinds)
    if config.method in ("atp_star", "atp_qk_fix"):
        return atp_star(model, pairs, metric, kinds, grad_drop=config.method == "atp_star")
    alphas = ig_alphas(config.ig_steps, config.ig_convention)
    method = ig_inputs if config.method == "ig_inputs" else ig_activations
    return method(model, pairs, metric, kinds, alphas, config.direction)


def how_attributed(config: AttributionConfig) -> dict[str, str | int]:
    """Say what the values mean: method, direction, base run, steps, metric, aggregation."""
    is_ig = config.method.startswith("ig_")
    return {
        "method": config.method,
        "direction": config.direction,
        "base_run": "corrupted" if config.direction == "denoising" else "clean",
        "ablation": "patch: a node's value of the pair's other run",
        "metric": config.metric,
        "ig_steps": config.ig_steps if is_ig else 0,
        "ig_convention": config.ig_convention if is_ig else "",
        "values": "mean over dropped layers of absolute values (GradDrop)"
        if config.method == "atp_star"
        else "estimated change of the metric, patched minus base run",
        "aggregation": "none: one value a pair; tables give means over pairs",
    }

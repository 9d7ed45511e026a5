"""An SAE of SAELens' folder (cfg.json, sae_weights.safetensors), of version 6 or of the flat configs before it.

standard, topk, jumprelu (also what SAELens saves of BatchTopK and Matryoshka), gated, and the four transcoders. A TopK
SAE that selects by pre ‖W_dec,j‖ becomes one with decoder rows of norm 1, whose features are the same numbers as
SAELens'. Refused: activations that SAELens normalises as it runs (they are another function of x), features with signs
(abstopk), single heads, other architectures.

A flat config (before 6.0) is read by SAELens' own rules (sae_lens/loading/pretrained_sae_loaders.py,
handle_pre_6_0_config): the architecture is standard unless it or a TopK activation is named.
"""

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.export.sae_formats.equal_weights import unit_decoder_rows
from mi_pipe.export.sae_formats.folder import ForeignConfig, SAEFolder
from mi_pipe.export.sae_formats.hook_names import asked_sites, noted_sites
from mi_pipe.export.sae_formats.to_saelens import MATRYOSHKA
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites

_SAES = ("standard", "topk", "jumprelu", "gated")
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_REFUSED = {
    "abstopk": "its features have signs, and a feature here is never below 0",
    "temporal": "it reads several positions at once",
    "matching_pursuit": "it encodes by iteration",
}
_FIRST_METADATA_VERSION = 6
_SCALING = "scaling_factor"
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


class _Metadata(ForeignConfig):
    model_name: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None
    hook_head_index: int | None = None
    training_architecture: str | None = None
    training_architecture_details: dict[str, Any] | None = None

    @property
    def trained_as(self) -> str | None:
        """The architecture in training, if it has a name that folders can have."""
        name = self.training_architecture
        return name if name and name.isidentifier() else None

    @property
    def k(self) -> int | None:
        """The k of training, where the inference rule has none (BatchTopK, Matryoshka)."""
        k = (self.training_architecture_details or {}).get("k")
        return k if isinstance(k, int) and k > 0 else None


class SAELensConfig(ForeignConfig):
    """What counts of cfg.json."""

    architecture: str
    d_in: PositiveInt
    d_sae: PositiveInt
    d_out: PositiveInt | None = None
    k: PositiveInt | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    metadata: _Metadata = _Metadata()

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads one hook point and writes another."""
        return self.architecture in _TRANSCODERS


def check_saelens(folder: SAEFolder, hooks: str) -> tuple[SAELensConfig, Sites]:
    """Return what a folder says, `hooks` overruling it where it is not "", before its weights are read.

    Raises ConfigError for what cannot be had, ArtifactDamagedError for files that cannot be read.
    """
    content = folder.read_json()
    config = folder.parse(SAELensConfig, _flat(content, folder) if _is_flat(content) else content)
    _check(config, folder)
    d_out = (config.d_out or config.d_in) if config.is_transcoder else config.d_in
    widths, noted = (config.d_in, d_out), config.metadata
    if hooks:
        sites = asked_sites(hooks, config.is_transcoder, *widths, folder.path)
    else:
        sites = noted_sites(noted.hook_name, noted.hook_name_out, config.is_transcoder, widths, folder.config_path)
    folder.check_shapes(_shapes(config, d_out), f"{config.architecture} of SAELens", ignored=_SCALING)
    return config, sites


def read_saelens(folder: SAEFolder, hooks: str, model: str) -> SAE:
    """Return the SAE of a folder; `hooks` and `model`, if not "", overrule what it says. Raises as the check does."""
    config, sites = check_saelens(folder, hooks)
    tensors, noted = folder.read_tensors(), config.metadata
    _check_scaling(tensors, folder)
    b_enc, rule = _rule(config, tensors)
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]  # noqa: N806 (the field's names)
    if config.architecture == "topk" and config.rescale_acts_by_decoder_norm:
        W_enc, b_enc, W_dec = unit_decoder_rows(W_enc, b_enc, W_dec)  # noqa: N806
    return SAE(
        W_enc,
        b_enc,
        W_dec,
        tensors["b_dec"],
        rule,
        architecture=_architecture(noted.trained_as or config.architecture),
        W_skip=tensors.get("W_skip"),
        subtract_b_dec=config.apply_b_dec_to_input,
        sites=sites,
        model=model or noted.model_name or "",
    ).eval()


def _is_flat(content: dict[str, Any]) -> bool:
    """Say whether a config is of a version before 6.0, as SAELens decides it."""
    metadata = content.get("metadata")
    noted = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    version = str(content.get("sae_lens_version") or noted or "0")
    major = version.partition(".")[0]
    return not major.isdigit() or int(major) < _FIRST_METADATA_VERSION


def _flat(content: dict[str, Any], folder: SAEFolder) -> dict[str, Any]:
    """Return a flat config in the shape of one of version 6; raises ConfigError for functions that are not known."""
    flat = {_RENAMED.get(key, key): value for key, value in content.items()}
    arguments = flat.get("activation_fn_kwargs") or {}
    function = flat.get("activation_fn") or "relu"
    if function == "topk" and isinstance(arguments, dict) and arguments.get("k") is not None:
        flat |= {"architecture": "topk", "k": arguments["k"]}
    elif function != "relu":
        raise ConfigError(f"{folder.config_path}: an SAE with the activation function {function!r} cannot be read.")
    if flat.get("finetuning_scaling_factor"):
        raise ConfigError(f"{folder.config_path}: an SAE with a finetuning scaling factor cannot be read.")
    scaling = flat.get("normalize_activations")
    if not isinstance(scaling, str):
        flat["normalize_activations"] = "expected_average_only_in" if scaling else "none"
    return {**flat, "architecture": flat.get("architecture") or "standard", "metadata": flat}


def _check(config: SAELensConfig, folder: SAEFolder) -> None:
    """Raise ConfigError for what is another function of the activations than an SAE here can be."""
    place, name = folder.config_path, config.architecture
    if name in _REFUSED:
        raise ConfigError(f"{place}: architecture {name!r} cannot be imported: {_REFUSED[name]}.")
    known = (*_SAES, *_TRANSCODERS)
    if name not in known:
        raise ConfigError(
            f"{place}: architecture {name!r} is not known.{near_names(name, known)} Known are {', '.join(known)}."
        )
    if config.normalize_activations != "none":
        raise ConfigError(
            f"{place}: activations are normalised as it runs ({config.normalize_activations}), which is not done here. "
            "Fold it into the weights with SAELens first (fold_activation_norm_scaling_factor, or "
            "fold_activation_whitening), and save it again."
        )
    if config.reshape_activations not in ("none", "hook_z"):
        raise ConfigError(f"{place}: reshape_activations {config.reshape_activations!r} is not known.")
    if config.metadata.hook_head_index is not None:
        head = config.metadata.hook_head_index
        raise ConfigError(
            f"{place}: it reads head {head} of {config.metadata.hook_name} alone, which is no hook point."
        )
    if config.is_transcoder and config.apply_b_dec_to_input:
        raise ConfigError(f"{place}: a transcoder's input has no b_dec to subtract (apply_b_dec_to_input).")
    if name == "topk" and (config.k is None or config.k > config.d_sae):
        raise ConfigError(f"{place}: a topk SAE needs k, from 1 to d_sae ({config.d_sae}).")


def _check_scaling(tensors: dict[str, Tensor], folder: SAEFolder) -> None:
    """Raise ConfigError for features that are scaled once more; some versions saved a factor that is 1 everywhere."""
    factor = tensors.get(_SCALING)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise ConfigError(f"{folder.weights_path}: an SAE with a finetuning scaling factor cannot be read.")


def _shapes(config: SAELensConfig, d_out: int) -> dict[str, tuple[int, ...]]:
    d_in, d_sae = config.d_in, config.d_sae
    names = ("b_gate", "b_mag", "r_mag") if config.architecture == "gated" else ("b_enc",)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), **dict.fromkeys(names, (d_sae,))}
    shapes |= {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if "jumprelu" in config.architecture:
        shapes["threshold"] = (d_sae,)
    if "skip" in config.architecture:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


def _rule(config: SAELensConfig, tensors: dict[str, Tensor]) -> tuple[Tensor, InferenceRule]:
    """Return the encoder's bias and the inference rule."""
    if config.architecture == "topk":
        return tensors["b_enc"], InferenceRule("topk", config.k)
    if config.architecture == "gated":
        magnitude = {name: tensors[name] for name in ("r_mag", "b_mag")}
        return tensors["b_gate"], InferenceRule("gated", config.metadata.k, **magnitude)
    # Under ReLU a threshold below 0 is one of 0.
    threshold = tensors["threshold"].clamp_min(0) if "threshold" in tensors else torch.tensor(0.0)
    return tensors["b_enc"], InferenceRule("threshold", config.metadata.k, threshold=_one_if_equal(threshold))


def _one_if_equal(threshold: Tensor) -> Tensor:
    """Return θ as one number where it is the same for all features: BatchTopK's, which SAELens expands."""
    return threshold.flatten()[0].clone() if bool((threshold == threshold.flatten()[0]).all()) else threshold


def _architecture(name: str) -> str:
    """Return what an architecture of SAELens is called here.

    >>> _architecture("jumprelu_skip_transcoder"), _architecture("transcoder"), _architecture("matryoshka_batchtopk")
    ('jumprelu', 'standard', 'matryoshka')
    """
    if name == MATRYOSHKA:
        return "matryoshka"
    if name in _TRANSCODERS:
        return "jumprelu" if "jumprelu" in name else "standard"
    return name

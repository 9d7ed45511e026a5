"""An SAE of sparsify's folder (cfg.json, sae.safetensors): TopK SAEs and transcoders, with or without W_skip.

The hook point stands in no file: sparsify names the folder by the module, `layers.15` for the residual stream after
layer 15, `layers.15.mlp` for an MLP. A transcoder reads its module's input, which has no one name among hook points, so
both have to be said.
"""

from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from mi_pipe.core.errors import ConfigError
from mi_pipe.export.sae_formats.folder import ForeignConfig, SAEFolder
from mi_pipe.export.sae_formats.hook_names import asked_sites, hook_of_module, noted_sites
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites


class SparsifyConfig(ForeignConfig):
    """What counts of cfg.json."""

    d_in: PositiveInt
    k: PositiveInt
    num_latents: NonNegativeInt = 0
    expansion_factor: PositiveInt = 32
    activation: str = "topk"
    signed: bool = False
    skip_connection: bool = False
    transcode: bool = False
    model: str | None = None
    hookpoint: str | None = None
    """As our exports have it, of an SAE one hook point, of a transcoder `input -> output`."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.num_latents or self.d_in * self.expansion_factor

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads one hook point and writes another."""
        # An SAE of ours that subtracts nothing is marked `transcode` too.
        return self.transcode and (self.hookpoint is None or "->" in self.hookpoint)


def check_sparsify(folder: SAEFolder, hooks: str) -> tuple[SparsifyConfig, Sites]:
    """Return what a folder says, `hooks` overruling it where it is not "", before its weights are read.

    Raises ConfigError for what cannot be had, ArtifactDamagedError for files that cannot be read.
    """
    config = folder.parse(SparsifyConfig, folder.read_json())
    if config.activation != "topk" or config.signed:
        what = "signed TopK" if config.signed else config.activation
        raise ConfigError(f"{folder.config_path}: the activation {what!r} cannot be imported, only topk.")
    if config.k > config.d_sae:
        raise ConfigError(f"{folder.config_path}: k is {config.k}, and there are {config.d_sae} features.")
    sites = _sites(config, folder, hooks)
    folder.check_shapes(_shapes(config), "sparse coder of sparsify")
    return config, sites


def read_sparsify(folder: SAEFolder, hooks: str, model: str) -> SAE:
    """Return the SAE of a folder; `hooks` and `model`, if not "", overrule what it says. Raises as the check does."""
    config, sites = check_sparsify(folder, hooks)
    tensors = folder.read_tensors()
    return SAE(
        tensors["encoder.weight"].T.contiguous(),
        tensors["encoder.bias"],
        tensors["W_dec"],
        tensors["b_dec"],
        InferenceRule("topk", config.k),
        architecture="topk",
        W_skip=tensors.get("W_skip"),
        subtract_b_dec=not config.transcode,
        sites=sites,
        model=model or config.model or "",
    ).eval()


def _sites(config: SparsifyConfig, folder: SAEFolder, hooks: str) -> Sites:
    said, width = hooks or config.hookpoint, config.d_in
    if said:
        return asked_sites(said, config.is_transcoder, width, width, folder.path)
    read = None if config.is_transcoder else hook_of_module(folder.path.name)
    return noted_sites(read, None, config.is_transcoder, (width, width), folder.config_path)


def _shapes(config: SparsifyConfig) -> dict[str, tuple[int, ...]]:
    d_in, d_sae = config.d_in, config.d_sae
    shapes: dict[str, Any] = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in)}
    shapes["b_dec"] = (d_in,)
    if config.skip_connection:
        shapes["W_skip"] = (d_in, d_in)
    return shapes

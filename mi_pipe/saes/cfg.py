"""`sae.cfg`: what programs written for SAELens' SAEs ask of one (SAEBench, SAEDashboard, SAELens' own evaluations).

The names are SAELens': before version 6 all stood in `cfg`, since then those of model and hook point stand in
`cfg.metadata`. Both are there. Such programs add fields of their own, so a cfg can be changed; only `dtype` and
`device` follow the SAE.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_pipe.saes.sae import SAE

_LAYER = re.compile(r"(?:^|[.:])(?:blocks|layers|h)\.(\d+)(?:\.|$)")


class Metadata(SimpleNamespace):
    """Notes, as SAELens has them: one that is not there is None."""

    def __getattr__(self, name: str) -> None:
        """Return None for what was never noted."""
        if name.startswith("__"):
            raise AttributeError(name)


@dataclass
class SAECfg:
    """An SAE's sizes and where it belongs."""

    model_name: str
    d_in: int
    d_sae: int
    hook_name: str
    hook_layer: int
    architecture: str
    dtype: str
    device: str
    apply_b_dec_to_input: bool
    hook_name_out: str
    hook_head_index: int | None = None
    context_size: int | None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"
    finetuning_scaling_factor: bool = False
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def __post_init__(self) -> None:
        """Note the same in `metadata`."""
        noted = ("model_name", "hook_name", "hook_name_out", "hook_layer", "hook_head_index", "context_size")
        more = ("prepend_bos", "model_from_pretrained_kwargs", "dataset_path", "seqpos_slice")
        self.metadata = Metadata(**{name: getattr(self, name) for name in (*noted, *more)})

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        return dataclasses.asdict(self)


def cfg_of(sae: "SAE") -> SAECfg:
    """Return the cfg of an SAE; of a crosscoder it names the first hook point."""
    return SAECfg(
        model_name=sae.model,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        hook_name=sae.hook,
        hook_layer=layer_of(sae.hook),
        architecture=sae.architecture,
        dtype=str(sae.dtype).removeprefix("torch."),
        device=str(sae.device),
        apply_b_dec_to_input=sae.subtract_b_dec,
        hook_name_out=sae.hook_out,
    )


def layer_of(hook: str) -> int:
    """Return the layer in a hook point's name, 0 if it has none (embeddings).

    >>> layer_of("blocks.15.hook_resid_post"), layer_of("model.layers.3.mlp"), layer_of("hook_embed")
    (15, 3, 0)
    """
    found = _LAYER.search(hook)
    return int(found[1]) if found else 0

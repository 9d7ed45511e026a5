"""SAEs of every architecture and rule with made-up weights, and a published set of them."""

from collections.abc import Sequence

import pandas as pd
import torch

from mi_pipe.core.manifest import MadeOf
from mi_pipe.core.store import Store
from mi_pipe.core.workspace import Workspace
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import (
    CONFIG_FILE,
    EVALUATION_FILE,
    PROBE_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    SAESet,
)
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.storage import make_probe, sae_config, sae_tensors

RESIDUAL, HEADS = "blocks.3.hook_resid_post", "blocks.3.attn.hook_z"
READ, WRITTEN = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
_MEAN_NORM = 5.0
"""Activations are far from 0, as raw ones are: b_dec has to be treated rightly to come out right."""


def every_sae(d_in: int, d_sae: int, k: int, d_out: int | None = None, rows: int = 64) -> list[SAE]:
    """Return one SAE or transcoder of each kind; `d_out` is the width of transcoders' outputs that need not be d_in."""
    maker = _Maker(d_in, d_sae, d_out or d_in, rows)
    topk, at_zero = InferenceRule("topk", k), InferenceRule("threshold", threshold=torch.tensor(0.0))
    batch = InferenceRule("threshold", k, threshold=torch.tensor(0.7))
    each = InferenceRule("threshold", k, threshold=torch.linspace(0.0, 1.4, d_sae))
    noise = torch.randn(2, d_sae, generator=torch.Generator().manual_seed(5))
    gated = InferenceRule("gated", k, r_mag=0.3 * noise[0], b_mag=0.5 * noise[1])
    return [
        maker.sae("topk", topk),
        maker.sae("topk.hook_z", topk, hook=HEADS),
        maker.sae("topk.free_rows", topk, unit_rows=False),
        maker.sae("topk.reads_x", topk, subtract_b_dec=False),
        maker.sae("batchtopk", batch),
        maker.sae("matryoshka", batch),
        maker.sae("jumprelu", each),
        maker.sae("jumprelu.free_rows", each, unit_rows=False),
        maker.sae("standard", at_zero),
        maker.sae("standard.free_rows", at_zero, unit_rows=False),
        maker.sae("p_anneal", at_zero),
        maker.sae("gated", gated),
        maker.sae("gated.free_rows", gated, unit_rows=False),
        maker.sae("gated.reads_x", gated, subtract_b_dec=False),
        maker.transcoder("topk.transcoder", topk, d_in),
        maker.transcoder("topk.skip_transcoder", topk, d_in, skip=True),
        maker.transcoder("standard.transcoder", at_zero),
        maker.transcoder("standard.skip_transcoder", at_zero, skip=True),
        maker.transcoder("batchtopk.transcoder", batch),
        maker.transcoder("jumprelu.transcoder", each),
        maker.transcoder("jumprelu.skip_transcoder", each, skip=True),
    ]


class _Maker:
    """Random weights, another seed for each SAE."""

    def __init__(self, d_in: int, d_sae: int, d_out: int, rows: int) -> None:
        self.d_in, self.d_sae, self.d_out, self.rows = d_in, d_sae, d_out, rows
        self._generator = torch.Generator().manual_seed(0)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def sae(
        self,
        name: str,
        rule: InferenceRule,
        hook: str = RESIDUAL,
        unit_rows: bool = True,
        subtract_b_dec: bool = True,
    ) -> SAE:
        return SAE(
            self._normal(self.d_in, self.d_sae) / self.d_in**0.5,
            self._normal(self.d_sae) * 0.1,
            self._rows(self.d_in, unit_rows),
            self._normal(self.d_in) * _MEAN_NORM,
            rule,
            hook,
            name.partition(".")[0],
            name,
            subtract_b_dec=subtract_b_dec,
            model="toy",
        )

    def transcoder(self, name: str, rule: InferenceRule, d_out: int | None = None, skip: bool = False) -> SAE:
        d_out = d_out or self.d_out
        return SAE(
            self._normal(self.d_in, self.d_sae) / self.d_in**0.5,
            self._normal(self.d_sae) * 0.1,
            self._rows(d_out, unit_rows=True),
            self._normal(d_out) * _MEAN_NORM,
            rule,
            architecture=name.partition(".")[0],
            name=name,
            W_skip=self._normal(d_out, self.d_in) * 0.1 if skip else None,
            subtract_b_dec=False,
            sites=Sites((READ,), (WRITTEN,), (self.d_in,), (d_out,)),
            model="toy",
        )

    def _rows(self, d_out: int, unit_rows: bool) -> torch.Tensor:
        rows = self._normal(self.d_sae, d_out)
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True) if unit_rows else rows * 0.5


def inputs_of(sae: SAE, rows: int) -> torch.Tensor:
    """Return raw activations for an SAE: about its b_dec, if it subtracts that."""
    x = torch.randn(rows, sae.d_in, generator=torch.Generator().manual_seed(7)) * 3
    return x + sae.b_dec if sae.subtract_b_dec else x


def publish_saes(store: Store, saes: Sequence[SAE], name: str = "0" * 16, config: dict | None = None) -> SAESet:
    """Publish SAEs as train_saes would."""
    artifact_id = f"train_saes-{name}"
    if not store.is_published(artifact_id):
        work = Workspace(artifact_id, store.folder(artifact_id), store.scratch(artifact_id))
        probes = {sae.name: make_probe(sae, inputs_of(sae, 16)) for sae in saes}
        for sae in saes:
            work.write_json(f"saes/{sae.name}/{CONFIG_FILE}", sae_config(sae, 0, probes[sae.name]))
            work.write_tensors(f"saes/{sae.name}/{WEIGHTS_FILE}", sae_tensors(sae))
        work.write_tensors(PROBE_FILE, {f"{n}.{part}": x for n, probe in probes.items() for part, x in probe.items()})
        work.write_table(TRAINING_FILE, pd.DataFrame({"sae": [sae.name for sae in saes]}))
        work.write_table(EVALUATION_FILE, pd.DataFrame({"sae": [sae.name for sae in saes], "l0": 4.0}))
        work.publish(MadeOf("train_saes", 1, config or {}))
    return SAESet(store.folder(artifact_id))

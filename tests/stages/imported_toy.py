"""The inputs of `import_saes` on a toy: folders of SAEs that fit its activations, and the activations themselves."""

from pathlib import Path

import torch

from bench.sae_formats.samples import publish_saes
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.store import Store
from mi_pipe.export.sae_formats.exporting import export_saes
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites
from tests.stages.scored_toy import HEADS, RESIDUAL

D_SAE = 48


def toy_folders(store: Store, acts: ActivationStore, root: Path) -> list[Path]:
    """Export a TopK SAE (to sparsify), a JumpReLU SAE and a transcoder (to SAELens); return their folders."""
    saes = [
        sae_on(acts, RESIDUAL, "topk", InferenceRule("topk", k=4)),
        sae_on(acts, RESIDUAL, "jumprelu", InferenceRule("threshold", threshold=torch.linspace(0.1, 2, D_SAE))),
        sae_on(acts, RESIDUAL, "standard", InferenceRule("threshold", threshold=torch.tensor(0.0)), HEADS),
    ]
    made = publish_saes(Store(root / "elsewhere"), saes)
    first = export_saes(made, "sparsify", root / "sparsify", ["topk"])
    others = export_saes(made, "saelens", root / "saelens", ["jumprelu", "standard"])
    return [first / "topk", others / "jumprelu", others / "standard"]


def sae_on(acts: ActivationStore, hook: str, name: str, rule: InferenceRule, written: str = "") -> SAE:
    """Return an SAE with random weights and the activations' mean as b_dec; with `written` a transcoder."""
    generator = torch.Generator().manual_seed(len(name))
    d_in, out = acts.width(hook), written or hook
    W_dec = torch.randn(D_SAE, acts.width(out), generator=generator)
    W_enc = torch.randn(D_SAE, d_in, generator=generator) if written else W_dec
    return SAE(
        (W_enc / torch.linalg.vector_norm(W_enc, dim=1, keepdim=True)).T.contiguous(),
        torch.zeros(D_SAE),
        W_dec / torch.linalg.vector_norm(W_dec, dim=1, keepdim=True),
        torch.from_numpy(acts.statistics(out).mean).float(),
        rule,
        architecture=name,
        name=name,
        subtract_b_dec=not written,
        sites=Sites((hook,), (out,), (d_in,), (acts.width(out),)),
    )

"""What the features of SAEs are: how often and how strongly they fire, on what text, and which tokens they promote.

Steps, each resumable:
1. Encode every stored row once (massive rows left out) and write the firings, sparse, a block of rows a unit.
2. Score the features from their firings, a range of features a unit: density, histograms, examples in context.
3. The direct effect of every decoder direction on the logits.
4. Join the parts into tables, with what crosscoders write at each of their hook points.

Transcoders are scored on what they read, crosscoders on their hook points side by side.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from mi_pipe.activations.prompt_agreement import check_prompts
from mi_pipe.activations.store import ActivationStore
from mi_pipe.activations.training.source import JoinedStores, RowSource, widths_of
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.features import feature_set as files
from mi_pipe.features.contexts import TokenMap
from mi_pipe.features.decoder_norms import decoder_norm_frame
from mi_pipe.features.firings import Firings, encode_rows, joined
from mi_pipe.features.latents import (
    block_name,
    block_ranges,
    feature_counts,
    feature_ranges,
    read_latents,
    write_latents,
)
from mi_pipe.features.logit_effects import NO_EFFECTS, fold_norm, logit_effects
from mi_pipe.features.parts import Parts
from mi_pipe.features.row_tokens import text_of_tokens, token_map
from mi_pipe.features.scored_saes import ScoredSAE, is_scored, read_pieces, scored_saes
from mi_pipe.features.scoring import Scoring, score_range
from mi_pipe.features.tables import effect_frame, feature_frame, sae_row
from mi_pipe.models.device import pick_device
from mi_pipe.models.source import ModelSource, load_source
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import SAESet
from mi_pipe.saes.sites import Sites

logger = logging.getLogger(__name__)

_FIRING_BYTES = 6
"""Bytes of a firing on disk; measured 5.3."""
_USUAL_L0 = 100
"""L0 of SAEs that were imported without being measured, for the estimate."""
_EXAMPLE_BYTES = 60
_TOKEN_BYTES = 4
"""Bytes an example takes, and each token of its window more."""


class ScoreFeaturesConfig(Config):
    """How features are scored."""

    n_top: int = Field(20, ge=1, le=1000)
    """Strongest examples of a feature, at most one a prompt."""
    n_quantiles: int = Field(5, ge=0, le=100)
    """Groups of equal size into which a feature's firings are cut by strength; q0 is the weakest."""
    n_per_quantile: int = Field(5, ge=1, le=1000)
    """Examples drawn at random from each of these groups."""
    context_before: int = Field(20, ge=0, le=4096)
    """Tokens shown before the one on which the feature fires."""
    context_after: int = Field(10, ge=0, le=4096)
    """Tokens shown after it."""
    n_example_features: int | None = Field(None, ge=1)
    """Features of an SAE that get examples, drawn at random; empty means all."""
    n_bins: int = Field(40, ge=1, le=1000)
    """Bins of the histogram of a feature's activations."""
    n_logits: int = Field(10, ge=1, le=1000)
    """Tokens listed as promoted, and as many as suppressed, by a feature."""
    seed: int = Field(0, ge=0)
    """Decides the random examples."""
    keep_latents: bool = True
    """Whether every firing is published too (about 5 bytes each), as Parquet readable by feature."""
    device: Annotated[str, Execution()] = "auto"
    """Where to compute: auto, cuda, mps or cpu."""

    @property
    def scoring(self) -> Scoring:
        """The fields that decide how firings are scored."""
        return Scoring(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Scoring)})


@dataclass(frozen=True)
class Inputs:
    """What is scored, and on what; without a model no effects on the logits, without prompts the rows' own tokens."""

    model: ModelSource | None
    prompts: PromptSet | None
    activations: ActivationStore
    saes: SAESet
    other: ActivationStore | None = None
    """A second store of the same tokens, which crosscoders of two models read; without it they are left out."""


@dataclass(frozen=True)
class _Job:
    """One run: what is asked, and what is done."""

    config: ScoreFeaturesConfig
    inputs: Inputs
    source: RowSource
    saes: list[ScoredSAE]
    work: Workspace

    @property
    def by_sites(self) -> dict[Sites, list[ScoredSAE]]:
        found: dict[Sites, list[ScoredSAE]] = {}
        for sae in self.saes:
            found.setdefault(sae.sites, []).append(sae)
        return found

    @property
    def parts(self) -> Parts:
        return Parts(self.work.scratch / "parts")

    @property
    def n_units(self) -> int:
        return _n_units(self.saes, self.inputs)

    def latent_path(self, sae: ScoredSAE, block: int) -> Path:
        name = f"{files.LATENTS_FOLDER}/{sae.name}/{block_name(block)}"
        return self.work.path(name) if self.config.keep_latents else self.work.scratch / name

    def latent_paths(self, sae: ScoredSAE) -> list[Path]:
        return [self.latent_path(sae, block) for block in range(len(block_ranges(self.inputs.activations.n_rows)))]

    def is_done(self, step: str, sae: ScoredSAE, part: int) -> bool:
        return f"{step} {sae.name} {part}" in self.work.ledger

    def mark(self, step: str, sae: ScoredSAE, part: int, note: str) -> None:
        ledger = self.work.ledger
        ledger.mark(f"{step} {sae.name} {part}")
        self.work.progress.update(ledger.n_done, ledger.n_total or ledger.n_done, "units", note)


def _n_units(saes: list[ScoredSAE], inputs: Inputs) -> int:
    """Count blocks to encode, and for each SAE one range of features (there may be more) and its effects."""
    return len(saes) * (len(block_ranges(inputs.activations.n_rows)) + 2)


def estimate(config: ScoreFeaturesConfig, inputs: Inputs) -> Estimate:
    """Return bytes from the SAEs' sizes and sparsity; units are those of the ledger, as far as known before."""
    saes = _scored(inputs, _checked_source(config, inputs))
    l0 = dict(zip(inputs.saes.names, inputs.saes.evaluation["l0"].to_numpy(float), strict=True))
    n_examples = config.n_top + config.n_quantiles * config.n_per_quantile
    example_bytes = _EXAMPLE_BYTES + _TOKEN_BYTES * (config.context_before + config.context_after + 1)
    size = 0.0
    for sae in saes:
        firings_a_row = _USUAL_L0 if math.isnan(l0[sae.name]) else l0[sae.name]
        size += inputs.activations.n_rows * firings_a_row * _FIRING_BYTES
        # Examples lie in parts first and are then joined.
        size += 2 * min(config.n_example_features or sae.d_sae, sae.d_sae) * n_examples * example_bytes
        size += sae.d_sae * (4 * 2 * config.n_bins * 2 + 20 * 2 * config.n_logits + 16 * len(sae.sites.outputs))
    return Estimate(int(size), _n_units(saes, inputs), "blocks")


def run(config: ScoreFeaturesConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Score the features; raises ConfigError before anything is computed if the inputs do not belong together."""
    source = _checked_source(config, inputs)
    job = _Job(config, inputs, source, _scored(inputs, source, tell=True), work)
    work.ledger.expect(job.n_units)
    _log_unknown(inputs)
    _encode(job)
    firsts = _score(job)
    _effects(job)
    return _assemble(job, firsts)


def _checked_source(config: ScoreFeaturesConfig, inputs: Inputs) -> RowSource:
    """Return the rows; raises ConfigError if stores and prompts do not belong together."""
    pick_device(config.device)
    if inputs.prompts is not None:
        check_prompts(inputs.activations, inputs.prompts)
    return inputs.activations if inputs.other is None else JoinedStores(inputs.activations, inputs.other)


def _scored(inputs: Inputs, source: RowSource, tell: bool = False) -> list[ScoredSAE]:
    return scored_saes(inputs.saes, widths_of(source), inputs.activations.id, tell)


def _log_unknown(inputs: Inputs) -> None:
    store = inputs.activations
    if inputs.model is None:
        logger.warning("%s: no model: effects of features on the logits are not computed", store.id)
    if inputs.prompts is None:
        logger.warning("%s: no prompts: contexts show the tokens that have rows, and blanks between", store.id)


def _encode(job: _Job) -> None:
    """Step 1: each block of the rows of a place is read once and encoded by all its SAEs."""
    device = pick_device(job.config.device)
    for sites, saes in job.by_sites.items():
        kept = is_scored(job.source, sites)
        loaded: dict[str, SAE] = {}
        for block, (start, stop) in enumerate(block_ranges(job.source.n_rows)):
            todo = [sae for sae in saes if not job.is_done("encode", sae, block)]
            found: dict[str, list[Firings]] = {sae.name: [] for sae in todo}
            for rows, values in read_pieces(job.source, sites, kept, start, stop) if todo else ():
                for sae in todo:
                    if sae.name not in loaded:
                        loaded[sae.name] = job.inputs.saes[sae.name].to(device)
                    encode = loaded[sae.name].encode_sparse
                    found[sae.name].append(encode_rows(encode, sae.d_sae, values, rows, device))
            for sae in todo:
                write_latents(job.latent_path(sae, block), joined(found[sae.name]))
                job.mark("encode", sae, block, f"{sae.name}: {stop:,} rows encoded")


def _score(job: _Job) -> dict[str, list[int]]:
    """Step 2: a range of features at a time, over all rows; returns where each SAE's ranges begin."""
    ranges = {sae.name: list(feature_ranges(feature_counts(job.latent_paths(sae), sae.d_sae))) for sae in job.saes}
    job.work.ledger.expect(job.n_units + sum(len(parts) - 1 for parts in ranges.values()))
    read = job.inputs
    text = text_of_tokens(read.activations, read.prompts, read.model)
    for sites, saes in job.by_sites.items():
        tokens: TokenMap | None = None
        for sae in saes:
            for first, last in ranges[sae.name]:
                if not job.is_done("score", sae, first):
                    tokens = tokens or token_map(read.activations, read.prompts, is_scored(job.source, sites))
                    firings = read_latents(job.latent_paths(sae), first, last)
                    found = score_range(job.config.scoring, sae.name, sae.d_sae, firings, tokens, text)
                    job.parts.write_range(sae.name, first, *found)
                    job.mark("score", sae, first, f"{sae.name}: features up to {last:,} scored")
    return {name: [first for first, _ in parts] for name, parts in ranges.items()}


def _effects(job: _Job) -> None:
    """Step 3: SAEs whose decoder does not write into the residual stream have no direct effect on the logits."""
    todo = [sae for sae in job.saes if not job.is_done("effects", sae, 0)]
    model = norm = None
    for sae in todo:
        effects, text = NO_EFFECTS, str
        if job.inputs.model is not None and sae.effects_of:
            model = model or load_source(job.inputs.model, job.config.device)
            norm = norm or fold_norm(model.final_norm, model.info.d_model, model.W_U)
            loaded, text = job.inputs.saes[sae.name], model.vocabulary.text
            directions = loaded.by_output(loaded.W_dec.data)[sae.effects_of]
            if directions.shape[1] == model.info.d_model:
                effects = logit_effects(directions, norm, model.W_U, job.config.n_logits)
        job.parts.write_effects(sae.name, effect_frame(sae.name, effects, text))
        job.mark("effects", sae, 0, f"{sae.name}: logit effects")


def _assemble(job: _Job, firsts: dict[str, list[int]]) -> dict[str, Scalar]:
    """Step 4: the tables, from the parts; short enough to be done again whole after a kill."""
    figures = {sae: job.parts.figures(sae.name, firsts[sae.name]) for sae in job.saes}
    features = pd.concat([feature_frame(sae.name, part.density) for sae, part in figures.items()], ignore_index=True)
    n_scored = {sites: int(is_scored(job.source, sites).sum()) for sites in job.by_sites}
    n_rows = job.source.n_rows
    saes = [
        sae_row(sae, part.density, n_scored[sae.sites], n_rows - n_scored[sae.sites]) for sae, part in figures.items()
    ]
    histograms = {f"{sae.name}.counts": torch.from_numpy(part.counts) for sae, part in figures.items()}
    histograms |= {f"{sae.name}.edges": torch.from_numpy(part.edges) for sae, part in figures.items()}
    norms = [decoder_norm_frame(job.inputs.saes[sae.name], job.source) for sae in job.saes]
    job.work.write_table(files.FEATURES_FILE, features)
    job.work.write_table(files.SAES_FILE, pd.DataFrame(saes))
    job.work.write_tensors(files.HISTOGRAMS_FILE, histograms)
    job.work.write_table(files.NORMS_FILE, pd.concat(norms, ignore_index=True))
    job.work.write_table(files.EFFECTS_FILE, job.parts.effects([sae.name for sae in job.saes]))
    n_examples = job.parts.join_examples(job.work.path(files.EXAMPLES_FILE), firsts)
    density = np.concatenate([part.density.density for part in figures.values()])
    return {
        "saes": len(saes),
        "features": len(features),
        "rows": n_rows,
        "firings": sum(int(part.density.n_firings.sum()) for part in figures.values()),
        "dead_fraction": float((density == 0).mean()),
        "median_density": float(np.median(density[density > 0])) if density.any() else 0.0,
        "examples": n_examples,
    }


STAGE = Stage(name="score_features", version=2, config=ScoreFeaturesConfig, inputs=Inputs, run=run, estimate=estimate)

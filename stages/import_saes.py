"""import_saes: SAEs that SAELens or sparsify saved, as a set of SAEs like a trained one.

Every folder is checked before anything is written, and its weights are converted to float32 and to what an SAE is here.
With activations, each SAE is evaluated on the same held-out rows (and, where model and prompts are known, prompts) that
SAEs trained on this store are evaluated on: a wrong hook point, model or scale shows in the FVU. The artifact is known
by the content of the folders; their paths stand in `execution`.
"""

import dataclasses
import itertools
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor

from mi_pipe.activations.prompt_agreement import check_prompts
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core import atomic
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import ConfigError, StageError, near_names
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.export.sae_formats.folder import SAEFolder
from mi_pipe.export.sae_formats.importing import ImportedSAE, check_sae_folder, read_sae_folder
from mi_pipe.models.device import pick_device
from mi_pipe.models.source import ModelSource, load_source
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.config import DataConfig, TrainSAEsConfig
from mi_pipe.saes.evaluation import RowFigures
from mi_pipe.saes.held_out import IN_MODEL_COLUMNS, HeldOut, InModel
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sae_set import CONFIG_FILE, EVALUATION_FILE, PROBE_FILE, TRAINING_FILE, WEIGHTS_FILE
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.storage import make_probe, sae_config, sae_tensors
from mi_pipe.saes.training import CURVE_COLUMNS
from stages.import_activations import digest_of_file

logger = logging.getLogger(__name__)

_PROBE_ROWS = 16
_PROBE_NORMS = (-1.0, 3.0)
"""Powers of ten between which the norms of made-up probe rows lie."""
_FLOAT32_GROWTH = 2
"""By how much weights grow at most when float16 becomes float32."""
_ROW_COLUMNS = [field.name for field in dataclasses.fields(RowFigures)]
_EVALUATION_COLUMNS = ["sae", *_ROW_COLUMNS, *IN_MODEL_COLUMNS]


@dataclass(frozen=True)
class Inputs:
    """What imported SAEs are evaluated on; an import without activations measures nothing."""

    model: ModelSource | None = None
    prompts: PromptSet | None = None
    activations: ActivationStore | None = None


class ImportSAEsConfig(Config):
    """Which folders hold SAEs, and what they belong to."""

    folders: Annotated[tuple[Path, ...], Field(min_length=1), Execution()]
    """Folders that SAELens (cfg.json, sae_weights.safetensors) or sparsify (cfg.json, sae.safetensors) wrote."""
    hooks: str = ""
    """Hook point of all of them, `input -> output` for transcoders; by default what each folder says."""
    model: str = ""
    """The model they were trained on, as a note; by default what each folder says."""
    n_rows: PositiveInt = 32_768
    """Most held-out rows of the activations for FVU, L0 and cosine."""
    n_prompts: NonNegativeInt = 64
    """Most held-out prompts for cross-entropy and KL in the model; 0 for none."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the prompts that are held out, as in the training of SAEs."""
    split_seed: NonNegativeInt = 0
    """Decides which prompts are held out."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def identity(self) -> dict[str, Any]:
        """Return kind and SHA-256 of every folder's files instead of paths; raises ConfigError for missing ones."""
        return {**super().identity(), "contents": [self._content(SAEFolder.at(path)) for path in self.folders]}

    def _content(self, folder: SAEFolder) -> str:
        digests = f"{digest_of_file(folder.config_path)}:{digest_of_file(folder.weights_path)}"
        # sparsify says the hook point by the folder's name.
        name = f":{folder.path.name}" if folder.kind == "sparsify" and not self.hooks else ""
        return f"{folder.kind}:{digests}{name}"


def estimate(config: ImportSAEsConfig, inputs: Inputs) -> Estimate:
    """Return the bytes of the weights; raises ConfigError for folders that cannot be imported or evaluated."""
    for path in config.folders:
        _check_store(check_sae_folder(path, config.hooks), inputs.activations, path)
    if inputs.activations is not None and inputs.prompts is not None:
        check_prompts(inputs.activations, inputs.prompts)
    size = sum(SAEFolder.at(path).weights_path.stat().st_size for path in config.folders) * _FLOAT32_GROWTH
    return Estimate(size, len(config.folders), "SAEs")


def run(config: ImportSAEsConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Import and, with activations, evaluate; return the range of the main figures over the SAEs."""
    estimate(config, inputs)
    before = config.identity()
    held_out = _held_out(config, inputs)
    work.ledger.expect(len(config.folders))
    rows: list[dict[str, Any]] = []
    for i, path in enumerate(config.folders):
        unit = f"import {i}"
        if unit not in work.ledger:
            work.progress.update(i, len(config.folders), "SAEs", path.name)
            names = [row["sae"] for row in rows]
            work.ledger.mark(unit, **_import(path, names, config, held_out, work))
        rows.append(work.ledger.info(unit))
    if config.identity() != before:
        raise StageError(f"{config.folders[0]} or another folder changed while it was imported. Import it again.")
    columns = [name for name in _EVALUATION_COLUMNS if name == "sae" or inputs.activations is not None]
    frame = pd.DataFrame(rows, columns=columns)
    work.write_table(EVALUATION_FILE, frame if "l0" in frame else frame.assign(fvu=math.nan, l0=math.nan))
    work.write_table(TRAINING_FILE, pd.DataFrame(columns=list(CURVE_COLUMNS)))
    probes = {row["sae"]: load_file(_probe_path(work, row["sae"])) for row in rows}
    work.write_tensors(PROBE_FILE, {f"{n}.{part}": x for n, probe in probes.items() for part, x in probe.items()})
    return _summary(rows)


def _check_store(sites: Sites, store: ActivationStore | None, path: Path) -> None:
    """Raise ConfigError unless the store has the SAE's hook points in its widths."""
    if store is None:
        return
    widths = dict(zip((*sites.inputs, *sites.outputs), (*sites.input_widths, *sites.output_widths), strict=True))
    for hook, width in widths.items():
        if hook not in store.hooks:
            near = near_names(hook, store.hooks)
            raise ConfigError(
                f"The SAE in {path} belongs to {hook}, which {store.id} does not hold.{near} It holds "
                f"{', '.join(store.hooks)}; --hook says where it belongs, and without activations nothing is measured."
            )
        if store.width(hook) != width:
            raise ConfigError(f"The SAE in {path} has width {width}; {hook} in {store.id} has {store.width(hook)}.")


def _held_out(config: ImportSAEsConfig, inputs: Inputs) -> HeldOut | None:
    store, model, prompts = inputs.activations, inputs.model, inputs.prompts
    if store is None:
        logger.warning("no activations: FVU, L0 and cross-entropy of imported SAEs are not measured")
        return None
    asked = TrainSAEsConfig(data=DataConfig(held_out_fraction=config.held_out_fraction, split_seed=config.split_seed))
    if model is None or prompts is None:
        missing = " and ".join(name for name, value in (("model", model), ("prompts", prompts)) if value is None)
        logger.warning("%s: no %s: cross-entropy with the SAEs in the model is not measured", store.id, missing)
        return HeldOut(store, asked, None)
    return HeldOut(store, asked, InModel(prompts, lambda: load_source(model, str(pick_device(config.device)))))


def _import(
    path: Path, taken: list[str], config: ImportSAEsConfig, held_out: HeldOut | None, work: Workspace
) -> dict[str, Any]:
    """Write one SAE and return its row."""
    found = read_sae_folder(path, config.hooks, config.model)
    sae = found.sae
    sae.name = _name(sae, taken)
    x = _made_up(sae) if held_out is None else held_out.sample(sae.sites, _PROBE_ROWS).x
    probe = make_probe(sae, x)
    with atomic.atomic_path(_probe_path(work, sae.name)) as temp:
        save_file(probe, temp)
    work.write_tensors(f"saes/{sae.name}/{WEIGHTS_FILE}", sae_tensors(sae))
    work.write_json(f"saes/{sae.name}/{CONFIG_FILE}", sae_config(sae, None, probe, **_note(found, path)))
    figures = {} if held_out is None else _evaluate(sae.to(pick_device(config.device)), config, held_out)
    return {"sae": sae.name, **figures}


def _note(found: ImportedSAE, path: Path) -> dict[str, Any]:
    return {"imported_from": found.kind, "folder": path.name, "config": found.config}


def _evaluate(sae: SAE, config: ImportSAEsConfig, held_out: HeldOut) -> dict[str, Any]:
    figures = vars(held_out.evaluate_rows(sae, config.n_rows).figures)
    if figures["fvu"] > 1:
        logger.warning(
            "%s explains nothing of these activations (FVU %.3g): is %s its hook point, and were they harvested from "
            "its model, loaded as its makers loaded it?",
            *(sae.name, figures["fvu"], sae.sites.label),
        )
    found = {**figures, **held_out.evaluate_in_model(sae, config.n_prompts)}
    return {key: value for key, value in found.items() if not isinstance(value, float) or math.isfinite(value)}


def _name(sae: SAE, taken: list[str]) -> str:
    """Return a folder-safe name as trained SAEs have it, with a number where it is taken."""
    k = "" if sae.k is None else f".k{sae.k}"
    name = f"{sae.sites.short}.{sae.architecture}{k}.d{sae.d_sae}"
    names = itertools.chain([name], (f"{name}.n{n}" for n in itertools.count(2)))
    return next(candidate for candidate in names if candidate not in taken)


def _made_up(sae: SAE) -> Tensor:
    """Return probe rows of random directions and of norms over four powers of ten, for want of activations."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBE_ROWS, sae.d_in, generator=generator)
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows *= torch.logspace(*_PROBE_NORMS, _PROBE_ROWS)[:, None]
    return rows + sae.b_dec if sae.subtract_b_dec else rows


def _probe_path(work: Workspace, name: str) -> Path:
    return work.scratch / "probes" / f"{name}.safetensors"


def _summary(rows: list[dict[str, Any]]) -> dict[str, Scalar]:
    summary: dict[str, Scalar] = {"n_saes": len(rows)}
    for name in ("fvu", "l0", "ce_recovered"):
        values: list[float] = [row[name] for row in rows if name in row]
        if values:
            summary |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    return summary


STAGE = Stage(name="import_saes", version=1, config=ImportSAEsConfig, inputs=Inputs, run=run, estimate=estimate)

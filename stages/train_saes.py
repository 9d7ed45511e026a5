"""train_saes: train sparse autoencoders on stored activations, a sweep with one pass over the data a hook point.

Steps: for each place (hook point, or several) train its SAEs together, with checkpoints between, and save them on raw
activations; then evaluate each on held-out rows and, spliced into the model, on held-out prompts. The mathematics is in
`mi_pipe.saes`.
"""

import itertools
import json
import logging
import math
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file

from mi_pipe.activations.prompt_agreement import check_prompts
from mi_pipe.activations.provenance import model_id
from mi_pipe.activations.store import ActivationStore
from mi_pipe.activations.training.source import JoinedStores, RowSource, widths_of
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.device import pick_device
from mi_pipe.models.source import ModelSource, load_source
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.grouping import largest_group_bytes, memory_groups, training_bytes, weight_bytes
from mi_pipe.saes.held_out import IN_MODEL_COLUMNS, HeldOut, InModel
from mi_pipe.saes.planning import Start, plan_sweep, start_of
from mi_pipe.saes.sae_set import (
    CONFIG_FILE,
    DENSITIES_FILE,
    EVALUATION_FILE,
    HELD_OUT_FILE,
    PROBE_FILE,
    TIMING_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    SAESet,
)
from mi_pipe.saes.site_training import SiteTraining
from mi_pipe.saes.storage import read_sae
from mi_pipe.saes.sweep import SAESpec
from mi_pipe.saes.training import CURVE_COLUMNS
from mi_pipe.saes.training_rows import Rows, finite

logger = logging.getLogger(__name__)

_UNITS_A_GROUP = 50
_ROW_COLUMNS = (
    *("fvu", "l0", "dead_fraction", "silent_fraction", "dense_fraction"),
    *("cosine", "relative_bias", "l2_ratio", "mse", "n_rows"),
)
_EVALUATION_COLUMNS = ["sae", *_ROW_COLUMNS, *IN_MODEL_COLUMNS]
_HELD_OUT_COLUMNS = [
    *("sae", "step", "tokens"),
    *(name for name in _ROW_COLUMNS if name != "dead_fraction"),
    *IN_MODEL_COLUMNS,
]


@dataclass(frozen=True)
class Inputs:
    """What SAEs are trained on, and the model and prompts to evaluate them in, where both are known."""

    model: ModelSource | None
    prompts: PromptSet | None
    activations: ActivationStore
    other: ActivationStore | None = None
    """A second store of the same tokens, whose hook points are named `other:hook`."""
    start: SAESet | None = None
    """A finished training to go on from."""

    def source(self) -> RowSource:
        """Return the rows; raises ConfigError if the stores' rows are not the same tokens."""
        return self.activations if self.other is None else JoinedStores(self.activations, self.other)

    def beginning(self, config: TrainSAEsConfig, specs: list[SAESpec]) -> Start | None:
        """Return where a training of `specs` goes on, if it does; raises ConfigError if `start` does not fit."""
        stores = {"activations": self.activations, "other": self.other}
        digests = {name: store.digest for name, store in stores.items() if store is not None}
        return start_of(config, self.start, digests, specs)


def estimate(config: TrainSAEsConfig, inputs: Inputs) -> Estimate:
    """Return the bytes of all weights and states and of two checkpoints of the largest group (both exist at times)."""
    specs = plan_sweep(config, widths_of(inputs.source()), inputs.activations.id)
    inputs.beginning(config, specs)
    kept = sum(weight_bytes(spec) + config.keep_state * training_bytes(spec) for spec in specs)
    size = kept + 2 * largest_group_bytes(specs)
    n_sites = len({spec.sites for spec in specs})
    return Estimate(size, config.n_steps * n_sites, "steps")


def run(config: TrainSAEsConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Train, save and evaluate the sweep; return the range of the main figures over the SAEs."""
    specs = plan_sweep(config, widths_of(inputs.source()), inputs.activations.id)
    inputs.beginning(config, specs)
    held_out = _held_out(config, inputs)
    share = Share(config, inputs, work.folder, work.scratch)
    devices = config.devices
    if work.pool is not None and work.pool.n_workers > 1:
        groups = spread(specs, work.pool.n_workers)
        ended = work.pool.run(partial(train_share, share), groups)
    elif len(devices) > 1:
        groups = spread(specs, len(devices))
        ended = _on_devices(share, groups, devices)
    else:
        groups = [group for site in _by_site(specs) for group in memory_groups(site, pick_device(devices[0]))]
        ended = ((group, _train(share, group, held_out, work)) for group in groups)
    work.ledger.expect(len(groups) * _n_units(config) + len(specs))
    found: list[Rows] = []
    for group, rows in ended:
        found.append(rows)
        _mark(work, group, config, config.n_steps)
    _write_rows(work, specs, found)
    dead = {row["sae"]: row["dead_fraction"] for row in _in_order(specs, [r for rows in found for r in rows.curve])}
    rows = [{**_evaluate(spec, config, work, held_out), "dead_fraction": dead[spec.name]} for spec in specs]
    work.write_table(EVALUATION_FILE, pd.DataFrame(rows, columns=_EVALUATION_COLUMNS))
    return _summary(rows)


@dataclass(frozen=True)
class Share:
    """What it takes to train a part of the sweep, here or in a worker."""

    config: TrainSAEsConfig
    inputs: Inputs
    folder: Path
    scratch: Path

    def training(self, specs: list[SAESpec]) -> SiteTraining:
        """Return the training of SAEs of the same sites."""
        inputs = self.inputs
        start = inputs.beginning(self.config, specs)
        model = inputs.model.id if inputs.model is not None else model_id(inputs.activations) or ""
        return SiteTraining(self.config, inputs.source(), specs, self.folder, self.scratch, start, model)


def spread(specs: list[SAESpec], n_workers: int) -> list[list[SAESpec]]:
    """Share whole SAEs among workers: each site's in about equal groups, no more groups than it takes."""
    sites = _by_site(specs)
    each = max(1, math.ceil(n_workers / len(sites)))
    return [site[i::each] for site in sites for i in range(min(each, len(site)))]


def _by_site(specs: list[SAESpec]) -> list[list[SAESpec]]:
    return [list(group) for _, group in itertools.groupby(specs, key=lambda spec: spec.sites)]


def train_share(share: Share, specs: list[SAESpec]) -> tuple[list[SAESpec], Rows]:
    """Train SAEs of the same sites from their last checkpoint, in a worker or thread; return them and their rows."""
    held_out = _held_out(share.config, share.inputs)
    rows = Rows()
    for group in memory_groups(specs, pick_device(share.config.device)):
        rows.add(share.training(group).finish(held_out))
    return specs, rows


def _on_devices(share: Share, groups: list[list[SAESpec]], devices: list[str]) -> Iterator[tuple[list[SAESpec], Rows]]:
    """Train groups in a thread for each device, which takes the next group when it is free; yield them as they end."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def train(group: list[SAESpec]) -> tuple[list[SAESpec], Rows]:
        device = free.get()
        try:
            return train_share(replace(share, config=share.config.model_copy(update={"device": device})), group)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices), "sae-training") as threads:
        for future in as_completed([threads.submit(train, group) for group in groups]):
            yield future.result()


def _train(share: Share, specs: list[SAESpec], held_out: HeldOut, work: Workspace) -> Rows:
    training, config = share.training(specs), share.config
    total = config.n_steps * config.batch_rows

    def on_rows(rows: list[dict[str, Any]]) -> None:
        fvu = ", ".join(f"{row['fvu']:.3f}" for row in rows)
        work.progress.update(rows[0]["tokens"], total, "tokens", f"{training.sites.short} FVU {fvu}")

    return training.finish(held_out, on_rows, partial(_mark, work, specs, config))


def _n_units(config: TrainSAEsConfig) -> int:
    """Return in how many units the ledger counts the training of one group."""
    return min(config.n_steps, _UNITS_A_GROUP)


def _mark(work: Workspace, specs: list[SAESpec], config: TrainSAEsConfig, n_steps_done: int) -> None:
    """Mark the units of training that are durable."""
    n_units = _n_units(config)
    for i in range(n_steps_done * n_units // config.n_steps):
        unit = f"train {specs[0].name} and {len(specs) - 1} more {i + 1}/{n_units}"
        if unit not in work.ledger:
            work.ledger.mark(unit)


def _write_rows(work: Workspace, specs: list[SAESpec], found: list[Rows]) -> None:
    """Write the tables and gather the probes."""
    curve, held_out, densities = (
        _in_order(specs, [row for rows in found for row in getattr(rows, name)])
        for name in ("curve", "held_out", "densities")
    )
    work.write_table(TRAINING_FILE, pd.DataFrame(curve, columns=list(CURVE_COLUMNS)))
    work.write_table(HELD_OUT_FILE, pd.DataFrame(held_out, columns=_HELD_OUT_COLUMNS))
    densities_frame = pd.DataFrame(densities, columns=["sae", "step", "log10_density", "n_features"])
    work.write_table(DENSITIES_FILE, densities_frame.astype({"log10_density": "float64"}))
    work.write_table(TIMING_FILE, pd.DataFrame([row for rows in found for row in rows.timing]))
    work.volatile(TIMING_FILE)
    paths = {spec.name: next(work.scratch.glob(f"sites/*/probes/{spec.name}.safetensors")) for spec in specs}
    probes = {name: load_file(path) for name, path in paths.items()}
    work.write_tensors(
        PROBE_FILE, {f"{n}.{part}": value for n, probe in probes.items() for part, value in probe.items()}
    )


def _in_order(specs: list[SAESpec], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in the order of the sweep, each SAE's as they came: however the SAEs were grouped."""
    place = {spec.name: i for i, spec in enumerate(specs)}
    return sorted(rows, key=lambda row: place[row["sae"]])


def _held_out(config: TrainSAEsConfig, inputs: Inputs) -> HeldOut:
    """Return the held-out side; raises ConfigError if the rows are no tokens of the prompts."""
    model, prompts = inputs.model, inputs.prompts
    if prompts is not None:
        check_prompts(inputs.activations, prompts)
    if model is None or prompts is None:
        missing = " and ".join(name for name, value in (("model", model), ("prompts", prompts)) if value is None)
        logger.warning(
            "%s: no %s: cross-entropy with the SAEs in the model is not measured", inputs.activations.id, missing
        )
        return HeldOut(inputs.source(), config, None)
    device = str(pick_device(config.devices[0]))
    return HeldOut(inputs.source(), config, InModel(prompts, lambda: load_source(model, device)))


def _evaluate(spec: SAESpec, config: TrainSAEsConfig, work: Workspace, held_out: HeldOut) -> dict[str, Any]:
    unit = f"evaluate {spec.name}"
    if unit not in work.ledger:
        work.progress.update(0, 1, "evaluation", spec.name)
        folder = work.folder / "saes" / spec.name
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        sae = read_sae(content, load_file(folder / WEIGHTS_FILE)).to(pick_device(config.devices[0]))
        figures = vars(held_out.evaluate_rows(sae, config.evaluation.n_rows).figures)
        in_model = held_out.evaluate_in_model(sae, config.evaluation.n_prompts)
        work.ledger.mark(unit, **finite({**figures, **in_model}))
    return {"sae": spec.name, **work.ledger.info(unit)}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Scalar]:
    summary: dict[str, Scalar] = {"n_saes": len(rows)}
    for name in ("fvu", "l0", "ce_recovered"):
        values: list[float] = [row[name] for row in rows if name in row]
        if values:
            summary |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    return {**summary, "dead_fraction_max": max(row["dead_fraction"] for row in rows)}


STAGE = Stage(name="train_saes", version=3, config=TrainSAEsConfig, inputs=Inputs, run=run, estimate=estimate)

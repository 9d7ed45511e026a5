"""The page of patching draws every unit that can be patched, whatever its axes."""

import numpy as np
import pandas as pd
import pytest

from mi_pipe.core.store import Store
from mi_pipe.patching.effects import PatchEffects, effects_dataset
from mi_pipe.patching.units import UNITS, axes_of
from mi_pipe.report import patching
from tests.stages.toys import publish

SIZES = {"pair": 3, "layer": 2, "pos": 4, "head": 3, "kv_head": 2, "neuron": 5, "feature": 2}
CLEAN, CORRUPTED = 3.0, -1.0


@pytest.fixture(scope="module")
def effects(tmp_path_factory) -> PatchEffects:
    random = np.random.default_rng(0)
    values = {
        unit: random.normal(size=[SIZES[axis] for axis in ("pair", "layer", *axes_of(unit))]).astype(np.float32)
        for unit in UNITS
    }
    for unit in (unit for unit in UNITS if unit.startswith("sae_")):
        values[unit][:, 0] = np.nan
    runs = [np.full(SIZES["pair"], value, np.float32) for value in (CLEAN, CORRUPTED)]
    attributes = {"direction": "denoising", "metric": "kl", "intervention": "zero"}
    tokens = {"token_id": np.zeros((SIZES["pair"], SIZES["pos"]), np.int32)}
    dataset = effects_dataset(values, *runs, tokens, np.arange(SIZES["pair"]), attributes, {})
    pairs = pd.DataFrame({"pair": np.arange(SIZES["pair"]), "n_pos": SIZES["pos"], "clean": runs[0]})
    pairs = pairs.assign(corrupted=runs[1], answer=" a", labels=[list("abcd")] * SIZES["pair"])

    def fill(work) -> None:
        dataset.to_zarr(work.path("effects.zarr"), zarr_format=3, consolidated=False)
        work.write_table("pairs.parquet", pairs)

    return PatchEffects(publish(Store(tmp_path_factory.mktemp("store")), "patch", "0" * 16, fill, {}))


def test_every_unit_has_a_heatmap_of_its_layers_and_cells(effects):
    figures = {figure.name.partition("-")[0]: figure for figure in reversed(patching.page([effects]).figures)}
    assert {*UNITS, "base"} == set(figures)
    assert figures["embed"].data["fraction recovered"].shape == (SIZES["pos"],)
    assert figures["k"].data["fraction recovered"].shape == (2 * SIZES["kv_head"],)
    assert figures["sae_error"].data["fraction recovered"].isna().tolist() == [True, False]
    assert figures["sae_error"].title == "SAE error, all positions"
    assert figures["base"].title == "KL without patching"


def test_parts_by_position_are_shown_where_they_do_most(effects):
    figures = {figure.name.partition("-")[0]: figure for figure in reversed(patching.page([effects]).figures)}
    found = figures["head_out_by_pos"].data["fraction recovered"].to_numpy().reshape(2, SIZES["head"])
    fractions = effects.recovered("head_out_by_pos").to_numpy()
    assert np.abs(found) == pytest.approx(np.abs(fractions).max(-1))
    assert "does most" in figures["head_out_by_pos"].title

"""Imported SAEs are a set like a trained one: measured on held-out rows, scored, shown, repaired; known by content."""

import os
import shutil

import numpy as np
import pytest
import torch

import mi_pipe
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import ConfigError, StageError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.saes.sae_set import SAESet
from stages import import_saes, score_features
from stages.import_saes import ImportSAEsConfig, Inputs
from stages.repair.repair import repair
from tests.stages.imported_toy import D_SAE, toy_folders
from tests.stages.killed import resume_after_kill
from tests.stages.scored_toy import CONFIG, HEADS, RESIDUAL, scored_inputs, small_units

NAMES = [
    "L0.resid_post.topk.k4.d48",
    "L0.resid_post.jumprelu.d48",
    "L0.resid_post_to_L1.attn.z.standard.d48",
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def made_of(shared):
    """Model, prompts and activations."""
    found = scored_inputs(shared)
    return Inputs(found.model, found.prompts, found.activations)


@pytest.fixture(scope="module")
def folders(shared, made_of, tmp_path_factory):
    return toy_folders(shared, made_of.activations, tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def imported(shared, made_of, folders):
    config = ImportSAEsConfig(folders=folders, n_prompts=4, device="cpu")
    return SAESet(execute(import_saes.STAGE, config, made_of, shared).artifact.path)


def test_it_opens_as_a_set_of_saes(imported, folders):
    saes = mi_pipe.open(imported.path)
    assert isinstance(saes, SAESet)
    assert saes.names == NAMES
    assert [saes[name].sites.kind for name in saes] == ["sae", "sae", "transcoder"]
    config = saes.config_of(NAMES[1])
    assert config["training"]["imported_from"] == "saelens"
    assert config["training"]["config"]["architecture"] == "jumprelu"
    assert config["seed"] is None
    assert saes.of_hook(RESIDUAL) == NAMES
    assert len(saes.training) == 0


def test_figures_are_those_of_plain_torch_on_the_held_out_rows(imported, made_of):
    acts = made_of.activations
    _, held_out = acts.prompt_split(0.05, 0)
    rows = dict(zip(NAMES, imported.evaluation.to_dict("records"), strict=True))
    for name in NAMES:
        sae = imported[name]
        kept = held_out & ~acts.massive(sae.hook) & ~acts.massive(sae.hook_out)
        x, y = (torch.from_numpy(acts.take(hook, np.flatnonzero(kept))) for hook in (sae.hook, sae.hook_out))
        y = y.double()
        fvu = (y - sae(x)).square().sum() / (y - y.mean(0)).square().sum()
        assert rows[name]["n_rows"] == len(x)
        assert rows[name]["fvu"] == pytest.approx(float(fvu), rel=1e-5)
        assert rows[name]["l0"] == pytest.approx(float((sae.encode(x) > 0).sum() / len(x)), rel=1e-6)
    assert rows[NAMES[0]]["n_prompts"] == 3
    assert np.isfinite(rows[NAMES[0]]["ce_recovered"])
    assert imported.summary["fvu_max"] == max(row["fvu"] for row in rows.values())


def test_it_is_scored_as_a_trained_set_is(shared, imported, made_of):
    small_units()
    inputs = score_features.Inputs(made_of.model, made_of.prompts, made_of.activations, imported)
    scored = execute(score_features.STAGE, CONFIG, inputs, shared).artifact
    features = mi_pipe.open(scored.path)
    assert features.names == NAMES
    assert len(features.features()) == len(NAMES) * D_SAE
    # The transcoder reads the residual stream, and writes heads: its features have no direct effect on the logits.
    assert set(scored.read_table("logit_effects.parquet")["sae"]) == set(NAMES[:2])


def test_without_activations_nothing_is_measured_and_it_is_scored_all_the_same(shared, folders, made_of):
    small_units()
    config = ImportSAEsConfig(folders=folders[:2])
    saes = SAESet(execute(import_saes.STAGE, config, Inputs(), shared).artifact.path)
    assert saes.evaluation[["fvu", "l0"]].isna().all(axis=None)
    assert "fvu_min" not in saes.summary
    # Made-up rows for the probe: features have to fire on some of them.
    probe = saes.read_tensors("probe.safetensors")[f"{NAMES[0]}.input"]
    assert float((saes[NAMES[1]].encode(probe) > 0).float().mean()) > 0.02
    inputs = score_features.Inputs(None, None, made_of.activations, saes)
    assert score_features.STAGE.estimate(CONFIG, inputs).size_bytes > 0
    execute(score_features.STAGE, CONFIG, inputs, shared)


def test_it_is_known_by_what_the_folders_hold(shared, imported, folders, made_of, tmp_path):
    moved = [tmp_path / folder.name for folder in folders]
    for folder, to in zip(folders, moved, strict=True):
        shutil.copytree(folder, to)
    again = ImportSAEsConfig(folders=moved, n_prompts=4)
    assert execute(import_saes.STAGE, again, made_of, shared).outcome == "Cached"
    assert str(tmp_path) not in str(imported.manifest.config)
    (moved[0] / "cfg.json").write_text((moved[0] / "cfg.json").read_text() + " ")
    assert again.identity() != ImportSAEsConfig(folders=folders, n_prompts=4).identity()


def test_the_same_sae_twice_has_two_names(store, folders):
    config = ImportSAEsConfig(folders=[folders[0], folders[0], folders[1], folders[0]])
    saes = SAESet(execute(import_saes.STAGE, config, Inputs(), store).artifact.path)
    assert saes.names == [NAMES[0], f"{NAMES[0]}.n2", NAMES[1], f"{NAMES[0]}.n3"]
    torch.testing.assert_close(saes[NAMES[0]].W_enc, saes[f"{NAMES[0]}.n3"].W_enc)


def test_a_killed_import_goes_on(shared, made_of, folders, imported, tmp_path):
    config = ImportSAEsConfig(folders=folders, n_prompts=4, device="cpu")
    shutil.copytree(shared.root, tmp_path / "copy", ignore=shutil.ignore_patterns("import_saes", ".work"))
    copy = Store(tmp_path / "copy")
    inputs = Inputs(*(type(value)(copy.folder(value.id)) for value in vars(made_of).values()))
    result = resume_after_kill(import_saes, config, inputs, copy, at=1)
    assert result.artifact.digest == imported.digest


def test_a_damaged_set_is_made_again_from_the_folders(imported, folders, shared):
    damaged = imported.path / "saes" / NAMES[0] / "weights.safetensors"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert Artifact(imported.path).damaged_files() == [f"saes/{NAMES[0]}/weights.safetensors"]
    repair(imported.id, shared)
    assert Artifact(imported.path).damaged_files() == []


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            "blocks.0.hook_resid_pots",
            r"belongs to blocks.0.hook_resid_pots, which harvest-.* does not hold. Did you mean",
        ),
        ("blocks.1.hook_resid_post", r"It holds blocks.0.hook_resid_post, blocks.1.attn.hook_z; --hook says where"),
    ],
)
def test_activations_without_the_hook_point_are_refused_at_once(store, folders, made_of, hooks, message):
    config = ImportSAEsConfig(folders=[folders[1]], hooks=hooks)
    with pytest.raises(ConfigError, match=message):
        execute(import_saes.STAGE, config, made_of, store)
    assert not list(store.root.glob("import_saes/*/*"))


def test_activations_of_another_width_are_refused(store, made_of, folders, tmp_path):
    from bench.sae_formats.samples import every_sae, publish_saes
    from mi_pipe.export.sae_formats.exporting import export_saes

    narrow = publish_saes(Store(tmp_path / "narrow"), every_sae(8, 16, 2)[:1])
    folder = export_saes(narrow, "saelens", tmp_path / "out") / "topk"
    with pytest.raises(ConfigError, match=rf"width 8; {RESIDUAL} in .* has 32"):
        execute(import_saes.STAGE, ImportSAEsConfig(folders=[folder], hooks=RESIDUAL), made_of, store)


def test_a_bad_folder_among_good_ones_is_found_before_anything_is_written(store, folders, tmp_path):
    (tmp_path / "bad").mkdir()
    with pytest.raises(ConfigError, match="bad is no folder of an SAE"):
        execute(import_saes.STAGE, ImportSAEsConfig(folders=[*folders, tmp_path / "bad"]), Inputs(), store)
    assert not list(store.root.glob("import_saes/*/*"))


def test_a_folder_that_changes_meanwhile_is_no_result(store, folders, tmp_path, monkeypatch):
    folder = tmp_path / "one"
    shutil.copytree(folders[1], folder)
    read = import_saes.read_sae_folder

    def change_then_read(path, *said):
        found = read(path, *said)
        (path / "cfg.json").write_text((path / "cfg.json").read_text() + " ")
        os.utime(path / "cfg.json", ns=(1, 1))
        return found

    monkeypatch.setattr(import_saes, "read_sae_folder", change_then_read)
    with pytest.raises(StageError, match="changed while it was imported"):
        execute(import_saes.STAGE, ImportSAEsConfig(folders=[folder]), Inputs(), store)


def test_what_explains_nothing_is_said_to(store, made_of, folders, caplog):
    config = ImportSAEsConfig(folders=[folders[2]], n_prompts=0)
    saes = SAESet(execute(import_saes.STAGE, config, made_of, store).artifact.path)
    assert saes.summary["fvu_max"] > 1
    assert "explains nothing of these activations" in caplog.text


def test_a_hook_point_that_is_said_overrules_the_folder(store, made_of, folders):
    config = ImportSAEsConfig(folders=[folders[1]], hooks=HEADS, model="mine", n_prompts=0)
    saes = SAESet(execute(import_saes.STAGE, config, made_of, store).artifact.path)
    assert (saes[saes.names[0]].hook, saes[saes.names[0]].model) == (HEADS, "mine")

"""Recipes that start from activations that are there already: imports, captures, harvests here and elsewhere."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mi_pipe
from mi_pipe.activations.harvest.capture import capture
from mi_pipe.saes.held_out import IN_MODEL_COLUMNS
from tests.flows.test_cli import command, only_line  # noqa: F401 (a fixture)
from tests.models.tiny import save_tiny_llama

HOOK = "blocks.1.hook_resid_post"
SAES = {
    "d_sae": 48,
    "k": 4,
    "n_tokens": 12_800,
    "batch_rows": 256,
    "data": {"held_out_fraction": 0.1, "pool_rows": 1024},
    "evaluation": {"n_prompts": 5},
    "device": "cpu",
}
FEATURES = {"n_top": 3, "n_quantiles": 1, "n_per_quantile": 1, "context_before": 3, "context_after": 2, "device": "cpu"}
HARVEST = {"hooks": [HOOK], "store_dtype": "float32", "precision": "float32", "shard_rows": 512, "device": "cpu"}
PROMPTS = {"family": "repeated", "n_prompts": 60, "length": 24, "max_period": 10}
IN_MODEL = [name for name in IN_MODEL_COLUMNS if name != "n_prompts"]


def write(path: Path, **sections) -> str:
    """Write a recipe; JSON is YAML."""
    path.write_text(json.dumps(sections))
    return str(path)


def ids(plan: str) -> dict[str, str]:
    """Return step to id of what `mi-pipe plan --json` printed."""
    return {row["step"]: row["id"] for row in json.loads(plan)}


@pytest.fixture
def dump(tmp_path):
    """Arrays that another program wrote, without the first token of each prompt; returns (file, table)."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"prompt_idx": np.repeat(np.arange(50), 20), "pos": np.tile(np.arange(1, 21), 50)})
    table["token_id"] = rng.integers(0, 9, len(table))
    table["text"] = [f" t{i}" for i in table["token_id"]]
    # A direction for each token, so that features have something to find.
    values = rng.normal(size=(9, 16))[table["token_id"]] * 5 + rng.normal(size=(len(table), 16))
    np.save(tmp_path / "acts.npy", values.astype(np.float32))
    table.to_csv(tmp_path / "tokens.csv", index=False)
    return str(tmp_path / "acts.npy"), str(tmp_path / "tokens.csv")


@pytest.fixture
def llama(tmp_path) -> dict:
    """The model section of a tiny Llama in a folder."""
    return {"name": str(save_tiny_llama(tmp_path / "model")), "device": "cpu"}


def test_an_import_is_trained_on_scored_and_reported_without_a_model(command, dump, store, tmp_path):  # noqa: F811
    file, tokens = dump
    _, said, _ = command("import", file, "--tokens", tokens, "--hook", HOOK, "--model", "somebody's")
    name = said.splitlines()[-1]
    recipe = write(tmp_path / "r.yaml", activations=name[:-6], saes=SAES, features=FEATURES, report={})
    code, out, err = command("plan", recipe)
    assert code == 0, err
    assert "given" in out
    assert "1,000 rows of 50 prompts at 1 hook point, float32" in out
    steps = ids(command("plan", recipe, "--json")[1])
    assert list(steps) == ["activations", "saes", "features", "report"]
    assert steps["activations"] == name
    code, out, err = command("report", recipe)
    assert code == 0, err
    early = mi_pipe.open(Path(out.split("Report: ")[1].strip()).parent)
    assert early.pages == ["index.html", "activations.html"], "what is there is shown before anything ran"
    code, out, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    assert f"Given                {name}" in out

    evaluation = mi_pipe.open(steps["saes"]).evaluation.iloc[0]
    assert evaluation[IN_MODEL].isna().all()
    assert evaluation["n_prompts"] == 0
    assert evaluation["fvu"] < 0.6
    assert "ce_recovered_max" not in mi_pipe.open(steps["saes"]).summary
    assert_features_are_those_of(mi_pipe.open(steps["features"]), pd.read_csv(tokens))

    report = mi_pipe.open(steps["report"])
    assert report.pages == ["index.html", "activations.html", "features.html", "saes.html"]
    assert "imported of somebody&#39;s" in report.file("activations.html").read_text()
    logged = "".join(path.read_text() for path in (store.root / "logs").iterdir())
    assert f"{name}: no model and prompts: cross-entropy with the SAEs in the model is not measured" in logged
    assert f"{name}: no model: effects of features on the logits are not computed" in logged
    out = command("run", recipe, "--no-prefect")[1]
    assert [line.split()[2] for line in out.splitlines()[:4]] == ["Given", "Cached", "Cached", "Cached"]


def assert_features_are_those_of(features, table):
    (sae,) = features.names
    assert features.saes["n_rows"].tolist() == [1000]
    feature = int(features.features(sae)["max_activation"].argmax())
    assert features.logit_effects(sae, feature).empty
    for example in features.examples(sae, feature).to_dict("records"):
        own = table[table["prompt_idx"] == example["prompt_idx"]].set_index("pos")
        window = range(max(example["pos"] - 3, 0), min(example["pos"] + 2, 20) + 1)
        assert example["first_pos"] == window.start
        assert list(example["tokens"]) == [own["text"].get(pos, "") for pos in window]
        assert example["token_ids"].tolist() == [own["token_id"].get(pos, -1) for pos in window]
        assert np.isnan(example["activations"]).tolist() == [pos not in own.index for pos in window]


def test_an_import_of_our_own_export_gives_what_the_harvest_gave(command, llama, tmp_path):  # noqa: F811
    whole = write(tmp_path / "a.yaml", model=llama, prompts=PROMPTS, harvest=HARVEST, saes=SAES, features=FEATURES)
    assert command("run", whole, "--no-prefect")[0] == 0
    made = ids(command("plan", whole, "--json")[1])
    out = str(tmp_path / "acts.h5")
    assert command("export", made["harvest"], "--to", "hdf5", "--out", out)[0] == 0
    imported = command("import", out)[1].splitlines()[-1]
    given = write(tmp_path / "b.yaml", model=llama, activations=imported, saes=SAES, features=FEATURES, report={})
    code, _, err = command("run", given, "--no-prefect")
    assert code == 0, err
    found = ids(command("plan", given, "--json")[1])
    assert found["prompts"] == made["prompts"], "the store has the prompts of the export, and they are used"
    first, second = (mi_pipe.open(steps["saes"]).evaluation for steps in (made, found))
    assert not first[IN_MODEL].isna().any().any()
    pd.testing.assert_frame_equal(first, second)
    for name in ("examples.parquet", "logit_effects.parquet", "features.parquet"):
        pd.testing.assert_frame_equal(*(mi_pipe.open(steps["features"]).read_table(name) for steps in (made, found)))
    assert {"prompts.html", "activations.html"} < set(mi_pipe.open(found["report"]).pages)


def test_a_harvest_is_its_own_beginning_with_and_without_its_model(command, llama, tmp_path):  # noqa: F811
    whole = write(tmp_path / "a.yaml", model=llama, prompts=PROMPTS, harvest=HARVEST, saes=SAES, features=FEATURES)
    assert command("run", whole, "--no-prefect")[0] == 0
    made = ids(command("plan", whole, "--json")[1])
    again = write(tmp_path / "b.yaml", model=llama, activations=made["harvest"], saes=SAES, features=FEATURES)
    rows = json.loads(command("plan", again, "--json")[1])
    assert {row["step"]: (row["id"], row["action"]) for row in rows} == {
        "activations": (made["harvest"], "given"),
        "prompts": (made["prompts"], "given"),
        "saes": (made["saes"], "cached"),
        "features": (made["features"], "cached"),
    }
    alone = write(tmp_path / "c.yaml", activations=made["harvest"], saes=SAES, features=FEATURES)
    assert command("run", alone, "--no-prefect")[0] == 0
    found = ids(command("plan", alone, "--json")[1])
    pd.testing.assert_frame_equal(
        *(mi_pipe.open(steps["saes"]).evaluation.drop(columns=list(IN_MODEL_COLUMNS)) for steps in (made, found))
    )
    pd.testing.assert_frame_equal(
        *(mi_pipe.open(steps["features"]).read_table("examples.parquet") for steps in (made, found))
    )
    assert mi_pipe.open(found["features"]).read_table("logit_effects.parquet").empty


def test_activations_in_an_object_store_are_given_by_url(command, llama, bucket, tmp_path):  # noqa: F811
    harvested = {**HARVEST, "destination": bucket}
    elsewhere = ["--no-prefect", "--store", str(tmp_path / "elsewhere")]
    assert (
        command("run", write(tmp_path / "a.yaml", model=llama, prompts=PROMPTS, harvest=harvested), *elsewhere)[0] == 0
    )
    name = next((tmp_path / "elsewhere" / "harvest").iterdir()).name
    url = f"{bucket}/harvest/{name}"
    here = write(tmp_path / "b.yaml", activations=url, saes=SAES, features=FEATURES)
    code, _, err = command("run", here, "--no-prefect")
    assert code == 0, err
    features = mi_pipe.open(ids(command("plan", here, "--json")[1])["features"])
    assert features.saes["n_rows"].tolist() == [60 * 24]
    assert features.manifest.sources["activations"] == {"url": url}
    (features.path / "features.parquet").unlink()
    assert command("repair", features.id)[0] == 0


def test_a_capture_of_any_module_is_trained_on(command, store, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    acts = capture(nn.Sequential(nn.Linear(6, 20), nn.ReLU()), torch.rand(900, 6), ["1"], store)
    recipe = write(tmp_path / "r.yaml", activations=acts.id, saes=SAES, features=FEATURES, report={})
    code, _, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    steps = ids(command("plan", recipe, "--json")[1])
    (sae,) = mi_pipe.open(steps["saes"]).names
    features = mi_pipe.open(steps["features"])
    example = features.examples(sae, int(features.features(sae)["density"].argmax())).iloc[0]
    assert (list(example["tokens"]), example["token_ids"].tolist()) == ([""], [-1])
    assert "captured of module-" in mi_pipe.open(steps["report"]).file("activations.html").read_text()


def test_mistakes_are_one_sentence(command, dump, llama, store, tmp_path):  # noqa: F811
    file, tokens = dump
    name = command("import", file, "--tokens", tokens, "--hook", HOOK)[1].splitlines()[-1]
    module = capture(nn.Sequential(nn.Linear(6, 20)), torch.rand(900, 6), ["0"], store).id
    cases = [
        ({"activations": name, "harvest": HARVEST, "prompts": PROMPTS, "model": llama}, "both 'harvest' and"),
        ({"saes": SAES, "model": llama}, "section 'saes' needs a section 'harvest' or 'activations'"),
        ({"activations": "import_activations-00", "saes": SAES}, "No artifact 'import_activations-00'"),
        ({"activations": name, "saes": {**SAES, "hooks": ["blocks.1.hook_resid_pots"]}}, "Did you mean"),
        ({"activations": name, "saes": SAES, "model": llama}, "16 values wide in"),
        ({"activations": module, "saes": SAES, "model": llama}, "is of the model module-"),
        ({"activations": name, "saes": SAES, "prompts": PROMPTS}, "it has neither"),
    ]
    for sections, message in cases:
        code, _, err = command("run", write(tmp_path / "r.yaml", **sections), "--no-prefect")
        assert code == 2, err
        assert message in only_line(err)


def test_rows_that_are_no_tokens_of_the_prompts_are_refused(command, llama, tmp_path):  # noqa: F811
    harvested = write(tmp_path / "a.yaml", model=llama, prompts=PROMPTS, harvest=HARVEST)
    assert command("run", harvested, "--no-prefect")[0] == 0
    acts = mi_pipe.open(ids(command("plan", harvested, "--json")[1])["harvest"])
    np.save(tmp_path / "acts.npy", acts.read_rows(HOOK, 0, acts.n_rows))
    table = acts.table(["prompt_idx", "pos", "token_id"])

    def run_with(tokens: pd.DataFrame) -> tuple[int, str, str]:
        tokens.to_csv(tmp_path / "tokens.csv", index=False)
        line = ("import", str(tmp_path / "acts.npy"), "--tokens", str(tmp_path / "tokens.csv"), "--hook", HOOK)
        name = command(*line)[1].splitlines()[-1]
        sections = {"model": llama, "prompts": PROMPTS, "activations": name, "saes": SAES}
        return command("run", write(tmp_path / "b.yaml", **sections), "--no-prefect")

    assert run_with(table)[0] == 0, "another program's values of our prompts"
    changed = table.assign(token_id=table["token_id"].where(table.index != 70, table["token_id"] + 1))
    code, _, err = run_with(changed)
    assert code == 1
    assert "Row 70 of" in only_line(err)
    assert "they belong to other prompts" in err


def test_saes_that_are_there_are_scored_and_reported(command, dump, tmp_path):  # noqa: F811
    file, tokens = dump
    acts = command("import", file, "--tokens", tokens, "--hook", HOOK, "--model", "somebody's")[1].splitlines()[-1]
    trained = write(tmp_path / "trained.yaml", activations=acts, saes=SAES, features=FEATURES)
    assert command("run", trained, "--no-prefect")[0] == 0
    made = ids(command("plan", trained, "--json")[1])
    exported = command("export", made["saes"], "--to", "saelens", "--out", str(tmp_path / "out"))
    assert exported[0] == 0, exported[2]
    imported = command("import-saes", *map(str, (tmp_path / "out").iterdir()))[1].splitlines()[-1]

    recipe = write(tmp_path / "r.yaml", activations=acts, trained_saes=imported, features=FEATURES, report={})
    code, _, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    rows = {row["step"]: row for row in json.loads(command("plan", recipe, "--json")[1])}
    assert list(rows) == ["activations", "trained_saes", "features", "report"]
    assert rows["trained_saes"]["reason"] == "1 SAE"
    of_import, of_training = (mi_pipe.open(name) for name in (rows["features"]["id"], made["features"]))
    assert of_import.manifest.inputs["saes"].id == imported
    ours, theirs = (found.features(found.names[0])["density"] for found in (of_training, of_import))
    assert theirs.to_numpy() == pytest.approx(ours.to_numpy(), abs=2e-3), "the same SAE fires on the same rows"
    assert "saes.html" in mi_pipe.open(rows["report"]["id"]).pages


def test_saes_that_do_not_fit_are_refused_before_any_work(command, dump, llama, tmp_path):  # noqa: F811
    file, tokens = dump
    acts = command("import", file, "--tokens", tokens, "--hook", HOOK, "--model", "somebody's")[1].splitlines()[-1]
    trained = write(tmp_path / "trained.yaml", activations=acts, saes=SAES)
    assert command("run", trained, "--no-prefect")[0] == 0
    saes = ids(command("plan", trained, "--json")[1])["saes"]
    elsewhere = {"model": llama, "prompts": PROMPTS, "harvest": {**HARVEST, "hooks": ["blocks.0.hook_resid_post"]}}
    cases = [
        ({"activations": acts, "trained_saes": acts, "features": FEATURES}, "holds no SAEs"),
        ({"activations": acts, "trained_saes": saes, "saes": SAES}, "has both 'saes' and 'trained_saes'"),
        ({"model": llama, "trained_saes": saes}, "needs a section 'harvest' or 'activations'"),
        ({**elsewhere, "trained_saes": saes, "features": FEATURES}, "which harvest.hooks does not hold"),
    ]
    for sections, message in cases:
        code, out, err = command("run", write(tmp_path / "bad.yaml", **sections), "--no-prefect")
        assert code == 2, (out, err)
        assert message in only_line(err)

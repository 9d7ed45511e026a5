"""Small published artifacts of every stage, with tokens, labels and names that try to break out of a page."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from mi_pipe.activations.harvest.capture import capture
from mi_pipe.attention.head_scores import HeadScores
from mi_pipe.attention.pattern_store import write_patterns
from mi_pipe.attribution.attributions import Attributions
from mi_pipe.circuits.circuit_set import CircuitSet
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.manifest import InputRef, MadeOf
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.core.workspace import Workspace
from mi_pipe.features.feature_set import FeatureSet
from mi_pipe.lenses.lens_readings import LensReadings
from mi_pipe.models.trained import TrainedModel
from mi_pipe.opening import open_artifact
from mi_pipe.patching.effects import PatchEffects
from mi_pipe.probes.probe_set import ProbeSet
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.prompts.repeated import RepeatedConfig
from mi_pipe.report.claims import Claim
from mi_pipe.report.site import Report
from mi_pipe.steering.steering import Steering
from stages import generate_prompts, harvest, import_activations
from stages.report import STAGE, Inputs, ReportConfig
from tests.report.attribution_samples import write_attribution
from tests.report.head_samples import write_evidence
from tests.report.reading_samples import write_lenses, write_probes
from tests.report.steering_samples import STEERING_CONFIG, write_steering
from tests.stages.toys import toy_model

HOSTILE = "</script><img src=x onerror=\"document.title='broken out'\">"
TOKENS = [" Mary", HOSTILE, " & <b>bold", "\u2028\u2029", "\u202e\x00\n", " 日本", "$x^2$", "${a}", " John", " the"]
SAE = "L0/<b>&.topk.k2"
N_LAYERS, N_HEADS, N_POS, N_PAIRS, D_SAE = 2, 3, len(TOKENS), 4, 60


def sample_artifacts(store: Store) -> list[Artifact]:
    """Publish one artifact of each stage but `harvest`, all made of hostile text."""
    model = publish(store, "train_model", _model, label="model")
    task = publish(store, "generate_prompts", _task, {"family": "ioi"}, f"prompts.{HOSTILE}", model=model)
    used = {"model": model, "tasks.0": task}
    return [
        TrainedModel(model.path),
        PromptSet(task.path),
        Artifact(publish(store, "train_saes", _saes, model=model).path),
        FeatureSet(publish(store, "score_features", _features, model=model).path),
        LensReadings(publish(store, "lenses", _lenses, {}, "lenses", **used).path),
        ProbeSet(publish(store, "probes", _probes, {"causal": {"metric": "logit_diff"}}, "probes", model=model).path),
        HeadScores(publish(store, "heads", _heads, **used).path),
        PatchEffects(publish(store, "patch", _effects, {}, f"patch.{HOSTILE}", **used).path),
        Attributions(publish(store, "attribute", _attribution, {}, f"attribution.{HOSTILE}", **used).path),
        CircuitSet(publish(store, "circuits", _circuit, {}, f"circuits.{HOSTILE}", **used).path),
        Steering(publish(store, "steer", _steering, STEERING_CONFIG, "steering", **used).path),
    ]


def sample_activations(store: Store) -> Artifact:
    """Harvest a toy by the real stage."""
    model = TrainedModel(toy_model(store).path)
    corpus = RepeatedConfig(n_prompts=12, length=20, max_period=8)
    prompts = PromptSet(execute(generate_prompts.STAGE, corpus, generate_prompts.Inputs(model), store).artifact.path)
    wanted = harvest.HarvestConfig(
        hooks=["blocks.0.hook_resid_post"], precision="float32", massive_factor=1.2, device="cpu"
    )
    result = execute(harvest.STAGE, wanted, harvest.Inputs(model, prompts), store)
    return open_artifact(result.artifact.path)


def sample_exchange(store: Store) -> list[Artifact]:
    """Import a dump and capture a module by the real stages, each with one row of large norm."""
    values = np.ones((8, 4), np.float32) * np.array([1, 1, 50, 1, 1, 1, 1, 1], np.float32)[:, None]
    store.root.mkdir(parents=True, exist_ok=True)
    file, table = store.root / "acts.npy", store.root / "tokens.csv"
    np.save(file, values)
    texts = [HOSTILE if i == 2 else f" {i}" for i in range(8)]
    pd.DataFrame({"prompt_idx": 0, "pos": range(8), "token_id": range(8), "text": texts}).to_csv(table, index=False)
    wanted = import_activations.ImportConfig(files=(file,), tokens=table, hooks={"mine": ""}, model=HOSTILE)
    imported = execute(import_activations.STAGE, wanted, import_activations.Inputs(), store).artifact
    captured = capture(torch.nn.Sequential(torch.nn.Identity()), values, ["0"], store)
    return [captured, open_artifact(imported.path)]


CLAIMS = (
    Claim(statement=HOSTILE, stage="heads", metric="induction_score", comparison=">", value=0.5, source=HOSTILE),
    Claim(statement="no", stage="heads", metric="induction_score", comparison="<", value=0.5),
    Claim(statement="absent", stage="heads", metric=HOSTILE, comparison="==", value=HOSTILE),
)


def sample_config() -> ReportConfig:
    """Return a config whose every text tries to break out."""
    config = ReportConfig(title=HOSTILE, n_features=55, n_prompts=2)
    return config.for_run(HOSTILE, HOSTILE, {"name": HOSTILE}, CLAIMS)


@cache
def sample_report(root: Path) -> Report:
    """Make the report of every stage below `root`, once."""
    samples = Store(root / "samples")
    artifacts = [*sample_artifacts(samples), sample_sweep(samples)]
    artifacts += [sample_activations(samples), *sample_exchange(samples)]
    return Report(execute(STAGE, sample_config(), Inputs(artifacts), Store(root / "store")).artifact.path)


def publish(
    store: Store, stage: str, fill, config: dict | None = None, label: str = "", **inputs: Artifact
) -> Artifact:
    """Publish an artifact of `stage` whose files and summary `fill(work)` gives."""
    artifact_id = f"{stage}-{len(store.published_ids(stage)):016x}"
    work = Workspace(artifact_id, store.folder(artifact_id), store.scratch(artifact_id))
    summary = fill(work) or {}
    refs = {role: InputRef(id=item.id, digest=item.digest) for role, item in inputs.items()}
    work.publish(MadeOf(stage, 1, config or {}, refs, label), summary)
    return Artifact(store.folder(artifact_id))


def _model(work: Workspace) -> dict:
    steps = np.arange(50, dtype=np.int32)
    work.write_json("model_config.json", {"n_layers": N_LAYERS, "n_heads": N_HEADS, "d_model": 32})
    loss = np.exp(-steps / 20).astype(np.float32)
    work.write_table("training.parquet", pd.DataFrame({"step": steps, "loss": loss, "induction_loss": loss / 2}))
    return {"final_loss": 0.08, "note": HOSTILE}


def _task(work: Workspace) -> None:
    n_prompts = 2 * N_PAIRS
    prompt_idx = np.repeat(np.arange(n_prompts, dtype=np.int32), N_POS)
    pos = np.tile(np.arange(N_POS, dtype=np.int32), n_prompts)
    tokens = pd.DataFrame({"prompt_idx": prompt_idx, "pos": pos, "token_id": pos, "text": np.array(TOKENS)[pos]})
    work.write_table("tokens.parquet", tokens)
    rows = pd.DataFrame({"prompt_idx": np.arange(n_prompts, dtype=np.int32), "n_tokens": np.int32(N_POS)}).assign(
        source=[HOSTILE, "template"] * N_PAIRS,
        pair=np.repeat(np.arange(N_PAIRS, dtype=np.int32), 2),
        role=["clean", "corrupted"] * N_PAIRS,
        answer_id=np.int32(0),
        wrong_id=np.int32(1),
        answer=" Mary",
        wrong=HOSTILE,
        pos_io=pd.array([0] * n_prompts, dtype="Int32"),
        pos_s2=pd.array([None] * n_prompts, dtype="Int32"),
    )
    work.write_table("prompts.parquet", rows)
    work.write_json("dropped.json", {HOSTILE: 3})


def _saes(work: Workspace) -> dict:
    steps = np.arange(1, 31)
    training = pd.DataFrame({"sae": SAE, "step": steps, "tokens": steps * 1000, "fvu": 1 / steps, "l0": 2.0})
    work.write_table("training.parquet", training.assign(dead_fraction=0.1, loss=2 / steps))
    evaluation = pd.DataFrame({"sae": [SAE], "fvu": [0.1], "l0": [2.0], "ce_recovered": [0.97]})
    work.write_table("evaluation.parquet", evaluation)
    return {"fvu_min": 0.1}


SWEEP = [(kind, k) for kind in ("topk", "standard", HOSTILE) for k in (32, 8, 16)]


def sample_sweep(store: Store) -> Artifact:
    """Publish a sweep of three architectures and three sparsities with all that a training keeps."""
    return publish(store, "train_saes", _sweep, label="saes")


def _sweep(work: Workspace) -> None:
    curves, evaluation, held_out, densities = [], [], [], []
    for kind, k in SWEEP:
        sae = f"L0.{kind}.k{k}"
        config = {
            "architecture": kind,
            "hook": "h",
            "d_sae": 64,
            "seed": 0,
            "sites": {"inputs": ["h"], "outputs": ["h"]},
        }
        work.write_json(f"saes/{sae}/config.json", {**config, "training": {"lr": None, "coefficient": None}})
        for step in (10, 20):
            row = {"sae": sae, "step": step, "tokens": step * 100, "fvu": 1 / step, "l0": k, "lr": 1e-3 / step}
            losses = {
                "loss": 1.0,
                "reconstruction": 0.5,
                "sparsity": 0.5 * (kind != "topk"),
                "gate": 0.0,
                "auxk": 0.0,
                "revival": 0.0,
            }
            more = {"dead_fraction": 0.0, "dense_fraction": 0.01, "grad_norm": k, "threshold": np.nan}
            curves.append({**row, **losses, **more, "coefficient": np.nan if kind == "topk" else 3.0 + step})
            held_out.append({**row, "ce_recovered": 0.9, "kl": 0.1})
            densities += [
                {"sae": sae, "step": step, "log10_density": edge, "n_features": n * step}
                for edge, n in ((None, 1), (-2.0, 2), (-1.0, 3))
            ]
        evaluation.append({"sae": sae, "fvu": 1 / k, "l0": k, "ce_recovered": 1 - 1 / k, "kl": 0.5 / k})
    tables = {"training": curves, "evaluation": evaluation, "held_out": held_out, "densities": densities}
    for name, rows in tables.items():
        work.write_table(f"{name}.parquet", pd.DataFrame(rows))


def sample_imported_saes(store: Store) -> list[Artifact]:
    """Return a set that was measured on import, and one that was not."""
    made = []
    for name, figures in (("a" * 16, {"fvu": 0.2, "l0": 3.0, "ce_recovered": np.nan}), ("b" * 16, {})):
        artifact_id = f"import_saes-{name}"
        work = Workspace(artifact_id, store.folder(artifact_id), store.scratch(artifact_id))
        work.write_table("training.parquet", pd.DataFrame(columns=["sae", "step", "tokens", "fvu", "l0", "loss"]))
        row = {"sae": SAE, "fvu": np.nan, "l0": np.nan, **figures}
        work.write_table("evaluation.parquet", pd.DataFrame([row]))
        work.publish(MadeOf("import_saes", 1, {}))
        made.append(Artifact(store.folder(artifact_id)))
    return made


def _features(work: Workspace) -> dict:
    features = np.arange(D_SAE, dtype=np.int32)
    density = np.where(features == 7, 0.0, (features + 1) / 1000)
    table = pd.DataFrame({"sae": SAE, "feature": features, "density": density, "mean_activation": 1.0})
    table = table.assign(max_activation=2.0 + features / 10, is_dead=features == 7)
    work.write_table("features.parquet", table)
    examples = [_example(feature, group, rank) for feature in features if feature != 7 for group, rank in _GROUPS]
    work.write_table("examples.parquet", pd.DataFrame(examples))
    effects = [
        {"sae": SAE, "feature": feature, "sign": sign, "rank": rank, "token_id": rank, "token": TOKENS[rank]}
        | {"effect": (1 if sign == "promoted" else -1) / (rank + 1)}
        for feature in features
        for sign in ("promoted", "suppressed")
        for rank in range(3)
    ]
    work.write_table("logit_effects.parquet", pd.DataFrame(effects))
    norms = [
        {"sae": SAE, "feature": feature, "hook": hook, "norm": 1.0, "scaled_norm": 2 * share, "share": share}
        for feature in features
        for hook, share in ((HOSTILE, 1 - feature / (D_SAE - 1)), ("other:blocks.1", feature / (D_SAE - 1)))
    ]
    work.write_table("decoder_norms.parquet", pd.DataFrame(norms))
    counts = torch.arange(8, dtype=torch.int32).repeat(D_SAE, 1)
    edges = torch.linspace(0, 2, 9).repeat(D_SAE, 1)
    work.write_tensors("histograms.safetensors", {f"{SAE}.counts": counts, f"{SAE}.edges": edges})
    return {"features": D_SAE}


_GROUPS = [("top", 0), ("top", 1), ("q0", 0)]


def _example(feature: int, group: str, rank: int) -> dict:
    activations = np.zeros(N_POS, np.float32)
    activations[1 + rank] = 2.0 - rank
    example = {"sae": SAE, "feature": feature, "group": group, "rank": rank, "activation": 2.0 - rank, "row": 0}
    window = {"token_ids": list(range(N_POS)), "tokens": TOKENS, "activations": activations}
    return example | {"prompt_idx": 5, "pos": 101 + rank, "first_pos": 100} | window


def _lenses(work: Workspace) -> dict:
    return write_lenses(work, TOKENS, N_PAIRS)


def _probes(work: Workspace) -> dict:
    return write_probes(work, HOSTILE, N_PAIRS)


def _steering(work: Workspace) -> None:
    write_steering(work, HOSTILE, N_PAIRS)


def _heads(work: Workspace) -> dict:
    layer, head = np.indices((N_LAYERS, N_HEADS), dtype=np.int32).reshape(2, -1)
    induction = np.linspace(0, 0.9, N_LAYERS * N_HEADS, dtype=np.float32)
    scores = pd.DataFrame({"layer": layer, "head": head, "previous_token": induction[::-1], "induction": induction})
    work.write_table("scores.parquet", scores)
    work.write_json("loss.json", {"first_half": 4.0, "second_half": 0.5})
    pattern = np.tril(np.ones((N_LAYERS, N_HEADS, N_POS, N_POS))) / np.arange(1, N_POS + 1)[:, None]
    labels = {"labels": [TOKENS, TOKENS[:4]]}
    tokens = [np.arange(N_POS), np.arange(4)]
    parts = [pattern, pattern[:, :, :4, :4]]
    write_patterns(work.path("patterns/ioi.zarr"), [0, 2], tokens, parts, (N_LAYERS, N_HEADS), labels)
    write_evidence(work, N_LAYERS, N_HEADS, N_PAIRS)
    return {"induction_score": 0.9}


def _attribution(work: Workspace) -> None:
    write_attribution(work, TOKENS, N_LAYERS, N_HEADS, N_PAIRS)


def _effects(work: Workspace) -> dict:
    rng = np.random.default_rng(0)
    clean, corrupted = np.full(N_PAIRS, 3.0, np.float32), np.full(N_PAIRS, -1.0, np.float32)
    values = rng.normal(size=(N_PAIRS, N_LAYERS, N_POS)).astype(np.float32)
    heads = rng.normal(size=(N_PAIRS, N_LAYERS, N_HEADS)).astype(np.float32)
    arrays = {
        "resid_pre": (("pair", "layer", "pos"), values),
        "head_out": (("pair", "layer", "head"), heads),
        "clean": (("pair",), clean),
        "corrupted": (("pair",), corrupted),
    }
    attributes = {"units": ["resid_pre", "head_out"], "direction": "denoising"}
    dataset = xr.Dataset(arrays, coords={"pair": np.arange(N_PAIRS)}, attrs=attributes)
    dataset.to_zarr(work.path("effects.zarr"), zarr_format=3, consolidated=False)
    pairs = pd.DataFrame({"pair": np.arange(N_PAIRS), "n_pos": N_POS, "source": HOSTILE, "clean": clean})
    pairs = pairs.assign(corrupted=corrupted, answer=" Mary", labels=[TOKENS] * N_PAIRS)
    work.write_table("pairs.parquet", pairs)
    return {"clean_logit_diff": 3.0}


def _circuit(work: Workspace) -> dict:
    edges = pd.DataFrame(
        [
            ("embed", "a0.h1.v", -0.5, True),
            ("a0.h1", "a1.kv0.k", 0.25, True),
            ("a0.h1", "a1.h2.q", -0.3, True),
            ("a1.h2", "logits", -1.0, True),
            ("embed", "m0", 0.01, False),
        ],
        columns=["source", "target", "score", "in_circuit"],
    )
    work.write_table("edges.parquet", edges)
    nodes = pd.DataFrame({"node": ["embed", "a0.h1", "a1.h2", "a1.kv0", "m0", "logits"]})
    work.write_table("nodes.parquet", nodes.assign(kv_node=[None, "a0.kv0", "a1.kv0", None, None, None]))
    sizes = [1, 2, 4, 5]
    curve = {"n_edges": sizes, "faithfulness": [0.0, 0.4, 0.9, 1.0], "random_faithfulness": [0.0, 0.0, 0.2, np.nan]}
    work.write_table("faithfulness.parquet", pd.DataFrame(curve))
    work.write_json("circuit.json", {"direction": "noising"})
    return {"faithfulness": 0.9, "strongest_edge": "a1.h2 -> logits"}

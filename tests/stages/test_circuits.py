import numpy as np
import pytest
import torch
from pydantic import ValidationError

import mi_pipe
from mi_pipe.circuits.circuit_set import CircuitSet
from mi_pipe.circuits.config import CircuitsConfig, ScoreConfig
from mi_pipe.circuits.eap import score_edges
from mi_pipe.circuits.faithfulness import CircuitRunner
from mi_pipe.circuits.parts import find_parts
from mi_pipe.circuits.recording import Pairs
from mi_pipe.core.errors import ConfigError, PromptError, StageError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from stages import circuits as stage
from stages.circuits import STAGE, Inputs
from tests.stages.killed import resume_after_kill
from tests.stages.toys import toy_corpus, toy_task

CONFIG = CircuitsConfig(
    scores=ScoreConfig(max_pairs=6), fractions=(0.05, 0.2, 0.6, 1.0), n_random=2, n_resamples=100, device="cpu",
    batch_pairs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(module_store):
    return module_store


@pytest.fixture(scope="module")
def inputs(toy) -> Inputs:
    return Inputs(*toy)


@pytest.fixture(scope="module")
def found(store, inputs) -> CircuitSet:
    artifact = mi_pipe.open(execute(STAGE, CONFIG, inputs, store).artifact.path)
    assert isinstance(artifact, CircuitSet)
    return artifact


def test_stored_scores_are_means_over_all_pairs_of_both_lengths(found, inputs):
    parts = find_parts(inputs.model.load("cpu"))
    kept = [np.flatnonzero(group.pairs < 6) for group in inputs.task.pair_groups()]
    groups = zip(inputs.task.pair_groups(), kept, strict=True)
    scores = torch.cat([score_edges(parts, Pairs.of(group, torch.device("cpu")))[rows] for group, rows in groups])
    expected = scores.double().mean(0).numpy()[parts.graph.edge_indices]
    edges = found.edges()
    assert len(edges) == parts.graph.n_edges == found.summary["graph_edges"]
    np.testing.assert_allclose(edges["score"], expected, rtol=1e-4, atol=1e-5)
    errors = scores.double().std(0).numpy()[parts.graph.edge_indices] / np.sqrt(6)
    np.testing.assert_allclose(edges["standard_error"], errors, rtol=1e-3, atol=1e-5)
    assert np.array_equal(np.sort(edges["rank"]), np.arange(len(edges)))
    assert edges.loc[edges["rank"] == 0, "score"].abs().item() == edges["score"].abs().max()


def test_the_curve_ends_at_the_whole_model_and_the_smallest_circuit_that_is_enough_is_reported(found):
    curve, circuit = found.faithfulness(), found.circuit()
    assert curve["n_edges"].is_monotonic_increasing
    assert curve["faithfulness"].iloc[-1] == pytest.approx(1, abs=1e-4)
    assert (curve["n_edges_pruned"] <= curve["n_edges"]).all()
    assert (curve["low"] <= curve["high"]).all()
    enough = curve[curve["faithfulness"] >= circuit["threshold"]]
    assert circuit["threshold_met"]
    assert circuit["n_edges_selected"] == enough["n_edges"].iloc[0]
    assert circuit["n_edges"] == found.edges(in_circuit=True).shape[0] == len(circuit["edges"])
    assert circuit["n_nodes"] == found.nodes(in_circuit=True).shape[0] == found.summary["circuit_nodes"]


def test_stored_metrics_are_those_of_the_circuit(found, inputs):
    parts = find_parts(inputs.model.load("cpu"))
    mask = np.zeros_like(parts.graph.edge_mask)
    for edge in found.circuit()["edges"]:
        mask[parts.graph.names[edge["source"]], parts.graph.reader_names[edge["target"]]] = True
    metrics = found.pair_metrics().query("run == 'circuit'")
    metrics = metrics[metrics["n_edges"] == found.circuit()["n_edges_selected"]].set_index("pair")["metric"]
    for group in inputs.task.pair_groups():
        values = CircuitRunner(parts, Pairs.of(group, torch.device("cpu"))).metric(mask).numpy()
        for pair, value in zip(group.pairs, values, strict=True):
            if pair in metrics.index:
                assert metrics[pair] == pytest.approx(value, abs=1e-4)


def test_pair_metrics_hold_every_run_and_give_the_curve(found):
    metrics = found.pair_metrics()
    assert set(metrics["run"]) == {"clean", "corrupted", "circuit", "random"}
    assert (metrics.groupby(["run", "draw", "n_edges"])["pair"].nunique() == 6).all()
    means = metrics.groupby(["run", "n_edges"])["metric"].mean()
    clean, corrupted = means["clean"].item(), means["corrupted"].item()
    for row in found.faithfulness().itertuples():
        f = (means["circuit", row.n_edges] - corrupted) / (clean - corrupted)
        assert row.faithfulness == pytest.approx(f, abs=1e-4)
        if row.fraction < 1:
            f = (means["random", row.n_edges] - corrupted) / (clean - corrupted)
            assert row.random_faithfulness == pytest.approx(f, abs=1e-4)
        else:
            assert np.isnan(row.random_faithfulness)


def test_nodes_sum_up_their_edges(found):
    edges, nodes = found.edges(), found.nodes().set_index("node")
    sums = edges.groupby("source")["score"].sum()
    np.testing.assert_allclose(nodes.loc[sums.index, "score"], sums, rtol=1e-4, atol=1e-5)
    circuit = edges[edges["in_circuit"]]
    assert (nodes.loc[circuit["source"], "in_circuit"]).all()
    assert nodes.loc["logits", "n_in"] == (circuit["target"] == "logits").sum()
    assert nodes["n_out"].sum() == len(circuit)


def test_the_description_says_how_everything_was_measured(found, inputs):
    circuit = found.circuit()
    assert circuit["method"] == "eap"
    assert circuit["ig_convention"] is None
    assert (circuit["direction"], circuit["base_run"], circuit["dtype"]) == ("noising", "clean", "float32")
    assert circuit["ablation"].startswith("patch")
    assert (circuit["model"], circuit["task"]) == (inputs.model.id, inputs.task.id)
    assert "faithfulness=" in repr(found)
    assert "circuit_edges=" in repr(found)


def test_the_convention_of_integrated_gradients_is_part_of_the_result(store, inputs, found):
    scores = {"method": "eap_ig", "ig_steps": 3, "max_pairs": 2}
    results = []
    for convention in ("left", "right"):
        config = CONFIG.model_copy(
            update={"scores": ScoreConfig(**scores, ig_convention=convention), "n_random": 0, "selection": "greedy"}
        )
        result = CircuitSet(execute(STAGE, config, inputs, store).artifact.path)
        assert (result.circuit()["ig_steps"], result.circuit()["ig_convention"]) == (3, convention)
        results.append(result.edges()["score"])
    assert not np.allclose(*results)


def test_device_and_batch_do_not_change_the_id():
    other = CONFIG.model_copy(update={"device": "cuda", "batch_pairs": 1, "tasks": ["ioi"]})
    assert other.identity() == CONFIG.identity()
    assert "threshold" in CONFIG.identity()


def test_sizes_in_edges_come_before_fractions(store, inputs):
    config = CONFIG.model_copy(update={"n_edges": (40, 7), "n_random": 0, "threshold": 5.0})
    result = CircuitSet(execute(STAGE, config, inputs, store).artifact.path)
    assert result.faithfulness()["n_edges"].tolist() == [7, 40]
    assert not result.circuit()["threshold_met"]
    assert result.circuit()["n_edges_selected"] == 40


def test_more_edges_than_the_graph_has_are_refused_before_the_model_loads(store, inputs):
    with pytest.raises(ConfigError, match="9999 is more than the 110 edges"):
        execute(STAGE, CONFIG.model_copy(update={"n_edges": (9999,)}), inputs, store)


@pytest.mark.parametrize("fields", [{"fractions": (0.0,)}, {"fractions": (1.5,)}, {"fractions": ()}, {"n_edges": ()}])
def test_impossible_sizes_are_refused(fields):
    with pytest.raises(ValidationError):
        CircuitsConfig(**fields)


def test_a_corpus_is_refused_before_the_model_loads(store, inputs):
    with pytest.raises(PromptError, match="without clean and corrupted pairs"):
        execute(STAGE, CONFIG, Inputs(model=inputs.model, task=toy_corpus(store, inputs.model)), store)


def test_pairs_that_do_not_differ_are_refused_with_the_reason(store, inputs):
    task = toy_task(store, inputs.model, seed=5)

    class Same(type(task)):
        def _batch(self, indices):
            return super()._batch(indices - indices % 2)

    with pytest.raises(StageError, match="same logit difference"):
        execute(STAGE, CONFIG, Inputs(model=inputs.model, task=Same(task.path)), store)


@pytest.mark.parametrize("kill_at", [9, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_stage_continues_and_ends_with_the_same_bytes(tmp_path, found, inputs, kill_at):
    result = resume_after_kill(stage, CONFIG, inputs, Store(tmp_path / "other"), kill_at)
    assert result.artifact.digest == found.digest
    assert {name: entry.checksum for name, entry in result.artifact.manifest.files.items()} == {
        name: entry.checksum for name, entry in found.manifest.files.items()
    }

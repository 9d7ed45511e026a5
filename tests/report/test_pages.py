import base64
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.store import Store
from mi_pipe.report import attention, attribution, circuit, features, heads, overview, patching, prompts, saes
from mi_pipe.report import lenses as lens_page
from mi_pipe.report import probes as probe_page
from mi_pipe.report.layered import folded, layered_graph
from mi_pipe.report.lineage import lineage
from mi_pipe.report.overview import Recipe
from mi_pipe.report.site import page_plans
from tests.report.samples import (
    D_SAE,
    HOSTILE,
    N_HEADS,
    N_LAYERS,
    N_PAIRS,
    N_POS,
    SAE,
    TOKENS,
    sample_activations,
    sample_exchange,
    sample_imported_saes,
    sample_sweep,
)

RECIPE = Recipe("r", "", "")


def of(artifacts, stage):
    return [item for item in artifacts if item.manifest.stage == stage]


def test_pages_are_those_of_the_stages_that_are_there(artifacts):
    def slugs(items):
        return [plan.slug for plan in page_plans(items, [], RECIPE, 10, 2)]

    assert slugs([]) == ["index"]
    assert slugs(of(artifacts, "heads")) == ["index", "heads", "attention"]
    everything = [
        "index",
        "model",
        "prompts",
        "saes",
        "features",
        "lenses",
        "probes",
        "heads",
        "attention",
        "patching",
        "attribution",
        "circuit",
        "steering",
    ]
    assert slugs(list(reversed(artifacts))) == everything


def test_harvests_imports_and_captures_share_the_page_of_activations(tmp_path):
    store = Store(tmp_path / "s")
    stores = [*sample_exchange(store), sample_activations(store)]
    plans = page_plans(list(reversed(stores)), [], RECIPE, 10, 2)
    assert [plan.slug for plan in plans] == ["index", "activations"]
    sections = plans[1].make().context["stores"]
    assert [section["id"].rpartition("-")[0] for section in sections] == ["harvest", "import_activations", "capture"]
    harvested, imported, captured = sections
    assert (harvested["origin"], imported["origin"]) == ("", f"imported of {HOSTILE}")
    assert captured["origin"].startswith("captured of module-")
    assert harvested["precision"] is not None
    assert imported["precision"] is None
    assert captured["precision"] is None
    assert [massive["tokens"] for massive in captured["massive"]] == [[]], "its items are no tokens"
    assert imported["massive"][0]["tokens"] == [(HOSTILE, 1)]


def test_imported_saes_share_the_page_of_saes_with_and_without_figures(tmp_path, artifacts):
    store = Store(tmp_path / "s")
    measured, unmeasured = sample_imported_saes(store)
    [trained] = of(artifacts, "train_saes")

    def context(*sets):
        [_, plan] = page_plans(list(sets), [], RECIPE, 10, 2)
        assert plan.slug == "saes"
        return plan.make().context

    assert context(unmeasured)["groups"] == {}
    assert context(unmeasured)["n_tokens"] is None
    assert context(measured)["groups"] == {"Evaluation": ["l0-fvu"]}
    both = context(trained, measured, unmeasured)
    assert both["groups"] == context(trained)["groups"]
    assert both["groups"]["Evaluation"] == ["l0-fvu", "l0-ce-recovered"]
    assert len(both["evaluation"]) == 3
    titles = both["evaluation"]["sae"].tolist()
    assert len(set(titles)) == 3, "the same SAE's name in three sets"


def test_saes_of_a_sweep_that_differ_in_sparsity_are_joined_to_a_line(tmp_path):
    page = saes.page([sample_sweep(Store(tmp_path / "s"))])
    assert page.context["groups"]["Evaluation"] == ["l0-fvu", "l0-ce-recovered", "l0-kl"]
    data = page.figures[0].data
    assert data["family"].tolist() == [kind for kind in ("topk", "standard", HOSTILE) for _ in range(3)]
    assert data["l0"].tolist() == [8, 16, 32] * 3
    assert data["sae"].tolist()[:2] == ["L0.topk.k8", "L0.topk.k16"]


def test_curves_show_what_there_is_and_once_what_is_the_same(tmp_path):
    page = saes.page([sample_sweep(Store(tmp_path / "s"))])
    assert page.context["groups"]["Loss"] == ["loss", "reconstruction", "sparsity"]
    assert page.context["groups"]["Optimisation"] == ["grad-norm", "lr", "coefficient"]
    figures = {figure.name: figure for figure in page.figures}
    assert set(figures["lr"].data["sae"]) == {"all SAEs"}
    assert figures["lr"].data["lr"].tolist() == [1e-4, 5e-5]
    assert figures["grad-norm"].data["sae"].nunique() == 9
    assert not any("topk" in sae for sae in figures["coefficient"].data["sae"])
    held_out = ["held-out-fvu", "held-out-l0", "held-out-ce-recovered", "held-out-kl", "held-out-density"]
    assert page.context["groups"]["On held-out rows during training"] == held_out


def test_densities_are_those_of_the_last_moment(tmp_path):
    page = saes.page([sample_sweep(Store(tmp_path / "s"))])
    (figure,) = [item for item in page.figures if item.name == "held-out-density"]
    one = figure.data[figure.data["sae"] == "L0.standard.k16"]
    assert one["log10_density"].tolist() == [-1.875, -0.875], "the middle of bins a quarter wide"
    assert one["n_features"].tolist() == [40, 60]
    assert "20 features of an SAE never fire" in figure.caption


def test_features_with_dashboards_are_spread_over_density_and_never_dead():
    rows = pd.DataFrame({"feature": range(10), "density": np.linspace(0, 0.9, 10), "is_dead": [True] + [False] * 9})
    assert features.chosen(rows, 100).tolist() == list(range(1, 10))
    assert features.chosen(rows, 3).tolist() == [1, 5, 9]
    assert features.chosen(rows, 0).tolist() == []


def test_dashboards_hold_what_the_tables_hold(artifacts):
    page = features.page(of(artifacts, "score_features"), n_features=D_SAE)
    scripts = dict(page.scripts)
    keys = list(scripts)
    assert [key.rpartition("/")[2] for key in keys] == ["index", "0", "1"]
    index = scripts[keys[0]]
    assert index["feature"] == list(range(D_SAE))
    assert index["place"][7] == -1
    assert index["dead"][7] == 1
    assert index["tokens"][0] == [HOSTILE, TOKENS[2]]
    assert index["promoted"][0] == TOKENS[:3]
    first = scripts[keys[1]]
    group, activation, prompt, first_pos, peak, tokens, places, values = first["dashboards"][0]["examples"][0]
    assert (group, activation, prompt, first_pos, peak) == ("top", 2.0, 5, 100, 1)
    assert [first["tokens"][i] for i in tokens] == TOKENS
    assert (places, values) == ([1], [2.0])
    assert first["dashboards"][0]["effects"]["suppressed"][0] == [TOKENS[0], -1.0]
    assert first["dashboards"][0]["counts"] == list(range(8))
    assert len(first["dashboards"]) == 50
    assert set(scripts[keys[2]]["dashboards"]) == set(range(51, D_SAE))
    assert SAE not in keys[0]


def test_crosscoders_show_which_features_are_shared(artifacts):
    """Feature f of 60 has the share f / 59 at the second hook point; feature 7, at 0.12, is dead."""
    page = features.page(of(artifacts, "score_features"), n_features=D_SAE)
    own = [sum(f / 59 < 0.1 for f in range(D_SAE)), sum(f / 59 > 0.9 for f in range(D_SAE))]
    assert page.context["shares"].to_numpy().tolist() == [
        [SAE, f"only at {HOSTILE}", own[0]],
        [SAE, "only at other:blocks.1", own[1]],
        [SAE, "shared", D_SAE - 1 - sum(own)],
    ]
    (figure,) = [item for item in page.figures if item.name.startswith("decoder-share")]
    assert figure.data["other:blocks.1"].sum() == D_SAE - 1
    index, first, _ = (payload for _, payload in page.scripts)
    assert index["share"][:2] == [0.0, 0.01695]
    assert first["dashboards"][1]["norms"] == [[HOSTILE, 1.966, 0.9831], ["other:blocks.1", 0.0339, 0.01695]]


def test_features_scored_before_decoder_norms_were_kept_have_none(artifacts, tmp_path):
    (found,) = of(artifacts, "score_features")
    files = {name: entry for name, entry in found.manifest.files.items() if name != "decoder_norms.parquet"}
    old = Artifact(found.path, found.manifest.model_copy(update={"files": files}))
    page = features.page([old], n_features=3)
    assert page.context["saes"][0]["hooks"] == []
    assert page.context["shares"].empty
    index, first = (payload for _, payload in page.scripts)
    assert index["share"] == []
    assert {tuple(board["norms"]) for board in first["dashboards"].values()} == {()}


def test_saes_of_two_artifacts_are_told_apart(artifacts):
    found = of(artifacts, "score_features")
    page = features.page(found, 0)
    assert [sae["name"] for sae in page.context["saes"]] == [SAE]
    twice = features.page([*found, *found], 0)
    assert twice.context["saes"][0]["name"] == f"{found[0].id} {SAE}"


def test_packed_patterns_are_lower_triangles_to_sixteen_bits():
    rng = np.random.default_rng(0)
    pattern = rng.random((2, 5, 5)) * np.tril(np.ones((5, 5)))
    for head, text in zip(pattern, attention.packed(pattern), strict=True):
        levels = np.frombuffer(base64.b64decode(text), "<u2")
        expected = [head[query, key] for query in range(5) for key in range(query + 1)]
        np.testing.assert_allclose(levels / 65535, expected, atol=1e-5)


def test_mean_distance_is_that_of_a_loop_and_leaves_padding_out():
    rng = np.random.default_rng(0)
    pattern = rng.random((1, 1, 4, 4)) * np.tril(np.ones((4, 4)))
    padded = np.full((1, 1, 6, 6), np.nan)
    padded[:, :, :4, :4] = pattern
    expected = np.mean([sum(pattern[0, 0, q, k] * (q - k) for k in range(q + 1)) for q in range(1, 4)])
    assert attention.mean_distance(padded)[0, 0] == pytest.approx(expected)


def test_the_viewer_has_a_script_for_each_layer_of_each_prompt(artifacts):
    page = attention.page(of(artifacts, "heads"), n_prompts=2)
    task = page.context["view"]["tasks"][0]
    assert task["prompts"] == [TOKENS, TOKENS[:4]]
    scripts = dict(page.scripts)
    assert len(scripts) == 2 * N_LAYERS
    assert len(scripts[f"{task['key']}/p1-0"]) == N_HEADS
    assert len(base64.b64decode(scripts[f"{task['key']}/p1-0"][0])) == 2 * (4 * 5 // 2)


def test_strongest_heads_are_in_order(artifacts):
    table = of(artifacts, "heads")[0].read_table("scores.parquet")
    assert [head["name"] for head in heads.strongest(table, "induction", 3)] == ["1.2", "1.1", "1.0"]
    assert heads.score_names(table) == ["previous_token", "induction"]


def test_patching_heatmaps_are_the_recovered_fraction(artifacts):
    effects = of(artifacts, "patch")[0]
    figures = {figure.name.partition("-")[0]: figure for figure in reversed(patching.page([effects]).figures)}
    values = effects.to_xarray()["resid_pre"].to_numpy().mean(0)
    expected = (values - -1.0) / (3.0 - -1.0)
    np.testing.assert_allclose(np.array(figures["resid_pre"].view["values"]), expected, rtol=1e-4)
    assert figures["resid_pre"].view["low"] == -figures["resid_pre"].view["high"]
    assert len(figures["resid_pre"].view["columns"]) == N_POS


def test_attribution_heatmaps_are_fractions_of_the_runs_difference_and_paths_have_a_column_for_mlps(artifacts):
    found = of(artifacts, "attribute")[0]
    page = attribution.page([found])
    figures = {figure.name.partition("-")[0]: figure for figure in page.figures}
    whole = found.to_xarray()["z_whole"].to_numpy().mean(0)
    np.testing.assert_allclose(np.array(figures["z"].view["values"]), whole / 4.0, rtol=1e-3, atol=1e-4)
    by_pos = found.to_xarray()["attn_out"].to_numpy().mean(0)
    np.testing.assert_allclose(np.array(figures["attn_out"].view["values"]), by_pos / 4.0, rtol=1e-3, atol=1e-4)
    assert figures["paths0"].view["columns"] == ["0", "1", "2", "mlp"]
    assert figures["paths0"].view["values"][1][3] == pytest.approx(7 / 8)
    shown = page.context["sections"][0]["verified"]
    assert shown["exact, absolute"].is_monotonic_decreasing
    assert list(shown.columns[2:4]) == ["estimate", "exact"]


def test_lens_maps_are_means_over_prompts_of_one_length_and_curves_are_of_the_last_token(artifacts):
    [found] = of(artifacts, "lenses")
    page = lens_page.page([found])
    figures = {figure.name.rpartition("-0-lenses")[0]: figure for figure in page.figures}
    data = found.to_xarray("ioi")
    kl = data["kl"].to_numpy()[:, : N_PAIRS - 1].mean(1)
    np.testing.assert_allclose(np.array(figures["kl-map-logit"].view["values"]), kl[0], rtol=1e-4)
    assert figures["kl-map-tuned"].view["values"][-1] == [None] * N_POS, "the last depth has no translator"
    assert figures["kl-map-tuned"].view["high"] == figures["kl-map-logit"].view["high"]
    assert figures["kl-map-logit"].view["columns"][0] == TOKENS[0]
    answer = data["log_prob"].sel(lens="logit", choice="answer", depth=1).to_numpy()
    ends = [*answer[:-1, N_POS - 1], answer[-1, N_POS - 3]]
    curve = figures["answer"].data.query("token == 'answer, logit lens' and depth == 1")
    assert curve["log_prob"].item() == pytest.approx(np.mean(ends))
    places = data["rank"].sel(lens="logit", choice="answer", depth=1).to_numpy() + 1
    drawn = figures["place"].data.query("lens == 'logit lens' and depth == 1")["place"].item()
    assert drawn == np.median([*places[:-1, N_POS - 1], places[-1, N_POS - 3]])
    assert page.context["sections"][0]["tasks"][0]["n_mapped"] == N_PAIRS - 1


def test_prompts_are_read_token_by_token_and_the_next_token_is_marked(artifacts):
    [found] = of(artifacts, "lenses")
    [task] = lens_page.page([found]).context["sections"][0]["tasks"]
    grid = task["grids"][0]
    assert grid["tokens"] == TOKENS
    assert grid["answer"] == TOKENS[0]
    assert [row["depth"] for row in grid["lenses"]["logit"]] == [0, 1, 2]
    assert [row["depth"] for row in grid["lenses"]["tuned"]] == [0, 1]
    data = found.to_xarray("ioi").sel(lens="tuned", prompt=0, depth=1)
    cells = grid["lenses"]["tuned"][1]["cells"]
    assert [cell["text"] for cell in cells] == [TOKENS[i] for i in data["top_id"].to_numpy()[:, 0]]
    assert [cell["is_next"] for cell in cells] == (data["rank"].sel(choice="next").to_numpy() == 0).tolist()
    assert cells[3]["probability"] == pytest.approx(float(np.exp(data["top_log_prob"][3, 0])))


def test_probes_stand_beside_their_control_task_and_the_best_is_chosen_on_validation(artifacts):
    [found] = of(artifacts, "probes")
    page = probe_page.page([found])
    figures = {figure.name.rpartition("-probes-")[0]: figure for figure in page.figures}
    labels = page.context["sections"][0]["labels"]
    assert [(label["name"], label["figure"]) for label in labels] == [(HOSTILE, "accuracy"), ("place", "R²")]
    curve = figures["test-0-0"].data.set_index(["probe", "layer"])
    assert curve.loc[("linear", 1), "value"] == pytest.approx(0.7)
    assert curve.loc[("linear, control", 1)][["value", "low", "high"]].tolist() == pytest.approx([0.5, 0.4, 0.6])
    assert set(curve.index.get_level_values(0)) == {
        "linear",
        "linear, control",
        "MLP",
        "MLP, control",
        "commonest class",
    }
    assert "commonest class" not in figures["test-0-1"].data["probe"].tolist(), "a number has no classes"
    assert labels[0]["best"]["hook"].tolist() == ["blocks.1.hook_resid_post"] * 4
    assert figures["selectivity-linear-0"].view["columns"] == ["last", figures["test-mlp-0"].view["columns"][1]]
    assert labels[1]["maps"] == [], "one position"
    assert set(figures["l2-0"].data["rows"]) == {"training", "validation", "training, control", "validation, control"}


def test_causal_checks_are_changes_against_the_model_left_alone(artifacts):
    [found] = of(artifacts, "probes")
    figures = {figure.name.rpartition("-probes-")[0]: figure for figure in probe_page.page([found]).figures}
    by_amount = figures["moved-0"].data.set_index(["direction", "amount"])["value"]
    assert by_amount["along the probe"].tolist() == [-2, 0, 2], "at layer 1, chosen on validation"
    assert by_amount["along a random direction"].tolist() == [0, 0, 0]
    by_layer = figures["moved-layers-0"].data.set_index(["direction", "layer"])["value"]
    assert by_layer["along the probe"].tolist() == [1, 2]
    assert figures["carried-0"].view["values"] == [[1.0, 0.5], [None, 1.0]]


def test_samples_mark_labelled_positions(artifacts):
    found = prompts.page(of(artifacts, "generate_prompts"), n_samples=1).context["sets"][0]
    assert [sample["role"] for sample in found["samples"]] == ["clean", "corrupted"]
    assert [token["mark"] for token in found["samples"][0]["tokens"]][:3] == ["io", "", ""]


def test_a_circuit_is_laid_out_from_embedding_to_logits(artifacts):
    found = of(artifacts, "circuits")[0]
    edges = found.read_table("edges.parquet")
    graph = layered_graph(edges[edges["in_circuit"]], found.read_table("nodes.parquet"), helping_sign=-1.0)
    heights = {node.name: node.y for node in graph.nodes}
    assert sorted(heights, key=heights.get, reverse=True) == ["embed", "a0.h1", "a1.kv0", "a1.h2", "logits"]
    assert [(edge.source, edge.target, edge.part) for edge in graph.feeds] == [("a1.kv0", "a1.h2", "feeds")]
    widest = max(graph.edges, key=lambda edge: edge.width)
    assert (widest.source, widest.target, widest.part) == ("a1.h2", "logits", "helps")
    assert {edge.part for edge in graph.edges if edge.score > 0} == {"hinders"}
    assert all(0 <= node.x <= graph.width and 0 <= node.y <= graph.height for node in graph.nodes)


def test_an_empty_circuit_can_be_drawn(artifacts):
    found = of(artifacts, "circuits")[0]
    graph = layered_graph(found.read_table("edges.parquet").head(0), found.read_table("nodes.parquet"), 1.0)
    assert (graph.nodes, graph.edges, graph.n_hidden) == ([], [], 0)
    assert circuit.page([found]).figures


@pytest.mark.parametrize(
    ("reader", "node"), [("a1.kv0.k", ("a1.kv0", "k")), ("m3", ("m3", "")), ("logits", ("logits", ""))]
)
def test_readers_belong_to_nodes(reader, node):
    assert folded(reader) == node


def test_lineage_puts_each_artifact_right_of_its_inputs(artifacts):
    drawn = lineage(artifacts)
    place = {box.id: box for box in drawn.boxes}
    assert len(place) == len(artifacts)
    assert drawn.curves
    assert all(source.x + source.width < target.x for source, target in drawn.curves)
    assert len({(box.x, box.y) for box in drawn.boxes}) == len(drawn.boxes)


def test_inputs_from_outside_the_report_are_in_the_lineage(artifacts):
    drawn = lineage(of(artifacts, "heads"))
    assert {box.stage for box in drawn.boxes} == {"heads", "train_model", "generate_prompts"}


def test_the_overview_tells_sizes_times_and_models(artifacts):
    context = overview.page(artifacts, [], RECIPE).context
    assert context["total_bytes"] == sum(item.size_bytes for item in artifacts)
    assert list(context["models"]) == [of(artifacts, "train_model")[0].id]
    assert "torch" in context["versions"]


class Elements(HTMLParser):
    """Counts what a page's text becomes when it is parsed."""

    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

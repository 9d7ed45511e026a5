"""Recipes with steering: directions of every source, cached, reported; mistakes are one sentence before any work."""

import numpy as np
import pytest

import mi_pipe
from tests.flows.test_cli import command, only_line  # noqa: F401 (a fixture)
from tests.flows.test_given import ids, write
from tests.flows.test_readings import HARVEST, PAIRS, TOY

HOOK = "blocks.0.hook_resid_post"
CONTRAST = {"prompts": "mine", "positive": "role == 'clean'", "negative": "role == 'corrupted'"}
PROBES = {"labels": {"clean": {"where": "role == 'clean'"}}, "hooks": [HOOK], "fit": {"l2": [0.1]}, "device": "cpu"}
SAES = {"hooks": [HOOK], "d_sae": 32, "k": 4, "n_tokens": 2048, "batch_rows": 256, "device": "cpu"}
SAE = "L0.resid_post.topk.k4.d32.s0"
STEERING = {
    "directions": {
        "contrast": {"hook": HOOK, "contrast": CONTRAST},
        "probe": {"hook": HOOK, "probe": {"label": "clean"}},
        "feature": {"feature": {"sae": SAE, "index": 3}, "scale": "norm"},
    },
    "coefficients": [-1, 1],
    "max_pairs": 4,
    "perplexity": {"n_prompts": 3},
    "generation": {"n_prompts": 1, "n_tokens": 3},
    "device": "cpu",
}
TEXT = {**PAIRS, "n_pairs": 30, "seed": 1}
SECTIONS = {"train_model": TOY, "prompts": TEXT, "tasks": {"mine": PAIRS}, "harvest": HARVEST}


def test_directions_of_every_source_are_run_cached_and_reported(command, tmp_path):  # noqa: F811
    recipe = write(tmp_path / "r.yaml", **SECTIONS, probes=PROBES, saes=SAES, steering=STEERING, report={})
    code, out, err = command("run", recipe, "--no-prefect")
    assert code == 0, err
    assert "metric_there" in out
    steps = ids(command("plan", recipe, "--json")[1])
    found = mi_pipe.open(steps["steering"])
    assert set(found.inputs) == {"model", "tasks.0", "prompts", "contrasts.0", "probes", "saes"}
    unit = mi_pipe.open(steps["probes"]).direction("clean", HOOK, "last")
    np.testing.assert_allclose(found.direction("probe").unit, unit, atol=1e-6)
    row = mi_pipe.open(steps["saes"])[SAE].W_dec[3]
    np.testing.assert_allclose(found.direction("feature").unit, row / row.norm(), atol=1e-6)
    kinds = found.directions().set_index("direction")["kind"].to_dict()
    assert kinds == {
        **{name: name for name in STEERING["directions"]},
        **{f"{name}~random0": "random" for name in STEERING["directions"]},
    }
    code, out, _ = command("run", recipe, "--no-prefect")
    assert {line.split()[2] for line in out.splitlines() if line[0] in "=+"} == {"Cached"}
    assert steps["steering"] in mi_pipe.open(steps["report"]).file("steering.html").read_text()
    with_probes = {**STEERING, "directions": {"probe": STEERING["directions"]["probe"]}, "probes": steps["probes"]}
    given = write(tmp_path / "g.yaml", train_model=TOY, prompts=TEXT, steering=with_probes)
    code, _, err = command("run", given, "--no-prefect")
    assert code == 0, err
    other = mi_pipe.open(ids(command("plan", given, "--json")[1])["steering"])
    assert other.inputs["probes"].id == steps["probes"]
    assert other.measures == ["loss"]


def directions(**changes) -> dict:
    return {"directions": {"a": {"hook": HOOK, **changes}}, "device": "cpu"}


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"directions": {}}, "directions"),
        (directions(feature={"sae": SAE, "index": 1}), "add a section 'saes' or 'trained_saes'"),
        (directions(probe={"label": "clean"}), "add a section 'probes'"),
        (directions(contrast={**CONTRAST, "prompts": "min"}), "Did you mean 'mine'"),
        (directions(contrast={**CONTRAST, "positive": ["5"]}), "both lists of texts"),
        ({**directions(contrast=CONTRAST), "tasks": ["min"]}, "steering.tasks names 'min'"),
        ({**directions(contrast=CONTRAST), "metric": "logit_dif"}, "Did you mean 'logit_diff'"),
        ({**directions(contrast=CONTRAST), "probes": "prob-0"}, "prob-0"),
        (directions(contrast=CONTRAST, hook="blocks.9.hook_resid_post"), "layers 0 to 1"),
        (directions(contrast=CONTRAST, hook="blocks.0.attn.hook_pattern"), "could be steered"),
    ],
)
def test_mistakes_are_told_in_a_line_before_any_work(command, tmp_path, steering, message):  # noqa: F811
    recipe = write(tmp_path / "r.yaml", **SECTIONS, steering=steering)
    code, out, err = command("plan", recipe)
    assert code == 2, out
    assert message in only_line(err)


def test_a_probe_is_taken_where_the_section_probes_reads(command, tmp_path):  # noqa: F811
    read_at = {"everywhere": ["all"], "twice": ["all", "0"], "each": ["each"]}
    wanted = {"everywhere": None, "twice": "probe.position is 'last'", "each": "probe.position is 'lst'"}
    for name, positions in read_at.items():
        label = {"label": "clean", **({"position": "lst"} if name == "each" else {})}
        probes = {**PROBES, "positions": positions}
        recipe = write(tmp_path / f"{name}.yaml", **SECTIONS, probes=probes, steering=directions(probe=label))
        code, _, err = command("plan", recipe)
        assert code == (2 if wanted[name] else 0), err
        assert (wanted[name] or "") in err

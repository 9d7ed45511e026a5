"""The page of steering: its curves are the effects, its texts are escaped."""

import numpy as np
import pytest

from mi_pipe.report import steering
from mi_pipe.report.html import render
from mi_pipe.report.page import PagePlan
from mi_pipe.report.writer import SiteHeader
from mi_pipe.steering.steering import Steering
from tests.report.samples import HOSTILE


@pytest.fixture(scope="module")
def found(artifacts) -> Steering:
    (artifact,) = (item for item in artifacts if item.manifest.stage == "steer")
    return artifact


def test_curves_are_changes_and_perplexity_is_the_exponential_of_the_loss(found):
    metric, perplexity, cost = steering.page([found]).figures
    stored = found.to_xarray("ioi")["metric"].mean("pair").to_numpy()
    np.testing.assert_allclose(metric.data["mean"], stored.reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(metric.data["change"], (stored - stored[:, [1]]).reshape(-1), atol=1e-6)
    losses = found.to_xarray("loss")
    weighted = ((losses["loss"] * losses["n_tokens"]).sum("prompt") / losses["n_tokens"].sum()).to_numpy()
    np.testing.assert_allclose(perplexity.data["perplexity"], np.exp(weighted.reshape(-1)), rtol=1e-5)
    np.testing.assert_allclose(perplexity.data["factor"], np.exp(weighted - weighted[:, [1]]).reshape(-1), rtol=1e-5)
    assert (perplexity.data["low"] <= perplexity.data["factor"]).all()
    n_tokens = int(losses["n_tokens"].sum())
    assert f"The model's own is {np.exp(weighted[0, 1]):.4g} (" in perplexity.caption
    assert f"on {n_tokens:,} tokens." in perplexity.caption
    here = cost.data[(cost.data["direction"] == HOSTILE) & (cost.data["coefficient"] == 1)].iloc[0]
    assert here["change"] == pytest.approx(2.0, abs=1e-6)
    assert here["loss"] == pytest.approx(2.0, abs=1e-6)


def test_texts_stand_prompt_by_prompt_and_are_escaped(found):
    page = steering.page([found])
    (section,) = page.context["sections"]
    (texts,) = section["texts"]
    assert [list(item["frame"]["coefficient"]) for item in texts["prompts"]] == [[-1, 0, 1]] * 3
    assert len(page.tables[f"texts-{section['slug']}"]) == 30
    plan = PagePlan("steering", "Steering", lambda: page)
    figures = {
        figure.name: {"name": figure.name, "title": figure.title, "alt": figure.alt, "caption": figure.caption}
        | {"svg": "", "png": "", "csv": "", "view": None}
        for figure in page.figures
    }
    context = {
        "plan": plan,
        "site": SiteHeader("r", "", [plan]),
        "figures_of": figures,
        "tables": dict.fromkeys(page.tables, ""),
    }
    html = render("steering.html", page.context | context)
    assert HOSTILE not in html
    assert "&lt;/script&gt;&lt;img" in html

"""The page of a model trained by the pipeline: its sizes and its loss over training."""

from collections.abc import Sequence
from typing import Any

from mi_pipe.models.trained import TrainedModel
from mi_pipe.report.figures import Figure, lines
from mi_pipe.report.html import slug
from mi_pipe.report.naming import name_of
from mi_pipe.report.page import Page

_SIZES = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "positional_embedding_type", "seed")


def page(models: Sequence[TrainedModel]) -> Page:
    """Make the page of one or more trained models."""
    return Page(
        context={"models": [_section(model) for model in models]},
        figures=[_loss(model) for model in models],
    )


def _section(model: TrainedModel) -> dict[str, Any]:
    fields = model.native_config()
    return {
        "name": name_of(model),
        "id": model.id,
        "sizes": {key: fields[key] for key in _SIZES if fields.get(key) is not None},
        "summary": model.summary,
        "figure": f"loss-{slug(model.id)}",
    }


def _loss(model: TrainedModel) -> Figure:
    frame = model.read_table("training.parquet")
    columns = [str(column) for column in frame.columns if str(column).endswith("loss")]
    first, last = frame[columns[0]].iloc[[0, -1]]
    return lines(
        f"loss-{slug(model.id)}",
        "Loss over training",
        f"Line chart of training loss against step: the {columns[0]} goes from {first:.3g} to {last:.3g}.",
        frame,
        "step",
        columns,
        x_title="step",
        y_title="cross-entropy (nats)",
        from_zero=True,
    )

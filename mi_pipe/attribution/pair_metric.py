"""The metric of the runs of some pairs: a metric of patching with what it must know of each pair."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.models.model import Model
from mi_pipe.patching.metrics import Metric, PairInfo, metric_of_logits
from mi_pipe.patching.readout import last_logits
from mi_pipe.prompts.prompt_set import PairGroup


@dataclass(frozen=True)
class PairMetric:
    """Callable on last-position logits of all pairs, or of rows of which each is some pair's."""

    metric: Metric
    info: PairInfo

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, group: PairGroup, metric: Metric) -> "PairMetric":
        """Collect what the metric needs; the clean prompts are run where it needs all logits."""
        answers, wrongs = (tokens[:, None].to(model.device) for tokens in (group.answer, group.wrong))
        clean = last_logits(model, group.clean.to(model.device), use_cache=False) if metric.needs_all_logits else None
        return cls(metric, PairInfo(answers, wrongs, clean))

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], rows: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, " row"]:
        """Return the metric of each row; `rows` says which pair each row is of, None that they are all pairs."""
        return metric_of_logits(self.metric, logits, self.info if rows is None else self.info.rows(rows))

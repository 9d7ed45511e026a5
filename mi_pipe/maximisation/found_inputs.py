"""What input maximisation found, with what is left of it in tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FoundInputs:
    """Inputs of several restarts; values are the objective, activations what the target is (they differ for SAEs)."""

    target: str
    prefix: str
    """Text of the tokens before the free positions."""
    curve: Float[np.ndarray, "restart step"]
    """The objective from the start on."""
    embeddings: Float[Tensor, "restart pos d_model"]
    """The best embeddings of each restart."""
    soft: Float[np.ndarray, " restart"]
    """Their objective."""
    soft_activation: Float[np.ndarray, " restart"]
    nearest_activation: Float[np.ndarray, " restart"]
    """Of the tokens nearest to these embeddings."""
    token_ids: Int[np.ndarray, "restart pos"]
    """The best tokens seen."""
    tokens: Float[np.ndarray, " restart"]
    """Their objective."""
    tokens_activation: Float[np.ndarray, " restart"]
    near_ids: Int[np.ndarray, "restart pos near"]
    near_cosines: Float[np.ndarray, "restart pos near"]
    text_of: Callable[[int], str]

    def table(self) -> pd.DataFrame:
        """Return one line a restart, the best tokens first.

        `start` and `soft` are the objective before and after, `soft_activation`, `nearest_activation` and
        `tokens_activation` the target's activation at the embeddings, at the tokens nearest to them, and at the best
        tokens seen, whose `text` comes last.
        """
        frame = pd.DataFrame(
            {
                "restart": np.arange(len(self.soft)),
                "start": self.curve[:, 0],
                "soft": self.soft,
                "soft_activation": self.soft_activation,
                "nearest_activation": self.nearest_activation,
                "tokens_activation": self.tokens_activation,
                "text": ["".join(map(self.text_of, row)) for row in self.token_ids.tolist()],
            }
        )
        order = np.argsort(-self.tokens, kind="stable")
        return frame.iloc[order].reset_index(drop=True)

    def nearest(self, restart: int | None = None) -> pd.DataFrame:
        """Return the tokens nearest to each position of a restart (default: that of the best embeddings).

        One line a position and rank: `pos` (from 0, the first free one), `rank`, `token_id`, `token`, `cosine`.
        """
        chosen = int(self.soft.argmax()) if restart is None else restart
        ids = self.near_ids[chosen]
        pos, rank = (axis.ravel() for axis in np.indices(ids.shape))
        texts = [self.text_of(token) for token in ids.ravel().tolist()]
        cosines = self.near_cosines[chosen].ravel()
        return pd.DataFrame({"pos": pos, "rank": rank, "token_id": ids.ravel(), "token": texts, "cosine": cosines})

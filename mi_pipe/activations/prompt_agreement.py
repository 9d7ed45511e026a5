"""Whether a store's rows are tokens of a prompt set: known from a harvest's manifest, else compared token by token."""

import numpy as np

from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.prompts.prompt_set import PromptSet


def check_prompts(store: ActivationStore, prompts: PromptSet) -> None:
    """Raise ConfigError unless each row of `store` is the token that `prompts` has at its prompt and position.

    A harvest says which prompts it was made of; of an import every row is compared.
    """
    if (made_of := store.inputs.get("prompts")) is not None:
        if made_of.id != prompts.id:
            raise ConfigError(f"The activations {store.id} were harvested on {made_of.id}, not on {prompts.id}.")
        return
    if store.n_prompts > prompts.n_prompts:
        raise ConfigError(
            f"The activations {store.id} are of {store.n_prompts:,} prompts, of which {prompts.id} has "
            f"{prompts.n_prompts:,}: they belong to other prompts."
        )
    place = prompts.offsets[store.prompt_idx] + store.pos
    is_within = place < prompts.offsets[store.prompt_idx + 1]
    differs = ~is_within
    differs[is_within] = prompts.token_ids[place[is_within]] != store.token_id[is_within]
    if differs.any():
        row = int(np.flatnonzero(differs)[0])
        raise ConfigError(
            f"Row {row:,} of {store.id} (prompt {store.prompt_idx[row]}, position {store.pos[row]}) is token "
            f"{store.token_id[row]}, and {prompts.id} has another or none there: they belong to other prompts."
        )

"""Of which model and which prompts the rows of a store are, as far as that is known.

A harvest's manifest has both as inputs; an import has what its files said, which may be nothing or a note by a person.
"""

from mi_pipe.activations.store import ActivationStore


def model_id(store: ActivationStore) -> str | None:
    """Return the id of the model that the rows come from, or None if it is not known."""
    return _known(store, "model", ("model-", "train_model-", "module-"))


def prompts_id(store: ActivationStore) -> str | None:
    """Return the id of the prompts whose tokens the rows are, or None if it is not known."""
    return _known(store, "prompts", ("generate_prompts-",))


def _known(store: ActivationStore, role: str, beginnings: tuple[str, ...]) -> str | None:
    ref = store.inputs.get(role)
    name = ref.id if ref is not None else str(store.group.attrs.get(role, ""))
    return name if name.startswith(beginnings) else None

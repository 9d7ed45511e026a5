"""What an activation store shows of itself in a terminal and in a notebook: no values are read for it."""

import html
from typing import TYPE_CHECKING

from mi_pipe.core.artifact import format_size

if TYPE_CHECKING:
    from mi_pipe.activations.store import ActivationStore

_MOST_HOOKS = 12


def as_text(store: "ActivationStore") -> str:
    """Return a headline and a line a hook point."""
    hooks = [f"  {hook} ({store.width(hook)})" for hook in store.hooks[:_MOST_HOOKS]]
    rest = len(store.hooks) - len(hooks)
    return "\n".join([f"<{type(store).__name__} {store.id}: {_headline(store)}", *hooks, *_more(rest)]) + ">"


def as_html(store: "ActivationStore") -> str:
    """Return a table, everything escaped."""
    lines = [
        f"<tr><td><code>{html.escape(hook)}</code></td><td>{store.width(hook):,}</td>"
        f"<td>{html.escape(str(store.array(hook).layout.token_shape))}</td></tr>"
        for hook in store.hooks
    ]
    return (
        f"<p><strong>{html.escape(store.id)}</strong>: {html.escape(_headline(store))}</p>"
        "<table><thead><tr><th>hook point</th><th>width</th><th>shape of a token</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _headline(store: "ActivationStore") -> str:
    return (
        f"{store.n_rows:,} rows of {store.n_prompts:,} prompts, {store.dtype}, {format_size(store.size_bytes)}, "
        f"{len(store.hooks)} hook point{'s' if len(store.hooks) != 1 else ''}"
    )


def _more(n: int) -> list[str]:
    return [f"  and {n} more"] if n > 0 else []

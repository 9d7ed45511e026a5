"""Sites: which hook points an SAE reads and which it reconstructs, written as one string in a recipe.

`blocks.3.hook_resid_post` is an SAE, `blocks.3.ln2.hook_normalized -> blocks.3.hook_mlp_out` a transcoder, and
`blocks.3.hook_resid_post + blocks.5.hook_resid_post` a crosscoder. With a second store, a hook point of it is written
`other:blocks.3.hook_resid_post`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mi_pipe.core.errors import ConfigError

_ARROW, _PLUS = "->", "+"


@dataclass(frozen=True)
class Sites:
    """Hook points and the width of each."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_widths: tuple[int, ...]
    output_widths: tuple[int, ...]

    @property
    def kind(self) -> str:
        """What the field calls it: sae, transcoder or crosscoder."""
        if self.inputs != self.outputs:
            return "transcoder"
        return "sae" if len(self.inputs) == 1 else "crosscoder"

    @property
    def hooks(self) -> list[str]:
        """All hook points, each once."""
        return list(dict.fromkeys((*self.inputs, *self.outputs)))

    @property
    def label(self) -> str:
        """As it is written in a recipe."""
        read = f" {_PLUS} ".join(self.inputs)
        return read if self.inputs == self.outputs else f"{read} {_ARROW} {f' {_PLUS} '.join(self.outputs)}"

    @property
    def short(self) -> str:
        """A folder-safe name.

        >>> Sites.of_sae("blocks.3.hook_resid_post", 8).short
        'L3.resid_post'
        >>> Sites(("blocks.3.ln2.hook_normalized",), ("blocks.3.hook_mlp_out",), (8,), (8,)).short
        'L3.ln2.normalized_to_L3.mlp_out'
        """
        read = "_and_".join(map(short_hook, self.inputs))
        return read if self.inputs == self.outputs else f"{read}_to_{'_and_'.join(map(short_hook, self.outputs))}"

    @classmethod
    def of_sae(cls, hook: str, width: int) -> "Sites":
        """Return the sites of a plain SAE."""
        return cls((hook,), (hook,), (width,), (width,))

    @classmethod
    def parse(cls, text: str, width: Callable[[str], int]) -> "Sites":
        """Return what a recipe's string names; `width` gives that of a hook point. Raises ConfigError."""
        sides = [tuple(part.strip() for part in side.split(_PLUS)) for side in text.split(_ARROW)]
        hooks = [hook for side in sides for hook in side]
        if len(sides) > 2 or not all(hooks) or any(len(set(side)) < len(side) for side in sides):  # noqa: PLR2004
            raise ConfigError(
                f"saes.hooks: {text!r} is no place for an SAE. Write one hook point, `input -> output` for a "
                "transcoder, or `first + second` for a crosscoder."
            )
        read, written = sides[0], sides[-1]
        return cls(read, written, tuple(map(width, read)), tuple(map(width, written)))


def short_hook(hook: str) -> str:
    """Return a short name of a hook point.

    >>> short_hook("blocks.3.attn.hook_z"), short_hook("hook_embed"), short_hook("other:blocks.3.hook_mlp_out")
    ('L3.attn.z', 'embed', 'other.L3.mlp_out')
    """
    store, colon, name = hook.rpartition(":")
    parts = [part.removeprefix("hook_") for part in name.split(".")]
    if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit():
        parts = [f"L{parts[1]}", *parts[2:]]
    return ".".join([store, *parts] if colon else parts)

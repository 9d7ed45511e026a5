"""Which hook points an imported SAE reads and writes: what the user says, else what its folder says."""

import re
from pathlib import Path

from mi_pipe.core.errors import ConfigError
from mi_pipe.saes.sites import Sites

_ARROW = "->"
_HOOK_NAME = re.compile(r"\w[\w.-]*")
_MODULE = re.compile(r"(?:^|.*\.)(?:layers|h|blocks)[._](\d+)(?:\.(.+))?")
_MODULE_HOOKS = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "attn": "hook_attn_out",
    "self_attn": "hook_attn_out",
    "attention": "hook_attn_out",
}
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
_NOT_SAID = "Say it with --hook, such as --hook blocks.3.hook_resid_post"
_NOT_SAID_BOTH = "Say both with --hook, such as --hook 'blocks.3.ln2.hook_normalized -> blocks.3.hook_mlp_out'"


def asked_sites(text: str, is_transcoder: bool, d_in: int, d_out: int, folder: Path) -> Sites:
    """Return the sites that the user names: `hook`, or `input -> output` for a transcoder. Raises ConfigError."""
    names = [name.strip() for name in text.split(_ARROW)]
    if not all(_HOOK_NAME.fullmatch(name) for name in names) or len(names) > 1 + is_transcoder:
        raise ConfigError(f"--hook {text!r} is no place for {_what(is_transcoder)} ({folder}).")
    if is_transcoder and (len(names) == 1 or names[0] == names[1]):
        raise ConfigError(f"{folder} is a transcoder: it reads one hook point and writes another. {_NOT_SAID_BOTH}.")
    return Sites((names[0],), (names[-1],), (d_in,), (d_out,))


def noted_sites(
    read: str | None, written: str | None, is_transcoder: bool, widths: tuple[int, int], path: Path
) -> Sites:
    """Return the sites that a folder's config names; raises ConfigError if it does not say."""
    if not read or (is_transcoder and not written):
        hint = _NOT_SAID_BOTH if is_transcoder else _NOT_SAID
        raise ConfigError(f"{path} does not say at which hook point {_what(is_transcoder)} was trained. {hint}.")
    text = f"{read} {_ARROW} {written}" if is_transcoder else read
    return asked_sites(text, is_transcoder, *widths, path)


def hook_of_module(folder: str) -> str | None:
    """Return the hook point of a HuggingFace module by whose name sparsify names a folder; None if it is not known.

    >>> hook_of_module("layers.15"), hook_of_module("transformer.h.3.mlp"), hook_of_module("embed_tokens")
    ('blocks.15.hook_resid_post', 'blocks.3.hook_mlp_out', 'hook_embed')
    >>> hook_of_module("layers.3.mlp.act")
    """
    if folder.rpartition(".")[2] in _EMBEDDINGS:
        return "hook_embed"
    found = _MODULE.fullmatch(folder)
    hook = _MODULE_HOOKS.get(found[2]) if found else None
    return f"blocks.{found[1]}.{hook}" if found and hook else None


def _what(is_transcoder: bool) -> str:
    return "a transcoder" if is_transcoder else "an SAE"

"""The shape of a language model, read from its config and never asked of the user."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """Sizes and layout of a decoder-only transformer, in TransformerLens' words."""

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    n_ctx: int
    attn_only: bool
    parallel_attn_mlp: bool
    is_causal: bool = True
    """A token sees only what is before it."""

    @classmethod
    def from_bridge_config(cls, cfg: Any) -> "ModelInfo":
        """Read the sizes from a TransformerBridgeConfig."""
        return cls(
            architecture=str(cfg.architecture),
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_head=cfg.d_head,
            d_mlp=None if cfg.attn_only else cfg.d_mlp,
            d_vocab=cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            attn_only=bool(cfg.attn_only),
            parallel_attn_mlp=bool(cfg.parallel_attn_mlp),
            is_causal=getattr(cfg, "attention_dir", "causal") == "causal",
        )

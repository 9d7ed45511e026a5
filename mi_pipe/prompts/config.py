"""The base of all prompt configs; each family's own lies beside the code that makes its prompts."""

from mi_pipe.core.config import Config


class PromptConfig(Config):
    """What every family of prompts has, besides its `family` (a literal, by which recipes tell them apart)."""

    prepend_bos: bool = True
    """Whether each prompt begins with BOS, where the model has one."""

    @property
    def n_tokens_expected(self) -> int:
        """About how many tokens the prompts will have."""
        raise NotImplementedError

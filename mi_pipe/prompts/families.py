"""All families of prompts: the union that recipes read, and the function that makes each."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.encoded import EncodedPrompts
from mi_pipe.prompts.repeated import InductionConfig, RepeatedConfig, encode_induction, encode_repeated

AnyPromptConfig = Annotated[InductionConfig | RepeatedConfig, Field(discriminator="family")]

_ENCODERS: dict[type[PromptConfig], Callable[[Any, Vocabulary], EncodedPrompts]] = {
    InductionConfig: encode_induction,
    RepeatedConfig: encode_repeated,
}


def encode_prompts(config: PromptConfig, vocabulary: Vocabulary) -> EncodedPrompts:
    """Return the prompts that `config` asks for, in the tokens of `vocabulary`; raises PromptError."""
    return _ENCODERS[type(config)](config, vocabulary)

"""All families of prompts: the union that recipes read, and the function that makes each."""

from typing import Annotated

from pydantic import Field

from mi_pipe.core.progress import Progress
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.corpus import CorpusConfig, encode_corpus
from mi_pipe.prompts.encoded import EncodedPrompts
from mi_pipe.prompts.facts import FactsConfig, encode_facts
from mi_pipe.prompts.ioi import IOIConfig, encode_ioi
from mi_pipe.prompts.repeated import InductionConfig, RepeatedConfig, encode_induction, encode_repeated
from mi_pipe.prompts.user_pairs import PairsConfig, encode_user_pairs

AnyPromptConfig = Annotated[
    CorpusConfig | RepeatedConfig | InductionConfig | IOIConfig | FactsConfig | PairsConfig,
    Field(discriminator="family"),
]


def encode_prompts(config: PromptConfig, vocabulary: Vocabulary, progress: Progress) -> EncodedPrompts:
    """Return the prompts that `config` asks for, in the tokens of `vocabulary`; raises PromptError."""
    match config:
        case CorpusConfig():
            return encode_corpus(config, vocabulary, progress)
        case RepeatedConfig():
            return encode_repeated(config, vocabulary)
        case InductionConfig():
            return encode_induction(config, vocabulary)
        case IOIConfig():
            return encode_ioi(config, vocabulary)
        case FactsConfig():
            return encode_facts(config, vocabulary)
        case PairsConfig():
            return encode_user_pairs(config, vocabulary)
        case _:
            raise TypeError(f"{type(config).__name__} is no family of prompts")

"""One way in for stages: a model is a handle (folder, hub, GGUF) or one that the pipeline trained."""

from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.models.device import DType
from mi_pipe.models.handle import ModelHandle
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.trained import TrainedModel
from mi_pipe.models.vocabulary import NumberVocabulary

ModelSource = ModelHandle | TrainedModel


def load_source(source: ModelSource, device: str | None = None, dtype: DType | None = None) -> Model:
    """Load a model with its weights; device and dtype default to the handle's (trained models: float32)."""
    if isinstance(source, TrainedModel):
        return source.load(device or "auto")
    from mi_pipe.models.loading import load_model

    return load_model(source, device, dtype)


def source_hooks(source: ModelSource) -> tuple[HookMap, ModelInfo]:
    """Return hook points and sizes before weights are read."""
    if isinstance(source, TrainedModel):
        model = source.load("cpu")
        return model.hooks, model.info
    from mi_pipe.models.loading import read_hooks

    return read_hooks(source)


def source_vocabulary(source: ModelSource) -> Vocabulary:
    """Return the model's tokens and their text."""
    if isinstance(source, TrainedModel):
        return NumberVocabulary(source.native_config()["d_vocab"])
    from mi_pipe.models.loading import read_vocabulary

    return read_vocabulary(source)

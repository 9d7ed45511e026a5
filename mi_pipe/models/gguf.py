"""GGUF files, the format of llama.cpp and Ollama, read through transformers and dequantised to float32."""

from pathlib import Path
from typing import Any

import torch

from mi_pipe.core.errors import ModelError


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (HuggingFace model, tokenizer) of a GGUF file; raises ModelError if transformers cannot read it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        module = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(f"transformers cannot read the GGUF file {path}: {error}") from error
    # The weights are plain now; the marks of quantisation would forbid saving them.
    plain: Any = module
    del plain.config.quantization_config
    plain.hf_quantizer = None
    plain.is_quantized = False
    return plain, tokenizer

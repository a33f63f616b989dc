"""Load a causal language model and its tokenizer: the built-in one, a local folder or GGUF file, or a hub id.

Weights are read from safetensors or GGUF only, never from pickle files, and no code that comes with a model is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from . import fetch
from .config import DEFAULT, UserError

DEFAULT_NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
LOAD_ERRORS = (OSError, ValueError, KeyError, SafetensorError)
_CONVERTED = "SmolLM2-135M-Instruct-Q4_1-dequantised"


def load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, str]:
    """Load model and tokenizer for left-padded scoring.

    Args:
        name: ``"default"``, a folder with a model in safetensors form, a ``.gguf`` file, or a hub id.
        dtype: type of the weights.
        device: where the weights go.

    Returns:
        The model in eval mode with only the decoder's linear layers trainable, its tokenizer, and a name for reports.

    Raises:
        UserError: there is no such model, or it has no safetensors or GGUF weights.
    """
    transformers_logging.disable_progress_bar()
    if name == DEFAULT:
        model, tokenizer = _load_default(dtype)
    elif Path(name).expanduser().exists():
        model, tokenizer = _load_local(Path(name).expanduser(), dtype)
    elif name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise UserError(
            f"--model: there is no file or folder {name!r}; accepted: {DEFAULT!r}, an existing folder or "
            ".gguf file, or a hub id"
        )
    else:
        model, tokenizer = _load_named(name, dtype)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(device).eval()
    freeze_all_but_linear_layers(model)
    if not tuned_parameters(model):
        raise UserError(f"--model: {name!r} has no linear layers in its decoder; accepted: a model that has some")
    return model, tokenizer, DEFAULT_NAME if name == DEFAULT else name


def default_model_dir() -> Path:
    """Folder of the built-in model as safetensors in the cache, converted from its GGUF file the first time."""
    folder = fetch.cache_dir() / _CONVERTED
    if folder.exists():
        return folder
    with fetch.scratch_dir() as scratch:
        gguf = fetch.fetch_model_gguf(scratch)
        model, tokenizer = _load_gguf(gguf, torch.float32)
        converted = scratch / _CONVERTED
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        try:
            converted.replace(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and has written the same
                raise
    return folder


def _load_default(dtype: torch.dtype) -> tuple[Any, Any]:
    folder = default_model_dir()
    try:
        return _load_from(str(folder), dtype, local_files_only=True)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} is damaged ({_first_line(error)}); delete it and run again") from error


def _load_local(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    try:
        return _load_from(str(path), dtype, local_files_only=True)
    except LOAD_ERRORS as error:
        raise UserError(
            f"--model: cannot load {str(path)!r} ({_first_line(error)}); accepted: a .gguf file, or a "
            "folder with config.json, tokenizer files and *.safetensors (pickle files are never "
            "read)"
        ) from error


def _load_named(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        return _load_from(name, dtype)
    except LOAD_ERRORS as error:
        raise UserError(
            f"--model: {name!r} is no local path, and as a hub id it cannot be loaded "
            f"({_first_line(error)}); accepted: {DEFAULT!r}, an existing folder or .gguf file, or a hub id "
            "with safetensors weights"
        ) from error


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        model, tokenizer = _load_from(str(path.parent), dtype, gguf_file=path.name, local_files_only=True)
    except LOAD_ERRORS as error:
        raise UserError(
            f"--model: cannot read {str(path)!r} as a GGUF file of a known architecture ({_first_line(error)})"
        ) from error
    # The weights are plain floats now; without this a saved copy would claim to be quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer


def _load_from(name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
    )
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def freeze_all_but_linear_layers(model: PreTrainedModel) -> None:
    """Leave only the linear layers inside the decoder trainable: embeddings, norms and the head stay as they are."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for module in model.base_model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            module.requires_grad_(True)


def tuned_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

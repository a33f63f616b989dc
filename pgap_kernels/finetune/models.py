"""Load a language model and its tokenizer: the built-in one, a local folder or GGUF file, an adapter, or a hub id.

Weights are read from safetensors or GGUF only, never from pickle files, and no code that comes with a model is run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from . import fetch, layers
from .config import ADAPTER_FILE, DEFAULT
from .errors import UserError
from .layers import tuned_parameters

__all__ = ["check_exists", "check_fits", "default_model_dir", "is_masked", "load", "tuned_parameters"]

MASKED = "ForMaskedLM"
_LOADING = threading.Lock()  # transformers loads one model at a time
DEFAULT_NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
LOAD_ERRORS = (OSError, ValueError, KeyError, SafetensorError)
_CONVERTED = "SmolLM2-135M-Instruct-Q4_1-dequantised"


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tune: Sequence[str] = ("linear",),
    lora_rank: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Any, Any, str]:
    """Load model and tokenizer for scoring.

    Args:
        name: ``"default"``, a folder with a model in safetensors form or with a PEFT adapter, a ``.gguf`` file, or a
            hub id.
        dtype: type of the weights.
        device: where the weights go.
        tune: what is trainable: see `layers.choose`. Of an adapter it is what its own configuration says.
        lora_rank: begin a LoRA adapter of that rank on the layers of ``tune``, and train that instead.
        note: is told what of ``tune`` no adapter can be put on.

    Returns:
        The model in eval mode, its tokenizer, and a name for reports.

    Raises:
        UserError: there is no such model, it lacks weights, or it is none that can be tuned here.
    """
    with _LOADING:
        return _load(name, dtype, device, tune, lora_rank, note)


def _load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    tune: Sequence[str],
    lora_rank: int | None,
    note: Callable[[str], None],
) -> tuple[Any, Any, str]:
    transformers_logging.disable_progress_bar()
    path = Path(name).expanduser()
    if (path / ADAPTER_FILE).is_file():
        return _load_adapter(path, dtype, device, tune, lora_rank)
    model, tokenizer = _load_base(name, dtype)
    if name != DEFAULT and path.exists():
        # What an adapter says of its model: from wherever it is loaded, and of a GGUF file not only the folder.
        model.name_or_path = model.config._name_or_path = str(path.resolve())
    model = model.to(device).eval()
    layers.choose(model, tune)
    if lora_rank is not None:
        model = _with_lora(model, lora_rank, note)
    return model, tokenizer, DEFAULT_NAME if name == DEFAULT else name


def _load_base(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    check_exists(name)
    if name == DEFAULT:
        return _load_default(dtype)
    if Path(name).expanduser().exists():
        return _load_local(Path(name).expanduser(), dtype)
    return _load_named(name, dtype)


def check_exists(name: str) -> None:
    """Refuse a path that is not there.

    Raises:
        UserError: it can be no hub id either.
    """
    like_a_path = name.startswith((".", "/", "~")) or name.endswith((".gguf", "/")) or name.count("/") > 1
    if like_a_path and not Path(name).expanduser().exists():
        raise UserError(
            f"--model: there is no file or folder {name!r}; accepted: {DEFAULT!r}, an existing folder or "
            ".gguf file, or a hub id"
        )


def is_masked(model: Any) -> bool:
    """Whether a model predicts masked tokens rather than the next."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__.endswith(MASKED)


def check_fits(model: Any, data: Any, max_new_tokens: int = 0) -> None:
    """Refuse prompts that a model has no positions or no embeddings for.

    Args:
        model: the model.
        data: the data set.
        max_new_tokens: that are generated after a prompt.

    Raises:
        UserError: naming the option to change.
    """
    examples = [example for part in (data.train, data.dev, data.test) for example in part]
    common = max((len(answer) for answer in data.answers), default=0)
    common = 0 if common == 1 else common  # one token is predicted, not read
    made = max_new_tokens if data.task == "generation" else 0
    longest = max(
        len(example.tokens) + max([made, *map(len, example.answers)] if example.answers else [common])
        for example in examples
    )
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is not None and positions > 0 and longest > positions:
        option = "--max-length, --max-new-tokens" if made else "--max-length"
        raise UserError(
            f"{option}: there are prompts of {longest} tokens with their answers; the model has {positions} "
            f"positions; accepted: at most {positions}"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(max(max(part) for part in (example.tokens, *example.answers, *data.answers)) for example in examples)
    if highest >= rows:
        raise UserError(
            f"--model: its tokenizer makes token {highest}, but it has embeddings for {rows} tokens; accepted: a model "
            "and a tokenizer that belong together"
        )


# ---- adapters -------------------------------------------------------------------------------------------------------


def _load_adapter(
    path: Path, dtype: torch.dtype, device: torch.device, tune: Sequence[str], lora_rank: int | None
) -> tuple[Any, Any, str]:
    """The model of a PEFT adapter with the adapter on it, which alone is trainable."""
    if lora_rank is not None or list(tune) != ["linear"]:
        option = "--tune" if lora_rank is None else "--lora-rank"
        raise UserError(f"{option}: got it with {str(path)!r}, an adapter; accepted: what that was made with")
    peft = _peft()
    try:
        found = peft.PeftConfig.from_pretrained(str(path))
        base = found.base_model_name_or_path
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model: cannot read the adapter {str(path)!r} ({_first_line(error)})") from error
    if getattr(found, "is_prompt_learning", False):
        raise UserError(
            f"--model: {str(path)!r} is a {found.peft_type} adapter, of prompts; accepted: adapters of layers, as LoRA"
        )
    if not base:
        raise UserError(f"--model: the adapter {str(path)!r} does not name its model (base_model_name_or_path)")
    try:
        model, tokenizer = _load_base(base, dtype)
    except UserError as error:
        raise UserError(f"{error}; it is what the adapter {str(path)!r} was made for") from error
    try:
        model = peft.PeftModel.from_pretrained(model, str(path), is_trainable=True)
    except (RuntimeError, *LOAD_ERRORS) as error:
        raise UserError(
            f"--model: the adapter {str(path)!r} does not fit its model {base!r} ({_first_line(error)})"
        ) from error
    return model.to(device).eval(), tokenizer, f"{path} on {base}"


def _with_lora(model: Any, rank: int, note: Callable[[str], None]) -> Any:
    peft = _peft()
    chosen = {name: name.rpartition(".")[0] for name in layers.tuned_parameters(model)}
    modules = sorted(set(chosen.values()))
    linear = [name for name in modules if isinstance(model.get_submodule(name), (torch.nn.Linear, Conv1D))]
    left = [name for name, module in chosen.items() if module not in linear]
    if not linear:
        raise UserError("--tune: none of the chosen parameters is of a linear layer; accepted with --lora-rank: some")
    task = None if is_masked(model) else "CAUSAL_LM"
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, task_type=task)
    if left:
        note(
            f"--lora-rank: adapters go on linear layers; without one, and left as they are: "
            f"{', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''}"
        )
    try:
        return peft.get_peft_model(model, config).eval()
    except (ValueError, TypeError) as error:
        raise UserError(f"--lora-rank: no adapter can be put on this model ({_first_line(error)})") from error


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError(
            "--model, --lora-rank: adapters need the package peft: pip install 'pgap-kernels[lora]'"
        ) from error
    return peft


# ---- whole models ---------------------------------------------------------------------------------------------------


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
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    if "gguf_file" not in options and getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"--model: the weights of {name!r} are quantised; accepted: float32, bfloat16 or float16, or a .gguf file, "
            "which is dequantised"
        )
    auto = _class_for(config, name)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    try:
        model, info = auto.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(
            f"--model: the weights of {name!r} do not have the shapes of its config.json; accepted: a whole model"
        ) from error
    lacking = sorted(info["missing_keys"])
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise UserError(
            f"--model: {name!r} lacks {len(lacking)} of its weights ({shown}), which would be drawn at random; "
            "accepted: a whole model"
        )
    return model, tokenizer


def _class_for(config: Any, name: str) -> Any:
    """What loads a model: as a causal one, or an encoder with its head for masked tokens."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"--model: {name!r} is an encoder-decoder ({kind}); accepted: causal language models, and encoders with a "
            "head for masked tokens"
        )
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind, "").endswith(MASKED)
    # Encoders can be loaded as causal models, too: without a word, and with nonsense for scores.
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (not masked or getattr(config, "is_decoder", False))
    if causal:
        return AutoModelForCausalLM
    if masked:
        return AutoModelForMaskedLM
    raise UserError(
        f"--model: {name!r} is a {kind}, of which transformers has no language model; accepted: causal language "
        "models, and encoders with a head for masked tokens"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

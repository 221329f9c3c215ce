"""A base model in memory with fresh adapters on it, frozen everywhere else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sage.tools.finetune.base_models import hub_name, hub_revision
from sage.tools.finetune.hardware import ResolvedPrecision, torch_dtype
from sage.tools.finetune.quantisation import keep_differentiable, quantisation_of, quantising_errors
from sage.tools.finetune.trained_biases import train_in_fp32
from sage.tools.finetune.weights_layout import is_laid_out, lay_out, stored_half
from sage_contracts.config import LoRAConfig, TrainingConfig
from sage_contracts.errors import InvalidRequestError, ModelNotFoundError

_APART, _FUSED = frozenset({"q_proj", "k_proj", "v_proj"}), "qkv_proj"
_ahead: dict[tuple[Any, ...], Any] = {}
"""At most one tokenizer, by what its folder held when it was read."""


def read_ahead(base: Path) -> None:
    """Keep the folder's tokenizer for the next `load_tokenizer`, which takes a third of a second here.

    And have transformers find out once how it reads such a model, which it remembers.

    Raises: ModelNotFoundError as `load_tokenizer` does.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    held = _held(base)
    _ahead.clear()
    _ahead[held] = load_tokenizer(base)
    with suppress(Exception):  # whatever it is, who loads the model is told of it
        AutoModelForCausalLM.from_pretrained(str(base), device_map="meta")  # its weights are not read


def _held(base: Path) -> tuple[Any, ...]:
    states = [(path.name, path.stat()) for path in sorted(base.iterdir())] if base.is_dir() else []
    return (base.resolve(), *((name, state.st_mtime_ns, state.st_size) for name, state in states))


def load_tokenizer(base: Path) -> Any:
    """Raises: ModelNotFoundError when the folder has no usable tokenizer."""
    from transformers import AutoTokenizer

    # Nobody else gets the same one: who loads it may change it.
    if _ahead and (read := _ahead.pop(_held(base), None)) is not None:
        return read
    try:
        return AutoTokenizer.from_pretrained(str(base))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{base} has no tokenizer that can be loaded: {error}", param="model"
        ) from error


def load_tokenizer_from_hub(name: str) -> Any:
    """Without the weights. Raises: ModelNotFoundError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # unknown, gated, no hub: all mean the same to the user
        raise ModelNotFoundError(
            f"The tokenizer of {name} is not on this machine and could not be had from a model hub "
            f"({type(error).__name__}). Name a folder with the model, or a built-in model.",
            param="model",
        ) from error


def load_base(
    base: Path, config: TrainingConfig, device: str, precision: ResolvedPrecision, *, will_move: bool = False
) -> Any:
    """The causal language model of a folder, quantised as the config says.

    Every weight is frozen; with `tuning="full"` none is, and they are in fp32: updates are too small for half
    precision to hold. `will_move`: this is not where it trains.

    Raises: ModelNotFoundError when the folder holds no such model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    trains_all = config.tuning == "full"
    dtype = torch_dtype("fp32" if trains_all else precision)
    options: dict[str, Any] = {"dtype": dtype}
    stays = device == "cpu" and not (trains_all or will_move) and is_laid_out(base)
    keeps_half = False
    if config.load_in_8bit or config.load_in_4bit:
        options["quantization_config"] = quantisation_of(config, precision)
        options["device_map"] = {"": device}
    elif stays and dtype.itemsize == 4 and (half := stored_half(base)):
        options["dtype"] = half  # widened as they are laid out, in one pass over them, or where they are used
        keeps_half = _takes_fused_steps(config)
    try:
        with quantising_errors():
            model = AutoModelForCausalLM.from_pretrained(str(base), **options)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{base} holds no model that can be trained: {error}", param="model"
        ) from error
    if "device_map" not in options:
        model = model.to(device)
    if stays and not is_quantised(model):
        lay_out(model, dtype, keeps_half=keeps_half)
    keep_differentiable(model)
    model.requires_grad_(trains_all)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        # Not reentrant: works although no input of the first layer needs a gradient.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _takes_fused_steps(config: TrainingConfig) -> bool:
    """Whether a run like this goes through fused layers, if its base is of a family that is fused."""
    return config.method == "sft" and not config.lora.use_dora and config.lora.bias == "none"


@contextmanager
def bitsandbytes_for(is_quantised: bool) -> Iterator[None]:
    """Let peft, imported or used inside, import bitsandbytes only where something is quantised.

    It costs 50 MB and one to three seconds. Then as well it does not report kernels that nobody asked for.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if is_quantised or "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment] # Python's own mark for "not to be had"
    try:
        _ask_anew_for_bitsandbytes()
        yield
    finally:
        del sys.modules["bitsandbytes"]
        _ask_anew_for_bitsandbytes()


def _ask_anew_for_bitsandbytes() -> None:
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    for answer in (is_bnb_available, is_bnb_4bit_available):
        answer.cache_clear()


def add_adapters(model: Any, lora: LoRAConfig) -> Any:
    """Wrap the model; only adapters train, and biases if so asked, in fp32 whatever the base is in.

    Raises: InvalidRequestError when no module has one of the target names.
    """
    if lora.use_dora and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
        # peft loses the scales of 8-bit weights when it computes their norms on a CPU.
        raise InvalidRequestError(
            "DoRA on an 8-bit base needs a GPU. Set load_in_4bit instead, or no quantisation.",
            param="lora.use_dora",
        )
    try:
        with bitsandbytes_for(is_quantised(model)):
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=_fitting_targets(model, lora.target_modules),
                bias=lora.bias,
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
            )
            adapted = get_peft_model(model, adapters)
    except ValueError as error:
        raise InvalidRequestError(
            f"These adapters do not fit the base model: {error}. Set lora.target_modules to 'all-linear'.",
            param="lora.target_modules",
        ) from error
    train_in_fp32(adapted)
    return adapted


def _fitting_targets(model: Any, asked: list[str] | str) -> list[str] | str:
    """Queries, keys and values come out of one layer in some models (Phi-3): who asks for all means that."""
    layers = {_own_name(name) for name, _ in model.named_modules()}
    if isinstance(asked, str) or not _APART.issubset(asked) or _APART & layers or _FUSED not in layers:
        return asked
    return list(dict.fromkeys(_FUSED if name in _APART else name for name in asked))


def unmatched_targets(model: Any) -> str:
    """A warning that names the targets without a layer in this model, which peft is silent about; or ""."""
    asked, found = model.peft_config[model.active_adapter].target_modules, model.targeted_module_names
    missing = sorted(name for name in asked if not any(f".{layer}".endswith(f".{name}") for layer in found))
    if not missing:
        return ""
    there = ", ".join(sorted({_own_name(layer) for layer in found}))
    return (
        f"This model has no layer called {', '.join(missing)}, so the adapters are on {there} only. Set "
        "lora.target_modules to 'all-linear' for every linear layer."
    )


def _own_name(layer: str) -> str:
    return layer.rpartition(".")[2]


def name_base(model: Any, name: str, base: Path) -> None:
    """Have adapters say what they stand on as others find it; a user's own folder stays a path."""
    if known := hub_name(name, base):
        adapters = model.peft_config[model.active_adapter]
        adapters.base_model_name_or_path, adapters.revision = known, hub_revision(base)


def is_quantised(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False))


def causal_of(model: Any) -> Any:
    """The language model itself, with its adapters in it where it has some."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_whole(model: Any) -> bool:
    """Whether all of the model trains, and not adapters on it."""
    return not hasattr(model, "peft_config")


def save_weights(model: Any, folder: Path) -> None:
    """What trains, with its config: an adapter as peft and vLLM read it, or a whole model."""
    if not is_whole(model):
        # "auto" would ask a hub whether the vocabulary was changed; ours never is.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    # As the base has it: transformers loads some of these that it refuses to save.
    generation = model.generation_config
    model.generation_config = type(generation)()
    model.config.use_cache = True  # off while it trains; whoever serves it needs it
    try:
        model.save_pretrained(str(folder))
    finally:
        model.config.use_cache = False
        model.generation_config = generation
    generation.to_json_file(folder / "generation_config.json")


def load_weights(model: Any, folder: Path) -> None:
    """Put what `save_weights` wrote, or for a whole model any folder of its kind, into the model."""
    if is_whole(model):
        saved = type(model).from_pretrained(str(folder), dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def parameter_counts(model: Any) -> tuple[int, int]:
    """(those that train, all)."""
    if not is_whole(model):
        trained, total = model.get_nb_trainable_parameters()
        return int(trained), int(total)
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total


def make_optimizer(model: Any, config: TrainingConfig, device: str) -> tuple[Any, str]:
    """(optimizer over what trains, a note when it is not the one asked for, or "").

    Each parameter group says in `rate_share` what it makes of the schedule's learning rate.
    """
    import torch

    kind, note = torch.optim.AdamW, ""
    if config.optim == "paged_adamw_8bit" and device != "cpu":
        from bitsandbytes.optim import PagedAdamW8bit

        kind = PagedAdamW8bit
    elif config.optim != "adamw_torch":
        note = "paged_adamw_8bit needs a GPU; this run uses adamw_torch"
    has_two_rates = config.lora.loraplus_lr_ratio and not is_whole(model)
    optimizer = _lora_plus(model, config, kind) if has_two_rates else _plain(model, config, kind)
    for group in optimizer.param_groups:
        group["rate_share"] = group["lr"] / config.learning_rate
    return optimizer, note


def _plain(model: Any, config: TrainingConfig, kind: Any) -> Any:
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One kernel over all adapters instead of several for each.
    options = {"fused": True} if kind is torch.optim.AdamW else {}
    return kind(trained, lr=config.learning_rate, weight_decay=config.weight_decay, **options)


def _lora_plus(model: Any, config: TrainingConfig, kind: Any) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model,
        kind,
        lr=config.learning_rate,
        loraplus_lr_ratio=config.lora.loraplus_lr_ratio,
        loraplus_weight_decay=config.weight_decay,
    )

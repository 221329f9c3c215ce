"""Merged weights as one GGUF file: tensors renamed, rotary heads interleaved, numbers quantised, row by row.

Source: ggml's "GGUF" specification; tensor names from the `gguf` package's own table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sage.tools.finetune.exporting.gguf_tokenizer import write_tokenizer
from sage.tools.finetune.merging.weights import MergedTensor, MergedWeights
from sage.tools.finetune.turn_ends import taught_turn_ends
from sage_contracts.errors import InvalidRequestError, TrainingFailedError

GgufNumbers = Literal["f16", "q8_0"]

ARCHITECTURES = ("llama", "qwen2")
"""transformers' model types that can be written; llama.cpp calls them the same."""
_IGNORED = ("rotary_emb.inv_freq",)
_HEAD = "lm_head.weight"


def write_gguf(
    weights: MergedWeights,
    tokenizer_dir: Path,
    path: Path,
    numbers: GgufNumbers,
    *,
    name: str,
    licence: str = "",
) -> None:
    """Write one file. Never more than one tensor of it is in memory.

    Raises: InvalidRequestError for an architecture or a tokenizer that cannot be written; TrainingFailedError
    when a weight does not fit fp16.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    require_architecture(weights)
    config = weights.config
    writer = GGUFWriter(path, config["model_type"])
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if numbers == "f16" else LlamaFileType.MOSTLY_Q8_0)
    _add_shape(writer, config)
    rope_factors = _add_rope(writer, config)
    write_tokenizer(writer, tokenizer_dir, config, taught_turn_ends(weights.adapter_dir))
    tensors = list(_named(weights))
    if rope_factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", rope_factors.shape, rope_factors.dtype, rope_factors.nbytes
        )
    for gguf_name, tensor in tensors:
        kind, shape = _stored_as(tensor, numbers)
        writer.add_tensor_info(
            gguf_name, shape, _numpy_dtype(kind), _size_bytes(tensor, kind), raw_dtype=kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope_factors is not None:
            writer.write_tensor_data(rope_factors)
        for _, tensor in tensors:
            writer.write_tensor_data(_quantised(tensor, numbers, config))
    finally:
        writer.close()


def require_architecture(weights: MergedWeights) -> None:
    """Raises: InvalidRequestError."""
    if (kind := weights.config.get("model_type")) not in ARCHITECTURES:
        raise InvalidRequestError(
            f"GGUF files of {kind} models cannot be written, only of {' and '.join(ARCHITECTURES)} ones. "
            "Export safetensors, and convert them with llama.cpp.",
            param="format",
        )


def _named(weights: MergedWeights) -> Iterator[tuple[str, MergedTensor]]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = weights.config
    arch = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}[config["model_type"]]
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    for tensor in weights.tensors:
        # A tied output layer may lie in the file a second time; GGUF says "tied" by leaving it out.
        if tensor.name.endswith(_IGNORED) or (tensor.name == _HEAD and config.get("tie_word_embeddings")):
            continue
        if (gguf_name := names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))) is None:
            raise InvalidRequestError(
                f"GGUF has no place for the base's tensor {tensor.name}. Export safetensors.", param="format"
            )
        yield gguf_name, tensor


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_width = _head_width(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_width)
    writer.add_vocab_size(config["vocab_size"])
    if head_width * heads != config["hidden_size"]:
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)


def _head_width(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_rope(writer: Any, config: dict[str, Any]) -> Any:
    """Writes what fits into a key; the factors of Llama 3's frequencies are a tensor, and returned."""
    from gguf import RopeScalingType

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "llama3":
        return _llama3_factors(
            rope, float(rope.get("rope_theta") or config["rope_theta"]), _head_width(config)
        )
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(int(original))
        return None
    raise InvalidRequestError(
        f"Models whose positions are scaled by {kind!r} cannot be written as GGUF here.", param="format"
    )


def _llama3_factors(rope: dict[str, Any], theta: float, head_width: int) -> Any:
    """fp32 (head width / 2): what each frequency is divided by. Source: "The Llama 3 Herd of Models", and
    transformers' `_compute_llama3_parameters`."""
    import numpy as np

    frequencies = theta ** -(np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _stored_as(tensor: MergedTensor, numbers: GgufNumbers) -> tuple[Any, tuple[int, ...]]:
    """(ggml's type, the shape in its own units). Vectors stay fp32: they are small, and norms matter."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    if len(tensor.shape) < 2:
        return GGMLQuantizationType.F32, tensor.shape
    if numbers == "q8_0" and tensor.shape[-1] % 32 == 0:
        kind = GGMLQuantizationType.Q8_0
        return kind, tuple(quant_shape_to_byte_shape(tensor.shape, kind))
    return GGMLQuantizationType.F16, tensor.shape


def _numpy_dtype(kind: Any) -> Any:
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))


def _size_bytes(tensor: MergedTensor, kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(math.prod(tensor.shape) // block * block_bytes)


def _quantised(tensor: MergedTensor, numbers: GgufNumbers, config: dict[str, Any]) -> Any:
    import numpy as np
    from gguf import quantize

    kind, shape = _stored_as(tensor, numbers)
    stored = np.empty(shape, dtype=_numpy_dtype(kind))
    heads = _rotary_heads(tensor.name, config)
    blocks = iter([(0, _interleave_halves(tensor.read(), heads))]) if heads else tensor.rows()
    for first, values in blocks:
        rows = values.reshape(-1, *tensor.shape[1:])
        with np.errstate(over="ignore"):
            stored[first : first + len(rows)] = quantize(rows, kind)
        if kind.name == "F16" and not np.isfinite(stored[first : first + len(rows)]).all():
            raise TrainingFailedError(
                f"{tensor.name} has values too large for fp16. Export gguf-q8_0 instead."
            )
    return stored


def _rotary_heads(name: str, config: dict[str, Any]) -> int:
    """The heads that llama.cpp wants interleaved; it rotates those of qwen2 as transformers does."""
    found = re.search(r"\.self_attn\.([qk])_proj\.", name)
    if found is None or config["model_type"] != "llama":
        return 0
    heads = int(config["num_attention_heads"])
    return heads if found[1] == "q" else int(config.get("num_key_value_heads") or heads)


def _interleave_halves(values: Any, heads: int) -> Any:
    """(out, …) -> the same: transformers keeps the halves of a rotary head apart, llama.cpp alternates."""
    half = len(values) // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)

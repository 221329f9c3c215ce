"""A llama-architecture GGUF file as a plain Hugging Face folder: config, weights, tokenizer, chat template.

The tensors are dequantised one by one with the `gguf` package and renamed here, instead of going through
transformers' own GGUF loader: that one cannot save what it loads, and takes several times as long.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sage_contracts.errors import InvalidDataError

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3  # gguf's token type for tokens that text never contains
# Pre-tokenizers by gguf's name; both split single digits first and then bytes as GPT-2 does.
_DIGIT_SPLITTING = {"smollm", "codeshell", "refact", "starcoder", "command-r"}


def convert_gguf(gguf_path: Path, out_dir: Path) -> None:
    """Write `out_dir` (which must exist) from one GGUF file.

    Weights are stored in bf16: the models come from bf16 releases, a 4-bit grid is far coarser than bf16's
    rounding, and an engine that serves in bf16 then has exactly the weights the adapter was trained on, from
    half the bytes.

    Raises: InvalidDataError when the file is of another architecture.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (architecture := fields["general.architecture"]) != "llama":
        raise InvalidDataError(
            f"{gguf_path.name} holds a {architecture!r} model; only 'llama' files can be imported."
        )
    tokenizer = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if tokenizer[0] != "gpt2" or tokenizer[1] not in _DIGIT_SPLITTING:
        raise InvalidDataError(f"{gguf_path.name} has a tokenizer {tokenizer} that cannot be imported.")
    names = _write_weights(reader, out_dir, fields)
    _write_config(out_dir, fields, tied="lm_head.weight" not in names)
    _write_tokenizer(out_dir, fields)


def _write_weights(reader: Any, out_dir: Path, fields: dict[str, Any]) -> list[str]:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = fields["llama.attention.head_count"]
    rotated = {"attn_q": heads, "attn_k": fields.get("llama.attention.head_count_kv", heads)}
    weights: dict[str, Any] = {}
    for tensor in reader.tensors:
        # gguf lists the fastest axis first; the dequantised array is already (out, in).
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in rotated:
            values = _undo_rope_permutation(values, rotated[part])
        weights[_name_of(tensor.name)] = values.to(torch.bfloat16).contiguous()
    save_file(weights, str(out_dir / "model.safetensors"), metadata={"format": "pt"})
    return list(weights)


def _name_of(gguf_name: str) -> str:
    if gguf_name in _TOP_TENSORS:
        return _TOP_TENSORS[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{suffix}"


def _undo_rope_permutation(weight: Any, heads: int) -> Any:
    """(out, in) -> (out, in): GGUF interleaves the halves of a rotary head, transformers keeps them apart."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def _write_config(out_dir: Path, fields: dict[str, Any], *, tied: bool) -> None:
    heads = fields["llama.attention.head_count"]
    special = {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **special,
    }
    _write_json(out_dir / "config.json", config)
    _write_json(out_dir / "generation_config.json", special)


def _write_tokenizer(out_dir: Path, fields: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(out_dir / "tokenizer.json"))

    def named(key: str) -> str:
        return str(tokens[fields[f"tokenizer.ggml.{key}_token_id"]])

    template = fields["tokenizer.chat_template"]
    settings = {
        # The generic class: it takes tokenizer.json as it is, pre-tokenizer included.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "pad_token": named("padding"),
        "unk_token": named("unknown"),
        "additional_special_tokens": control,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": template,
    }
    _write_json(out_dir / "tokenizer_config.json", settings)
    (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A byte-level BPE tokenizer and its chat template as GGUF's keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sage.tools.finetune.data.tokenizer_files import chat_templates
from sage_contracts.errors import InvalidRequestError

# How llama.cpp splits text before merging is compiled into it under these names, so that a tokenizer is
# recognised by its own splitting rule. Llama 3 takes up to three digits at once, Qwen 2 one.
_SPLIT = r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BY_PATTERN = {
    _CONTRACTIONS + _SPLIT.format(digits=r"\p{N}{1,3}"): "llama-bpe",
    _CONTRACTIONS + _SPLIT.format(digits=r"\p{N}"): "qwen2",
}
_BY_STEPS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}


def write_tokenizer(writer: Any, folder: Path, config: dict[str, Any], turn_ends: Sequence[int] = ()) -> None:
    """`turn_ends`: what ends an answer beside the tokenizer's own eos.

    Raises: InvalidRequestError for a tokenizer of another kind.
    """
    from gguf import TokenType

    tokenizer = _read(folder / "tokenizer.json")
    settings = _read(folder / "tokenizer_config.json")
    model = tokenizer.get("model", {})
    pre = pre_tokenizer_name(tokenizer)
    if model.get("type") != "BPE" or pre is None:
        raise InvalidRequestError(
            f"{folder} has a tokenizer that splits text in a way that GGUF is not written with (those of "
            "GPT-2, SmolLM, Llama 3 and Qwen 2 can). Export safetensors, and convert them with llama.cpp.",
            param="format",
        )
    tokens, kinds = _tokens(tokenizer, config["vocab_size"], TokenType)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    ids = special_ids(tokenizer, settings)
    for key, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
        ("unk", writer.add_unk_token_id),
    ):
        if key in ids:
            add(ids[key])
    # GGUF has one key for the end of a turn; who reads it stops there and at eos.
    if others := [end for end in turn_ends if end != ids.get("eos")]:
        writer.add_eot_token_id(others[0])
    writer.add_add_bos_token(adds_bos(folder, ids))
    if templates := chat_templates(folder, settings):
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how `tokenizer.json` splits text, or None for one that it does not have."""
    step = tokenizer.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    for part in steps:
        if part.get("type") == "Split":
            return _BY_PATTERN.get(part.get("pattern", {}).get("Regex", ""))
    if any(part.get("add_prefix_space") for part in steps):
        return None
    if any(part.get("individual_digits") is False for part in steps):
        return None
    return _BY_STEPS.get(tuple(part.get("type") for part in steps))


def special_ids(tokenizer: dict[str, Any], settings: dict[str, Any]) -> dict[str, int]:
    """bos, eos, pad and unk, those that the tokenizer has."""
    ids = dict(tokenizer["model"]["vocab"])
    ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])})
    found = {}
    for key in ("bos", "eos", "pad", "unk"):
        token = settings.get(f"{key}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            found[key] = int(ids[text])
    return found


def adds_bos(folder: Path, ids: dict[str, int]) -> bool:
    """Whether the tokenizer itself puts a beginning-of-sequence token before a text."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    return bool(encoded) and encoded[0] == ids.get("bos")


def _tokens(tokenizer: dict[str, Any], size: int, token_type: Any) -> tuple[list[str], list[int]]:
    """Text and kind of every id; rows of the embedding that no token has are named as unused."""
    texts = [f"[PAD{number}]" for number in range(size)]
    kinds = [int(token_type.UNUSED)] * size
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    named = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    named.update({number: token["content"] for number, token in added.items()})
    if max(named) >= size:
        raise InvalidRequestError(
            f"The tokenizer has the id {max(named)}, but the model only {size} rows for tokens: they do not "
            "belong together."
        )
    for number, text in named.items():
        texts[number] = text
        kinds[number] = int(token_type.NORMAL)
        if number in added:
            kinds[number] = int(token_type.CONTROL if added[number]["special"] else token_type.USER_DEFINED)
    return texts, kinds


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidRequestError(
            f"{path.parent} has no {path.name}, which GGUF's tokenizer is made from."
        ) from error

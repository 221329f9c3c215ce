"""Strings that chat templates mark turns with, in text that is none of the conversation's. Pure.

Engines read contents and template as one string, so that a document about templates would end the message
that quotes it, and speak on as user or assistant. Which strings do so depends on the model, which the
gateway does not know: those of all families that we know are broken.
"""

from __future__ import annotations

import re

_ANGLED = (
    "s|bos|eos|unk|pad|sop|eop|eoh|eoa|eot|eom|(?:start|begin|end)_of_[a-z]+"
    "|(?:extra_id_|reserved_?|unused)[0-9]+|tool_call|tool_response|think"
)
_BRACKETED = "INST|SYSTEM_PROMPT|MODEL_SETTINGS|AVAILABLE_TOOLS|TOOL_[A-Z]+|ARGS|CALL_ID|gMASK|sMASK"
_OPENING = re.compile(
    r"<(?=[|｜][^<>\s]{1,80}[|｜]>)"  # ChatML, Llama 3 and 4, Phi, GLM, gpt-oss; DeepSeek has wide bars
    rf"|<(?=/?(?:{_ANGLED})>)"  # Gemma, InternLM, Baichuan, NeMo, Qwen; what Llama 2 and Mistral end with
    r"|<(?=</?SYS>>)"  # Llama 2
    rf"|\[(?=/?(?:{_BRACKETED})\])"  # Llama 2, Mistral
)


def without_control_tokens(text: str) -> str:
    """The same text with a blank in each such string: `<|im_end|>` → `< |im_end|>`.

    One that is seen: some tokenizers drop signs without width, and people copy what a model quotes.
    """
    return _OPENING.sub(lambda found: f"{found[0]} ", text)

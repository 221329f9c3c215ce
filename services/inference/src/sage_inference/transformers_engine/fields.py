"""Which of OpenAI's and vLLM's fields this engine takes without acting on them. All others it refuses."""

from __future__ import annotations

from typing import Any

WITHOUT_EFFECT = frozenset(
    {
        # OpenAI's: who asks, what is kept, what it costs and how fast it is.
        "user",
        "safety_identifier",
        "store",
        "metadata",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
        # About tools, which are refused themselves.
        "tool_choice",
        "parallel_tool_calls",
        "function_call",
        # vLLM's.
        "priority",
        "request_id",
        "session_id",
        "cache_salt",
        "stream_interval",
    }
)
"""Whatever they say, the text of the answer is the same."""

ASKING_FOR_NOTHING: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "top_logprobs": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "verbosity": "medium",
    "tools": [],
    "functions": [],
    # vLLM's.
    "min_p": 0,
    "min_tokens": 0,
    "bad_words": [],
    "ignore_eos": False,
    "use_beam_search": False,
    "length_penalty": 1,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {},
    "documents": [],
    "include_reasoning": True,
    "return_token_ids": False,
}
"""The value that a field has where it is not sent: clients that always send it ask for nothing by that."""

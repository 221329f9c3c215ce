"""Chat templates that write the strings of well-known model families, and small tokenizers for them.

Each encloses what the assistant says, with the token that ends its turn, in generation markers: the reference
that masks found without markers are held against. `unmarked` takes the markers out, as most models ship.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# One line per template statement; the left margin, the line breaks and nothing else are taken out.
_SAY = "{% generation %}{{ content }}{{ END }}{% endgeneration %}"


def _joined(source: str, end: str) -> str:
    return "".join(line.strip() for line in source.splitlines()).replace("END", end)


_CHATML = """
{% for m in messages %}
{% set content = m['content'] %}
{{ '<|im_start|>' + m['role'] + '\\n' }}
{% if m['role'] == 'assistant' %}SAY{% else %}{{ content + '<|im_end|>' }}{% endif %}
{{ '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# A system turn of its own stands first where the conversation has none.
_SMOLLM2 = """
{% if messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{% endif %}
""" + _CHATML.lstrip("\n")

_LLAMA3 = """
{% for m in messages %}
{% set content = m['content'] | trim %}
{% if loop.first %}{{ bos_token }}{% endif %}
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{% if m['role'] == 'assistant' %}SAY{% else %}{{ content + '<|eot_id|>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

_LLAMA31 = """
{% set ns = namespace(system='', turns=messages) %}
{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
{% set ns.system = messages[0]['content'] | trim %}{% set ns.turns = messages[1:] %}
{% endif %}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{% if tools %}{{ 'Environment: ipython\\n' }}{% endif %}
{{ 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + ns.system + '<|eot_id|>' }}
{% if tools %}
{{ '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions, please respond with a JSON '
'for a function call with its proper arguments that best answers the given prompt.\\n\\nRespond in the '
'format {"name": function name, "parameters": dictionary of argument name and its value}.'
'Do not use variables.\\n\\n' }}
{% for t in tools %}{{ t | tojson(indent=4) + '\\n\\n' }}{% endfor %}
{{ ns.turns[0]['content'] | trim + '<|eot_id|>' }}
{% set ns.turns = ns.turns[1:] %}
{% endif %}
{% for m in ns.turns %}
{% if m['role'] == 'tool' %}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m['content'] | tojson + '<|eot_id|>' }}
{% elif m.get('tool_calls') %}
{% if m['tool_calls'] | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}
{% set f = m['tool_calls'][0]['function'] %}
{% set content = '{"name": "' + f['name'] + '", "parameters": ' + f['arguments'] | tojson + '}' %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}SAY
{% else %}
{% set content = m['content'] | trim %}
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{% if m['role'] == 'assistant' %}SAY{% else %}{{ content + '<|eot_id|>' }}{% endif %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

# The instructions stand in the last turn of the user, so earlier turns change when another follows.
_MISTRAL = """
{% set ns = namespace(system='', turns=messages, last=0) %}
{% if messages[0]['role'] == 'system' %}
{% set ns.system = messages[0]['content'] %}{% set ns.turns = messages[1:] %}
{% endif %}
{% for m in ns.turns %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{ bos_token }}
{% for m in ns.turns %}
{% if m['role'] == 'user' %}
{% if tools and loop.index0 == ns.last %}
{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{% endif %}
{% set lead = ns.system + '\\n\\n' if ns.system and loop.index0 == ns.last else '' %}
{{ '[INST] ' + lead + m['content'] + '[/INST]' }}
{% elif m['role'] == 'tool' %}
{{ '[TOOL_RESULTS] {"content": ' + m['content'] | tojson + ', "call_id": "' + m['tool_call_id'] + '"}' }}
{{ '[/TOOL_RESULTS]' }}
{% elif m.get('tool_calls') %}
{% set calls = namespace(text='') %}
{% for call in m['tool_calls'] %}
{% if call['id'] | length != 9 %}{{ raise_exception('Tool call IDs should have 9 characters') }}{% endif %}
{% set calls.text = calls.text + (', ' if loop.index > 1 else '') + (call['function'] | tojson)[:-1]
+ ', "id": "' + call['id'] + '"}' %}
{% endfor %}
{% set content = '[TOOL_CALLS] [' + calls.text + ']' %}SAY
{% else %}
{% set content = ' ' + m['content'] | trim %}SAY
{% endif %}
{% endfor %}
"""

_GEMMA = """
{{ bos_token }}
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% set content = m['content'] | trim %}
{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\\n' }}SAY
{% else %}{{ '<start_of_turn>' + m['role'] + '\\n' + content + '<end_of_turn>' }}{% endif %}
{{ '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

_QWEN_TOOLS = """
{{ '<|im_start|>system\\n' + (ns.system + '\\n\\n' if ns.system else '') }}
{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n'
'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{% for t in tools %}{{ '\\n' + t | tojson }}{% endfor %}
{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within '
'<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": '
'<args-json-object>}\\n</tool_call><|im_end|>\\n' }}
"""
_QWEN_CALLS = """
{% set calls = namespace(text=content) %}
{% for call in m.get('tool_calls') or [] %}
{% set calls.text = calls.text + ('\\n' if calls.text else '') + '<tool_call>\\n{"name": "'
+ call['function']['name'] + '", "arguments": ' + call['function']['arguments'] | tojson
+ '}\\n</tool_call>' %}
{% endfor %}
{% set content = calls.text %}
"""
_QWEN_RESULT = """
{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{ '\\n<tool_response>\\n' + m['content'] + '\\n</tool_response>' }}
{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
"""
_QWEN_OPENING = """
{% set ns = namespace(system=DEFAULT, last=0) %}
{% if messages[0]['role'] == 'system' %}{% set ns.system = messages[0]['content'] %}{% endif %}
{% if tools %}TOOLS{% elif ns.system %}{{ '<|im_start|>system\\n' + ns.system + '<|im_end|>\\n' }}{% endif %}
"""

_QWEN25 = (
    (
        _QWEN_OPENING.replace("TOOLS", _QWEN_TOOLS).replace(
            "DEFAULT", "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"
        )
        + """
{% for m in messages %}
{% set content = m['content'] or '' %}
{% if m['role'] == 'tool' %}RESULT
{% elif m['role'] == 'assistant' %}CALLS
{{ '<|im_start|>assistant\\n' }}SAY{{ '\\n' }}
{% elif m['role'] == 'user' or not loop.first %}
{{ '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
    )
    .replace("CALLS", _QWEN_CALLS)
    .replace("RESULT", _QWEN_RESULT)
)

# Thoughts are shown behind the last question only, and there even where there are none.
_QWEN3 = (
    (
        _QWEN_OPENING.replace("TOOLS", _QWEN_TOOLS).replace("DEFAULT", "''")
        + """
{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% set content = m['content'] or '' %}
{% if m['role'] == 'tool' %}RESULT
{% elif m['role'] == 'assistant' %}
{% set thought = m.get('reasoning_content') or '' %}
{% if not thought and '</think>' in content %}
{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
CALLS
{% if loop.index0 > ns.last and (loop.last or thought) %}
{% set content = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
{% endif %}
{{ '<|im_start|>assistant\\n' }}SAY{{ '\\n' }}
{% elif m['role'] == 'user' or not loop.first %}
{{ '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
    )
    .replace("CALLS", _QWEN_CALLS)
    .replace("RESULT", _QWEN_RESULT)
)

# The thought is opened for the model when it is asked, and taken out of every answer that is shown to it.
_QWQ = (
    (
        _QWEN_OPENING.replace("TOOLS", _QWEN_TOOLS).replace("DEFAULT", "''")
        + """
{% for m in messages %}
{% set content = m['content'] or '' %}
{% if m['role'] == 'tool' %}RESULT
{% elif m['role'] == 'assistant' %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}
CALLS
{{ '<|im_start|>assistant\\n' }}SAY{{ '\\n' }}
{% elif m['role'] == 'user' or not loop.first %}
{{ '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""
    )
    .replace("CALLS", _QWEN_CALLS)
    .replace("RESULT", _QWEN_RESULT)
)

# Calls are shown where there is no content at all, and their arguments are taken to be text.
_R1_CALLS = """
{{ bos_token }}
{% for m in messages %}
{% set content = (m['content'] or '').split('</think>')[-1] %}
{% if m['role'] == 'user' %}{{ '<|User|>' + content }}
{% elif m['role'] == 'tool' %}{{ '<|tool_output|>' + content }}
{% elif m['role'] == 'assistant' and m['content'] is none %}
{% set calls = namespace(text='') %}
{% for call in m['tool_calls'] %}
{% set calls.text = calls.text + '<|tool_call|>' + call['function']['name'] + ARGUMENTS %}
{% endfor %}
{% set content = calls.text %}
{{ '<|Assistant|>' }}SAY
{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' }}SAY
{% else %}{{ content }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}
"""

_R1 = """
{{ bos_token }}
{% for m in messages %}
{% set content = (m['content'] or '').split('</think>')[-1] %}
{% if m['role'] == 'user' %}{{ '<|User|>' + content }}
{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' }}SAY
{% else %}{{ content }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}
"""

_PHI3 = """
{% for m in messages %}
{% set content = m['content'] %}
{{ '<|' + m['role'] + '|>\\n' }}
{% if m['role'] == 'assistant' %}SAY{% else %}{{ content + '<|end|>' }}{% endif %}
{{ '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""

_PHI4 = """
{% for m in messages %}
{% set content = m['content'] %}
{{ '<|im_start|>' + m['role'] + '<|im_sep|>' }}
{% if m['role'] == 'assistant' %}SAY{% else %}{{ content + '<|im_end|>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}
"""


@dataclass(frozen=True)
class Family:
    """`tokens` are special, `plain_tokens` only added; the first special one is bos, the last eos."""

    source: str
    turn_end: str
    tokens: tuple[str, ...]
    plain_tokens: tuple[str, ...] = ()
    has_system: bool = True
    has_tools: bool = False
    is_stripping: bool = False
    """Its special tokens swallow the white space behind them."""

    @property
    def marked(self) -> str:
        """The template with generation markers."""
        return _joined(self.source.replace("SAY", _SAY), f"'{self.turn_end}'")

    @property
    def unmarked(self) -> str:
        return re.sub(r"\{% (end)?generation %\}", "", self.marked)


_IM = ("<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>")
_CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_BRACKETS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")

FAMILIES = {
    "chatml": Family(_CHATML, "<|im_end|>", _IM),
    "smollm2": Family(_SMOLLM2, "<|im_end|>", _IM),
    "llama3": Family(_LLAMA3, "<|eot_id|>", _HEADERS),
    "llama31": Family(_LLAMA31, "<|eot_id|>", _HEADERS, has_tools=True),
    "mistral": Family(_MISTRAL, "</s>", ("<s>", *_BRACKETS, "[/TOOL_RESULTS]", "</s>"), has_tools=True),
    "gemma": Family(
        _GEMMA, "<end_of_turn>", ("<bos>", "<start_of_turn>", "<end_of_turn>"), ("\n\n", "  "), False
    ),
    "qwen25": Family(_QWEN25, "<|im_end|>", _IM, _CALLS, has_tools=True),
    "qwen3": Family(_QWEN3, "<|im_end|>", _IM, (*_CALLS, "<think>", "</think>"), has_tools=True),
    "qwq": Family(_QWQ, "<|im_end|>", _IM, (*_CALLS, "<think>", "</think>"), has_tools=True),
    "r1": Family(
        _R1,
        "<|end_of_sentence|>",
        ("<|begin_of_sentence|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
        ("<think>", "</think>"),
    ),
    "r1calls": Family(
        _R1_CALLS.replace("ARGUMENTS", "'\\n' + call['function']['arguments']"),
        "<|end_of_sentence|>",
        ("<|begin_of_sentence|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
        ("<|tool_call|>", "<|tool_output|>", "<think>", "</think>"),
    ),
    "phi3": Family(
        _PHI3,
        "<|end|>",
        ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        is_stripping=True,
    ),
    "phi4": Family(_PHI4, "<|im_end|>", ("<|endoftext|>", "<|im_sep|>", *_IM)),
}


def make_tokenizer(family: Family, *, trims_offsets: bool = False, merges: bool = False) -> Any:
    """A byte-level tokenizer with the family's tokens and its template without markers.

    `trims_offsets` leaves white space out of tokens' offsets, as some published tokenizers do; `merges` joins
    line breaks and spaces with what follows them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "t"), ("Ċ", "a"), ("e", "r"), ("Ġ", "Ġ")] if merges else []
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(p) for p in pairs)])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=trims_offsets)
    raw.add_special_tokens([AddedToken(t, rstrip=family.is_stripping, special=True) for t in family.tokens])
    raw.add_tokens([AddedToken(token, normalized=False) for token in family.plain_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=family.tokens[0],
        eos_token=family.tokens[-1],
        pad_token=family.tokens[-1],
        chat_template=family.unmarked,
        clean_up_tokenization_spaces=False,
    )

"""Token counts from a base model's own tokenizer files, or an estimate where there are none."""

from __future__ import annotations

import json
import logging
import sys
from bisect import bisect_right
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from sage.tools.finetune.base_models import SMOLLM2, folder_name
from sage.tools.finetune.data.frames import Frames, Span
from sage.tools.finetune.data.lengths import LengthCounter
from sage.tools.finetune.data.training_texts import training_texts
from sage.tools.finetune.data.turn_marks import MarkedRows, turn_marks
from sage.tools.finetune.learned_tokens import learned_tokens
from sage.tools.finetune.positions import positions_of
from sage_contracts.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 4
_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"
_HUB_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", _TEMPLATE, _MORE_TEMPLATES)
_CUTTING = frozenset(
    {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "replace", "find"}
)
_OPENED = "<think>"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Checks(NamedTuple):
    """What looks at every row with a model's files."""

    lengths: LengthCounter
    marks: MarkedRows
    """Of the model that a person chose; of any other none are known."""


def length_counter(model: str | None, home: Path, max_length: int) -> LengthCounter:
    """The first of `checks`. Raises: as that."""
    return checks(model, home, max_length).lengths


def checks(model: str | None, home: Path, max_length: int) -> Checks:
    """Counts with the tokenizer of `model`; without one with the built-in model's if it is already here, else
    by estimate.

    Raises: InvalidRequestError when the named model has no tokenizer that can be read here, InvalidDataError
    when it has no chat template.
    """
    folder = _folder(model or SMOLLM2, home)
    if folder is None and model is not None:
        folder = _from_hub(model)
    counter: FileCounter | Estimate = Estimate()
    frames, marks = Frames(), MarkedRows()
    if folder is not None:
        try:
            counter = FileCounter(folder, model or SMOLLM2)
            frames, marks = _frames(folder, counter.name, counter.added_tokens())
        except ImportError as error:
            if model is not None:
                raise InvalidRequestError(
                    f"Counting with --model needs the Python package {error.name}. Install it, or leave "
                    "--model out for an estimate.",
                    param="model",
                ) from error
    if model is None or folder is None:
        return Checks(LengthCounter(counter, frames, max_length, is_model_chosen=False), MarkedRows())
    return Checks(LengthCounter(counter, frames, max_length, positions=positions_of(folder)), marks)


def learnable_rows(model: str, home: Path) -> LengthCounter | None:
    """Refuses rows that training the model would refuse; lengths are estimates, as no tokenizers is needed.

    None where the model is not on this machine, or its files are not understood: training will tell then.
    """
    folder = _folder(model, home)
    if folder is None:
        return None
    try:
        tokenizer = orjson.loads((folder / "tokenizer.json").read_bytes())
        added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        frames, _ = _frames(folder, model, added)
    except Exception as error:  # jinja2 is not installed, no template, one that jinja cannot read
        logger.info("rows are not held against the chat template of %s: %s", model, error)
        return None
    return LengthCounter(Estimate(), frames, max_length=sys.maxsize)


def has_tokenizer(model: str, home: Path) -> bool:
    """Whether the model's tokenizer is on this machine, and so its chat template."""
    return _folder(model, home) is not None


class FileCounter:
    """A tokenizer.json, read by the tokenizers library."""

    is_estimate = False

    def __init__(self, folder: Path, name: str) -> None:
        from tokenizers import Tokenizer

        self.name = name
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def added_tokens(self) -> dict[str, int]:
        return {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}

    def count(self, texts: Sequence[str]) -> list[int]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in found]

    def learned(self, text: str, spans: Sequence[Span]) -> list[range]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return list(learned_tokens(text, spans, found.ids, found.offsets, self._decoded))

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class Estimate:
    """A token for every four bytes of UTF-8, about what byte-pair encodings need for English."""

    name = "estimate"
    is_estimate = True

    def count(self, texts: Sequence[str]) -> list[int]:
        return [-(-len(text.encode()) // _BYTES_PER_TOKEN) for text in texts]

    def learned(self, text: str, spans: Sequence[Span]) -> list[range]:
        ends = _byte_ends(text)
        return [range(bisect_right(ends, start), bisect_right(ends, end)) for start, end in spans]


def _byte_ends(text: str) -> list[int]:
    ends, size = [], 0
    for at, character in enumerate(text, 1):
        before = size // _BYTES_PER_TOKEN
        size += len(character.encode())
        ends += [at] * (size // _BYTES_PER_TOKEN - before)
    return ends if size % _BYTES_PER_TOKEN == 0 else [*ends, len(text)]


def _folder(model: str, home: Path) -> Path | None:
    places = (Path(model).expanduser(), home / "base_models" / folder_name(model))
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=list(_HUB_FILES), etag_timeout=10))
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(folder / "tokenizer.json")
        return folder
    except Exception as error:  # not installed, offline, unknown: all mean the same to the user
        raise InvalidRequestError(
            f"--model {model}: there is no tokenizer.json in such a folder or base model, and none could be "
            f"had from a model hub ({type(error).__name__}). Give a model's folder, or leave --model out.",
            param="model",
        ) from error


def _frames(folder: Path, name: str, added: dict[str, int]) -> tuple[Frames, MarkedRows]:
    """Of the folder's chat template, compiled as transformers does. Raises: ImportError without jinja2,
    InvalidDataError without a template."""
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    templates = chat_templates(folder, config)
    source = templates.get("default", "")
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _json_text
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    compiled = environment.from_string(source)
    for_tools = environment.from_string(templates.get("tool_use", source))
    special = {name: _text_of(config.get(name)) for name in _SPECIAL}

    def template(messages: Sequence[Any], tools: Any, **options: Any) -> str:
        chosen = for_tools if tools else compiled
        return chosen.render(messages=messages, tools=tools, **special, **options)

    rendering = training_texts(source, template, added, name)
    # Its only way to refuse on purpose; one without it is not asked about rows of which it has seen the like.
    looked_for = _looked_for(environment.parse(source))
    if _OPENED in source:  # in what asks for an answer, say: one that begins so is learned from behind it
        looked_for |= {_OPENED}
    frames = Frames(rendering, is_choosy="raise_exception" in source, looked_for=looked_for)
    return frames, MarkedRows(turn_marks(lambda turns: template(turns, None), added))


def chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """A tokenizer's templates by name, `default` among them; `config` is its `tokenizer_config.json`."""
    found = config.get("chat_template") or {}
    if isinstance(found, list):
        found = {item["name"]: item["template"] for item in found}
    elif isinstance(found, str):
        found = {"default": found}
    files = {path.stem: path for path in folder.glob(_MORE_TEMPLATES)} | {"default": folder / _TEMPLATE}
    return found | {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


def _looked_for(template: Any) -> frozenset[str]:
    """What the template finds in texts, or cuts them at: `</think>` for one that takes thoughts apart."""
    from jinja2 import nodes

    compared = template.find_all(nodes.Compare)
    found = [compare.expr for compare in compared if compare.ops[0].op in ("in", "notin")]
    for call in template.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _CUTTING:
            found += call.args[:1]
    texts = [node.value for node in found if isinstance(node, nodes.Const)]
    return frozenset(text for text in texts if isinstance(text, str) and text.strip())


def _generation_tag() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %}`, which marks what is learned; for counting it is only what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _json_text(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter, whose arguments templates give by place or by name."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise ValueError(message)


def _text_of(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""

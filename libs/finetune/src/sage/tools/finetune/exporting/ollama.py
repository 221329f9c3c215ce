"""A Modelfile for Ollama: the chat template in its own language, proven against the model's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from sage.tools.finetune.modeling import load_tokenizer

Message = tuple[str, str]
"""(role, content)."""
Render = Callable[[Sequence[Message], bool], str]
"""(messages, with the start of the next answer) -> text. Raises whatever the template raises."""

_MARK = "\x02content\x03"  # no template has this in its own text
_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (("user", "Why?"),),
    (("system", "Be brief."), ("user", "Why?")),
    (("user", "Why?"), ("assistant", "So."), ("user", "Really?")),
    (("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "Really?")),
    tuple((("user", "assistant")[number % 2], f"Turn {number}.") for number in range(7)),
)

_DAYS = (datetime(1999, 1, 2, 3, 4, 5), datetime(2010, 11, 12, 16, 17, 18))
"""Different in every part that `strftime` can name."""


@dataclass(frozen=True)
class TurnTexts:
    """What a template writes around contents. Most say only this, in some ten lines of Jinja."""

    before: dict[str, str]
    """By role; the system message's includes the very beginning."""
    after: dict[str, str]
    no_system: str
    """The beginning where there is no system message: perhaps a default one."""
    answer: str
    """What invites the next answer."""

    def render(self, messages: Sequence[Message], with_answer: bool) -> str:
        turns = "".join(self.before[role] + content + self.after[role] for role, content in messages)
        beginning = "" if messages[0][0] == "system" else self.no_system
        return beginning + turns + (self.answer if with_answer else "")

    def without(self, bos: str) -> TurnTexts:
        """For a reader that puts the beginning-of-sequence token there itself."""
        before = self.before | {"system": self.before["system"].removeprefix(bos)}
        return replace(self, before=before, no_system=self.no_system.removeprefix(bos))


def turn_texts(render: Render) -> TurnTexts | None:
    """Read the pieces off a few rendered conversations; None when they do not explain all of them.

    Templates that fold the system message into the first turn are such. One that trims contents is not: no
    conversation tried here has white space at the ends of its contents.
    """
    try:
        pieces = _guess(render)
        explains_all = all(
            pieces.render(messages, with_answer) == render(messages, with_answer)
            for messages, with_answer in itertools.product(_CONVERSATIONS, (True, False))
        )
    except Exception:  # a template may refuse a conversation in any way that Jinja has
        return None
    return pieces if explains_all else None


def _guess(render: Render) -> TurnTexts:
    """Raises: ValueError, and whatever the template raises."""
    whole = render([("system", _MARK), ("user", _MARK), ("assistant", _MARK), ("user", _MARK)], False)
    before_system, to_first_user, to_assistant, to_user, after_user = whole.split(_MARK)
    _, _, after_assistant = render([("user", _MARK), ("assistant", _MARK)], False).split(_MARK)
    user_only = render([("user", _MARK)], False)
    before_user = to_user.removeprefix(after_assistant)
    return TurnTexts(
        before={
            "system": before_system,
            "user": before_user,
            "assistant": to_assistant.removeprefix(after_user),
        },
        after={
            "system": to_first_user.removesuffix(before_user),
            "user": after_user,
            "assistant": after_assistant,
        },
        no_system=user_only.partition(_MARK)[0].removesuffix(before_user),
        answer=render([("user", _MARK)], True).removeprefix(user_only),
    )


def go_template(turns: TurnTexts) -> str:
    """Ollama's template: Go's text/template over .System and .Messages.

    An answer that is last is left open, so that the model goes on with it. Source: Ollama, "Template".
    """
    roles = "".join(
        f'{{{{ else if eq .Role "{role}" }}}}{turns.before[role]}{{{{ .Content }}}}{turns.after[role]}'
        for role in ("system", "user")
    )
    return (
        f"{{{{ if not .System }}}}{turns.no_system}{{{{ end }}}}"
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "assistant" }}}}{turns.before["assistant"]}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{turns.after['assistant']}{{{{ end }}}}"
        f"{roles}{{{{ end }}}}"
        f'{{{{ if and $last (ne .Role "assistant") }}}}{turns.answer}{{{{ end }}}}{{{{ end }}}}'
    )


def modelfile(gguf_name: str, turns: TurnTexts | None, stops: Sequence[str]) -> str:
    """Without a TEMPLATE Ollama guesses one from the GGUF's own. Contents are data: no braces of theirs are
    code, which a template that has some cannot say, so that one is left out too."""
    lines = [f"FROM ./{gguf_name}"]
    if turns is not None and not any(code in text for text in _texts(turns) for code in ("{{", '"""')):
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if '"' not in stop]
    return "\n".join(lines) + "\n"


def chat_turns(folder: Path) -> tuple[TurnTexts | None, list[str]]:
    """(what the tokenizer's chat template writes, the tokens that end an answer)."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        return None, []

    def render(messages: Sequence[Message], with_answer: bool, day: datetime) -> str:
        rows = [{"role": role, "content": content} for role, content in messages]
        return str(
            tokenizer.apply_chat_template(
                rows, tokenize=False, add_generation_prompt=with_answer, strftime_now=day.strftime
            )
        )

    turns, other_days = (turn_texts(partial(render, day=day)) for day in _DAYS)
    if turns != other_days:  # it tells the date, which would stay that of the export
        turns = None
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    if turns is not None:
        special = [token for token in tokenizer.all_special_tokens if token in turns.after["assistant"]]
        stops = [*special, *stops]
        if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            turns = turns.without(tokenizer.bos_token)
    return turns, stops


def has_template(text: str) -> bool:
    return "\nTEMPLATE " in text


def _texts(turns: TurnTexts) -> list[str]:
    return [*turns.before.values(), *turns.after.values(), turns.no_system, turns.answer]

"""sage chat: one question, what comes through a pipe, or a conversation."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import typer
from rich.text import Text

from sage_cli import failures, render
from sage_cli.chat import given_text
from sage_cli.chat.choose import choose_model, is_elsewhere
from sage_cli.chat.stream import AnswerInterruptedError, Printer, stream_answer
from sage_cli.client import Client
from sage_cli.stack.updown import ensure_stack
from sage_contracts.errors import InvalidRequestError, NotFoundError, SageError

_HELP = "/bye leaves · /new starts over · /help · Ctrl-C ends an answer, twice leaves"
# What a server says its refusal is about when the messages do not fit; vLLM has a name of its own.
_TOO_LONG = ("messages", "max_tokens", "input_tokens")


@dataclass(frozen=True)
class ChatOptions:
    """What the command line said."""

    backend: str | None = None
    finetune_model: str | None = None
    model: str | None = None
    message: str | None = None
    index: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    keep_alive_s: float | None = None


@dataclass
class Conversation:
    """The messages so far and what every request says besides."""

    model: str
    options: ChatOptions
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def request(self, question: str) -> dict[str, Any]:
        """The request's body, with the question asked now."""
        extra = {
            "index": self.options.index,
            "temperature": self.options.temperature,
            "max_tokens": self.options.max_tokens,
        }
        asked = [*self.messages, {"role": "user", "content": question}]
        return {"model": self.model, "messages": asked} | {k: v for k, v in extra.items() if v is not None}

    def answered(self, question: str, answer: str) -> None:
        self.messages.append({"role": "user", "content": question})
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    def forget_oldest(self) -> bool:
        """Leave out the older half of what was said. False: there is nothing to leave out."""
        first = 1 if self.options.system else 0
        turns = (len(self.messages) - first) // 2
        oldest = (turns + 1) // 2
        self.messages = self.messages[:first] + self.messages[first + 2 * oldest :]
        return turns > 0


def chat_command(options: ChatOptions) -> None:
    if options.system is not None:
        options = replace(options, system=given_text.from_words(options.system, "system prompt"))
    is_one_shot = options.message is not None or not sys.stdin.isatty()
    question = _one_shot_question(options) if is_one_shot else ""
    ensure_stack()
    with Client.from_env() as client:
        model = choose_model(options.backend, options.finetune_model, options.model, client.models)
        conversation = Conversation(model, options)
        try:
            if is_one_shot:
                _ask_once(client, conversation, question)
            else:
                _converse(client, conversation)
        finally:
            _leave(client, model, options)


def _one_shot_question(options: ChatOptions) -> str:
    if options.message in (None, "-"):
        question = given_text.from_pipe()
    else:
        question = given_text.from_words(options.message or "", "message")
    if not question.strip():
        raise InvalidRequestError(
            "The message is empty. Ask something: sage chat -m 'Hello' (or through a pipe)."
        )
    return question


def _ask_once(client: Client, conversation: Conversation, question: str) -> None:
    try:
        stream_answer(client, conversation.request(question), Printer())
    except AnswerInterruptedError:
        raise typer.Exit(failures.INTERRUPTED) from None


def _converse(client: Client, conversation: Conversation) -> None:
    _edit_lines()
    console = render.output()
    with_index = f" with {conversation.options.index}" if conversation.options.index else ""
    console.print(Text.assemble("Chatting with ", (conversation.model, "bold"), with_index), soft_wrap=True)
    console.print(_HELP, style="dim")
    interrupts = 0
    while True:
        try:
            typed = input("\n› " if render.can_show("›", console) else "\n> ")
            question = given_text.from_words(typed, "message").strip()
        except UnicodeDecodeError:
            failures.show(given_text.refusal("message"))
            continue
        except InvalidRequestError as error:
            failures.show(error)
            continue
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts >= 2:
                console.print()
                raise typer.Exit(failures.INTERRUPTED) from None
            console.print("\n(Ctrl-C again, or /bye, leaves)", style="dim")
            continue
        if question in ("/bye", "/exit", "/quit"):
            return
        interrupts = 0
        if question.startswith("/"):
            _do(question, conversation)
        elif question:
            interrupts = _answer(client, conversation, question)


def _edit_lines() -> None:
    """Give input() line editing and history, and take a pasted block as one line."""
    with suppress(ImportError):
        import readline

        # Python turns it off; libedit has no such thing, and would say that it does not know the word.
        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def _do(command: str, conversation: Conversation) -> None:
    console = render.output()
    if command == "/new":
        conversation.start_over()
        console.print("(a new conversation)", style="dim")
    else:
        console.print(_HELP if command == "/help" else f"{command} is no command. {_HELP}", style="dim")


def _answer(client: Client, conversation: Conversation, question: str) -> int:
    """Print the answer. Returns 1 when Ctrl-C ended it (another one then leaves), else 0."""
    try:
        answer = _ask(client, conversation, question)
    except AnswerInterruptedError as interrupted:
        conversation.answered(question, interrupted.partial)
        render.output().print("(stopped)", style="dim")
        return 1
    except NotFoundError:
        raise  # a wrong model name will not become right by asking again
    except SageError as error:
        # The conversation survives an engine that needs a moment.
        failures.show(error)
        return 0
    conversation.answered(question, answer)
    return 0


def _ask(client: Client, conversation: Conversation, question: str) -> str:
    """The answer, given as much of the conversation as the model takes. Raises: SageError."""
    console = render.output()
    whole = conversation.messages
    while True:
        try:
            return stream_answer(client, conversation.request(question), Printer(console))
        except InvalidRequestError as error:
            is_first = conversation.messages is whole
            if error.param not in _TOO_LONG or not conversation.forget_oldest():
                conversation.messages = whole
                raise
            if is_first:
                console.print(
                    "(The conversation has grown too long for this model: its oldest part is left out.)",
                    style="dim",
                )


def _leave(client: Client, model: str, options: ChatOptions) -> None:
    if options.keep_alive_s is None or is_elsewhere(model):
        return
    try:
        client.release(model, options.keep_alive_s)
    except NotFoundError:
        pass  # a bare name that was another backend's
    except SageError as error:
        failures.show(error)

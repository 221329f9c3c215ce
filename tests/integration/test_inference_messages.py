"""Our own engine's prompts: OpenAI's messages in a model's template, spelt as they were in training."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.chat_templates import FAMILIES, make_tokenizer
from tests.fakes.tiny_llama import make_model

from sage.tools.finetune.chat_template import ChatTemplate
from sage.tools.finetune.data import Conversation
from sage.tools.finetune.data.turns import parse_turns
from sage_chat.grounding import grounded
from sage_chat.responses_dialect import chat_body
from sage_contracts.chat import Passage
from sage_contracts.errors import InvalidRequestError
from sage_contracts.responses import ResponseRequest
from sage_inference.transformers_engine.generation import Generator
from sage_inference.transformers_engine.protocol import ChatCompletionRequest, CompletionRequest

Messages = list[dict[str, Any]]

KNOWS_DEVELOPERS = "{% if messages[0]['role'] == 'developer' %}{{ 'Developed. ' }}{% endif %}"
TEMPLATES = FAMILIES | {
    "developed": replace(FAMILIES["chatml"], source=KNOWS_DEVELOPERS + FAMILIES["chatml"].source)
}
ASKED = {"role": "user", "content": "How warm is it in Oslo?"}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "7"}


@dataclass
class Subject:
    tokenizer: Any
    generator: Generator

    def ids(self, *messages: dict[str, Any]) -> list[int]:
        request = ChatCompletionRequest.model_validate({"model": "m", "messages": messages})
        [prompt] = self.generator.encode_chat(request)
        return prompt.ids

    def text(self, *messages: dict[str, Any]) -> str:
        return str(self.tokenizer.decode(self.ids(*messages)))

    def trained_on(self, *messages: dict[str, Any]) -> Conversation:
        return Conversation(parse_turns(json.loads(json.dumps(messages)), "messages"), "row 1")


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny model with the template of a family."""
    tokenizer = make_tokenizer(TEMPLATES[request.param])
    folder = make_model(tmp_path_factory.mktemp("model") / "m", tokenizer=tokenizer)
    return Subject(tokenizer, Generator(str(folder), device="cpu", dtype="auto", max_model_len=512))


def families(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("subject", names, indirect=True, scope="module")


def calling(arguments: object, **said: object) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
        **said,
    }


@families("smollm2", "qwen25", "chatml", "llama3")
def test_a_developer_says_what_the_system_would(subject: Subject) -> None:
    told = {"content": "Answer only in French."}
    expected = subject.ids({"role": "system", **told}, ASKED)
    assert subject.ids({"role": "developer", **told}, ASKED) == expected
    assert subject.ids(ASKED) != expected


@families("smollm2", "qwen25")
def test_a_developer_in_a_response_does_too(subject: Subject) -> None:
    def of(role: str) -> list[int]:
        items = [{"role": role, "content": "In German."}, {"role": "user", "content": "Hello"}]
        asked = ResponseRequest.model_validate({"model": "m", "instructions": "Be brief.", "input": items})
        return subject.ids(*chat_body(asked)["messages"])

    assert of("developer") == of("system")


@families("smollm2", "qwen25")
def test_a_developers_words_are_joined_with_the_systems_because_many_templates_take_one(
    subject: Subject,
) -> None:
    system = {"role": "system", "content": "Be brief."}
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}
    joined = {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert subject.ids(system, developer, ASKED) == subject.ids(joined, ASKED)
    assert subject.ids(system, ASKED, developer) == subject.ids(joined, ASKED)


@families("developed")
def test_a_template_that_knows_developers_gets_them(subject: Subject) -> None:
    assert subject.text({"role": "developer", "content": "Be brief."}, ASKED).startswith("Developed. ")


@families("chatml", "llama3", "mistral", "qwen3", "r1", "phi4")
def test_a_passage_never_becomes_a_turn(subject: Subject) -> None:
    special = set(subject.tokenizer.all_special_ids)

    def turns(text: str) -> list[int]:
        passage = Passage(id=1, source="a.md", text=text, score=1)
        return [token for token in subject.ids(*grounded([ASKED], [passage])) if token in special]

    tokens = subject.tokenizer.all_special_tokens
    assert len(tokens) > 1 and turns("x".join(tokens) + "".join(tokens)) == turns("x") != []


CALLS = [
    calling('{"city": "Oslo", "days": [1, 2.5], "more": null}', content=None),
    calling('{"city": "東京"}'),
    calling("", content=""),
    calling(None, content=None),
    calling({"city": "Oslo", "more": None}, content="I look."),
    calling('{"city": "Oslo"}', content=[{"type": "text", "text": "I "}, {"type": "text", "text": "look."}]),
]


@families("qwen25", "qwen3", "llama31", "mistral")
@pytest.mark.parametrize("called", CALLS, ids=range(len(CALLS)))
def test_a_call_is_shown_as_training_shows_it(subject: Subject, called: dict[str, Any]) -> None:
    row = subject.trained_on(ASKED, called, RESULT)
    learned = ChatTemplate(subject.tokenizer).text(row, 3, add_generation_prompt=True)
    assert subject.text(ASKED, called, RESULT) == learned
    assert "weather" in learned


@families("r1calls")
@pytest.mark.parametrize("called", CALLS[:4], ids=range(4))
def test_a_call_is_spelt_as_the_template_wants_it(subject: Subject, called: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": "7 degrees."}
    [learned] = ChatTemplate(subject.tokenizer).rendered(subject.trained_on(ASKED, called, RESULT, answer))
    shown = subject.text(ASKED, called, RESULT)
    assert "weather" in shown and learned.text.startswith(shown.removesuffix("<think>\n"))


@families("qwen25")
def test_arguments_that_are_no_object_are_shown_as_they_are(subject: Subject) -> None:
    for arguments in ('{"city": ', "[1]", "7"):
        assert json.dumps(arguments) in subject.text(ASKED, calling(arguments, content=None), RESULT)


@families("chatml")
def test_a_template_without_calls_shows_the_rest(subject: Subject) -> None:
    assert subject.ids(ASKED, calling("{}", content=None)) == subject.ids(
        ASKED, {"role": "assistant", "content": ""}
    )
    assert subject.ids(ASKED, {"role": "assistant", "content": None}, ASKED) == subject.ids(
        ASKED, {"role": "assistant", "content": ""}, ASKED
    )


@families("chatml", "qwen25")
def test_what_an_assistant_refused_with_is_what_it_said(subject: Subject) -> None:
    expected = subject.ids(ASKED, {"role": "assistant", "content": "I cannot."}, ASKED)
    part = {"type": "refusal", "refusal": "I cannot."}
    texts = [{"type": "text", "text": "I "}, {"type": "refusal", "refusal": "cannot."}]
    for said in ({"content": [part]}, {"content": texts}, {"content": None, "refusal": "I cannot."}):
        assert subject.ids(ASKED, {"role": "assistant", **said}, ASKED) == expected
    answered = {"role": "assistant", "content": "I cannot.", "refusal": None}
    assert subject.ids(ASKED, answered, ASKED) == expected


@families("chatml")
def test_nobody_else_refuses(subject: Subject) -> None:
    part = {"type": "refusal", "refusal": "I cannot."}
    for said in ({"content": [part]}, {"content": None, "refusal": "I cannot."}):
        with pytest.raises(InvalidRequestError, match=r"messages\[0\]|text only"):
            subject.ids({"role": "user", **said})


@families("chatml")
@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
def test_a_message_that_says_nothing_is_refused_by_its_place(subject: Subject, role: str) -> None:
    for nothing in ({"role": role}, {"role": role, "content": None}):
        with pytest.raises(InvalidRequestError, match=r"messages\[1\]\.content") as caught:
            subject.ids(ASKED, nothing)
        assert caught.value.param == "messages[1].content"


@families("chatml")
def test_ids_of_no_token_are_refused(subject: Subject) -> None:
    size = len(subject.tokenizer)

    def encode(prompt: Any) -> list[list[int]]:
        request = CompletionRequest.model_validate({"model": "m", "prompt": prompt})
        return [prompt.ids for prompt in subject.generator.encode_text(request)]

    assert encode([0, size - 1]) == [[0, size - 1]]
    for stray in (size, -1, 2**64):
        with pytest.raises(InvalidRequestError, match=f"{stray} is no token of this model's") as caught:
            encode([[0], [0, stray]])
        assert caught.value.param == "prompt"


@families("chatml")
def test_a_text_that_cannot_fit_is_refused_before_it_takes_the_time_to_be_cut_into_tokens(
    subject: Subject,
) -> None:
    # No token of this vocabulary stands for more characters than `<|im_start|>` has.
    huge = "a" * (512 * len("<|im_start|>") + 1)
    request = CompletionRequest.model_validate({"model": "m", "prompt": ["short", huge]})
    for encode in (
        lambda: subject.generator.encode_text(request),
        lambda: subject.ids({"role": "user", "content": huge}),
    ):
        with pytest.raises(InvalidRequestError, match=r"context is 512 tokens.* characters") as caught:
            encode()
        assert caught.value.param in ("prompt", "messages")


@families("chatml")
def test_a_text_that_may_fit_is_counted(subject: Subject) -> None:
    marks = "<|im_start|>" * 500
    request = CompletionRequest.model_validate({"model": "m", "prompt": marks})
    [prompt] = subject.generator.encode_text(request)
    assert len(prompt.ids) == 500
    too_many = CompletionRequest.model_validate({"model": "m", "prompt": "é" * 300})
    [counted] = subject.generator.encode_text(too_many)
    with pytest.raises(InvalidRequestError, match="the prompt has 600"):
        subject.generator.require_room(counted, too_many)


def test_a_tokenizer_that_makes_one_token_of_any_text_has_no_longest(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<end>")
    folder = make_model(tmp_path / "m", tokenizer=tokenizer)
    generator = Generator(str(folder), device="cpu", dtype="auto", max_model_len=512)
    request = CompletionRequest.model_validate({"model": "m", "prompt": "b" * 100_000})
    assert [prompt.ids for prompt in generator.encode_text(request)] == [[0]]

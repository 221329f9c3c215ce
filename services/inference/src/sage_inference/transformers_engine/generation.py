"""The model: a base with adapters beside it, one answer at a time. The only file here that needs torch."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_contracts.errors import InvalidRequestError
from sage_inference.transformers_engine.messages import Message, render
from sage_inference.transformers_engine.penalties import penalties
from sage_inference.transformers_engine.progress import Progress
from sage_inference.transformers_engine.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Outcome,
)
from sage_inference.transformers_engine.text import Detokenizer, StopScanner, longest_token

# Logits divided by less overflow; vLLM takes the best token below it, too.
_LEAST_TEMPERATURE = 1e-5


def is_quantised(model: str) -> bool:
    """Whether loading the weights of a folder or a Hub id needs bitsandbytes or a package like it."""
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(model)
    return "quantization_config" in config


@dataclass(frozen=True)
class Prompt:
    ids: list[int]


class Generator:
    """Not safe for threads: the server calls it from one."""

    def __init__(self, model: str, *, device: str, dtype: str, max_model_len: int) -> None:
        import torch
        from transformers import AutoTokenizer

        print("Loading weights", flush=True)
        self._torch = torch
        self._location = model
        self._device = device
        self._dtype = _dtype(dtype, device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._base: Any = self._load_base()
        self._peft: Any = None
        self._adapters: dict[str, str] = {}
        self._numbers = itertools.count(1)
        # Asked before the first adapter, which may wrap the embeddings.
        self._vocabulary = int(self._base.get_input_embeddings().weight.shape[0])
        positions = getattr(self._base.config, "max_position_embeddings", None) or max_model_len
        self._max_length = min(max_model_len, positions)
        longest = longest_token(self._tokenizer)
        self._max_characters = None if longest is None else longest * self._max_length
        self._warm_up()

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._max_length

    @property
    def adapters(self) -> list[str]:
        return list(self._adapters)

    def load_adapter(self, name: str, path: Path) -> None:
        """Raises: InvalidRequestError when the adapter does not fit this base."""
        # peft makes the name a key of a module, where dots are not allowed: `my.model@3` has one.
        key = f"adapter{next(self._numbers)}"
        try:
            self._add(key, str(path))
        except Exception as error:
            # peft raises what it likes, after it has changed the model: undo that.
            self._drop_half_loaded(key)
            raise InvalidRequestError(f"Loading lora {name} failed: {error}") from error
        replaced = self._adapters.get(name)
        self._adapters[name] = key
        if replaced is not None:
            self._delete(replaced)

    def _add(self, key: str, path: str) -> None:
        from peft import PeftModel

        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._base, path, adapter_name=key)
            self._peft.eval()
        else:
            self._peft.load_adapter(path, adapter_name=key, torch_device=self._device)

    def _drop_half_loaded(self, key: str) -> None:
        if self._peft is None:
            self._base = self._load_base()
        elif key in self._peft.peft_config:
            self._peft.delete_adapter(key)

    def _load_base(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._location, dtype=self._dtype)
        return model.to(self._device).eval()

    def unload_adapter(self, name: str) -> None:
        """Raises: KeyError when it is not loaded."""
        self._delete(self._adapters.pop(name))

    def _delete(self, key: str) -> None:
        if self._adapters:
            # peft warns when the active adapter goes; another is active by then.
            self._peft.set_adapter(next(iter(self._adapters.values())))
        # First, since the base would be handed out with what an active adapter trained as a whole.
        self._peft.delete_adapter(key)
        if not self._adapters:
            self._base, self._peft = self._peft.unload(), None

    def encode_chat(self, request: ChatCompletionRequest) -> list[Prompt]:
        """Raises: InvalidRequestError for messages that the model's template refuses, or that cannot fit."""
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "This base model has no chat template: use an instruct model, or /v1/completions.",
                param="messages",
            )
        text = render(request.messages, self._tokenizer.get_chat_template(), self._in_template)
        return [self._prompt(text, request, add_special_tokens=False)]

    def _in_template(self, messages: list[Message]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def encode_text(self, request: CompletionRequest) -> list[Prompt]:
        """Raises: InvalidRequestError for ids of no token, and for texts that cannot fit."""
        for prompt in request.prompts:
            stray = next((i for i in prompt if isinstance(i, int) and not 0 <= i < self._vocabulary), None)
            if stray is not None:
                raise InvalidRequestError(
                    f"prompt: {stray} is no token of this model's: it has 0 to {self._vocabulary - 1}",
                    param="prompt",
                )
        return [
            self._prompt(prompt, request) if isinstance(prompt, str) else Prompt(prompt)
            for prompt in request.prompts
        ]

    def _prompt(self, text: str, request: GenerationRequest, *, add_special_tokens: bool = True) -> Prompt:
        # Megabytes would take the tokenizer many seconds, and everybody waits in the same line.
        if self._max_characters is not None and len(text) > self._max_characters:
            raise InvalidRequestError(
                f"This model's context is {self._max_length} tokens; the prompt has {len(text)} characters, "
                "more than these can say. Shorten the prompt.",
                param=request.prompt_field,
            )
        return Prompt(list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]))

    def require_room(self, prompt: Prompt, request: GenerationRequest) -> None:
        """Raises: InvalidRequestError when the prompt is empty or leaves no room."""
        self._limit(len(prompt.ids), request)

    def generate(
        self,
        prompt: Prompt,
        request: GenerationRequest,
        send: Callable[[str], None],
        cancelled: threading.Event,
    ) -> Outcome:
        """Answer; `send` gets the text as it comes. Ends early when `cancelled` is set.

        Raises: InvalidRequestError when the prompt leaves no room.
        """
        limit = self._limit(len(prompt.ids), request)
        ends = _token_ids(
            self._base.generation_config.eos_token_id, self._tokenizer.eos_token_id, request.stop_token_ids
        )
        progress = Progress(
            Detokenizer(lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True)),
            StopScanner(request.stop or []),
            ends,
            send,
            cancelled,
        )
        torch = self._torch
        if request.seed is not None:
            torch.manual_seed(request.seed)
        else:
            torch.seed()  # else what follows another's seed would be as fixed
        ids = torch.tensor([prompt.ids], device=self._device)
        with torch.inference_mode(), self._using(request.model) as model:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._generation_config(request, limit, sorted(ends)),
                logits_processor=penalties(request, len(prompt.ids)),
                stopping_criteria=[progress.criterion(torch)],
            )
        return progress.finish(len(prompt.ids))

    @contextlib.contextmanager
    def _using(self, name: str) -> Iterator[Any]:
        """The base, or the base with one adapter."""
        key = self._adapters.get(name)
        if self._peft is None:
            yield self._base
        elif key is None:
            with self._peft.disable_adapter():
                yield self._base
        else:
            self._peft.set_adapter(key, inference_mode=True)
            yield self._peft

    def _limit(self, prompt_tokens: int, request: GenerationRequest) -> int:
        room, wanted = self._max_length - prompt_tokens, request.token_limit
        if prompt_tokens == 0:
            raise InvalidRequestError("The prompt is empty.", param=request.prompt_field)
        if room < 1 or (wanted is not None and wanted > room):
            asked = f" and {wanted} for the answer" if wanted else ""
            raise InvalidRequestError(
                f"This model's context is {self._max_length} tokens; the prompt has {prompt_tokens}{asked}. "
                "Shorten the prompt or lower max_tokens.",
                param="max_tokens" if room >= 1 else request.prompt_field,
            )
        return wanted or min(room, request.default_token_limit)

    def _generation_config(self, request: GenerationRequest, limit: int, ends: list[int]) -> Any:
        """The model's own defaults with the request's wishes on top."""
        from transformers import GenerationConfig

        defaults = self._base.generation_config
        given = {
            name: getattr(request, name) if getattr(request, name) is not None else getattr(defaults, name)
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        }
        return GenerationConfig(
            max_new_tokens=limit,
            eos_token_id=ends or None,
            pad_token_id=next(
                (token for token in (self._tokenizer.pad_token_id, *ends) if token is not None), 0
            ),
            use_cache=True,
            repetition_penalty=given["repetition_penalty"],
            **_sampling(given["temperature"], given["top_p"], given["top_k"]),
        )

    def _warm_up(self) -> None:
        """One token: the first forward pass is the slowest, and this way it is nobody's."""
        ids = self._torch.tensor([[self._tokenizer.eos_token_id or 0]], device=self._device)
        with self._torch.inference_mode():
            self._base(input_ids=ids)
        # Imported here because the first adapter must not wait for it.
        import peft  # noqa: F401


def _sampling(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """Greedy at temperature 0. The library's own top_k is 50; this dialect has none unless asked for."""
    if temperature is not None and temperature < _LEAST_TEMPERATURE:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": top_p,
        "top_k": max(top_k or 0, 0),
    }


def _token_ids(*values: int | list[int] | None) -> frozenset[int]:
    found: set[int] = set()
    for value in values:
        if value is not None:
            found |= set(value) if isinstance(value, list) else {value}
    return frozenset(found)


def _dtype(name: str, device: str) -> Any:
    """fp32 on a CPU; on a GPU what the chip has."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

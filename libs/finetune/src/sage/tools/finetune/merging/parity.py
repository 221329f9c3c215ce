"""Do merged weights still say what the adapter said? Fixed probes, greedy answers and logits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage.tools.finetune.hardware import set_threads
from sage.tools.finetune.modeling import bitsandbytes_for, is_quantised, load_tokenizer
from sage.tools.finetune.turn_ends import taught_turn_ends, with_turn_ends
from sage_contracts.errors import ModelNotFoundError, TrainingFailedError

PROBES = (
    "Write a Python function that returns the largest number of a list.",
    "What is the capital of France?",
    "Explain in one sentence what a unit test is for.",
)
PROBE_TOKENS = 24

# Logits this close are one choice to the adapter: adding in another order moves them by 1e-4.
_TIE = 5e-4
# Nats per token that rounding the weights may cost by itself. Seen: on SmolLM2-135M 7e-7 (fp16), 3e-5 (bf16);
# on random models whose logits are ten times as large 1e-4 and 5e-3; 2e-3 where 8 bits round the base too.
# A wrong merge is caught by the share below long before: leaving the adapter out altogether is a share of 1,
# doubling it is more.
_ROUNDING_KL = {"float16": 2e-4, "bfloat16": 2e-3, "q8_0": 0.02, "q4_k_m": 0.3}
# Of the way from the plain base to the adapter.
_ALLOWED_SHARE = 0.1


@dataclass(frozen=True)
class Reference:
    """What the adapter on its base says, computed in fp32: all that the comparison needs of it."""

    prompts: list[list[int]]
    answers: list[list[int]]
    """Greedy, token ids."""
    logits: list[Any]
    """For each probe fp32 of shape (answer tokens, vocabulary): what chose each of its tokens."""
    base_kl: float
    """Mean KL(adapter || plain base) over the answers: how far the adapter moves its base; 0 without one."""
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ParityReport:
    """Merged weights beside their adapter, over every token of the adapter's answers."""

    dtype: str
    probes: int
    same: int
    """Probes answered with exactly the same tokens."""
    same_tokens: int
    """Tokens up to the first difference, summed."""
    tokens: int
    top1: float
    """Share of tokens that would be chosen alike."""
    max_logit_diff: float
    mean_kl: float
    """Mean KL(adapter || merged), in nats per token."""
    base_kl: float
    """The same between adapter and plain base: the scale to read `mean_kl` against."""
    answers: list[str]
    """The adapter's, for people."""


def ask_tuned(base: Path, adapter_dir: Path | None, tokenizer_dir: Path | None = None) -> Reference:
    """Load base + adapter, keep what they say, let them go again; without an adapter the base alone.

    Raises: ModelNotFoundError.
    """
    tokenizer = load_tokenizer(tokenizer_dir or base)
    prompts = [_prompt(tokenizer, probe) for probe in PROBES]
    with _loaded(base) as model:
        model.generation_config.eos_token_id = with_turn_ends(
            model.generation_config.eos_token_id, taught_turn_ends(adapter_dir or base)
        )
        tuned = _with_adapter(model, adapter_dir) if adapter_dir else model.eval()
        answers = _greedy(tuned, prompts)
        logits = [_answer_logits(tuned, *pair) for pair in zip(prompts, answers, strict=True)]
        plain = logits
        if adapter_dir:
            with tuned.disable_adapter():
                plain = [_answer_logits(tuned, *pair) for pair in zip(prompts, answers, strict=True)]
        del tuned
    moved = sum(float(_kl(a, b).sum()) for a, b in zip(logits, plain, strict=True))
    tokens = sum(len(answer) for answer in answers)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return Reference(prompts, answers, logits, moved / tokens, texts)


def _with_adapter(model: Any, adapter_dir: Path) -> Any:
    with bitsandbytes_for(is_quantised(model)):
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(adapter_dir)).eval()


def compare_folder(reference: Reference, folder: Path, dtype: str, **load: Any) -> ParityReport:
    """Load a model (`load`: further words for transformers' from_pretrained) and hold it beside the adapter.

    No generation: a greedy answer is the adapter's exactly as long as, given the adapter's own tokens, each
    next choice is the adapter's too, and one forward pass over the answer shows that for all of its tokens.
    """
    with _loaded(folder, **load) as model:
        found = [
            _answer_logits(model.eval(), *pair)
            for pair in zip(reference.prompts, reference.answers, strict=True)
        ]
    return compare(reference, found, dtype)


def compare(reference: Reference, found: list[Any], dtype: str) -> ParityReport:
    """`found` has the shapes of `reference.logits`."""
    same = same_tokens = agreeing = 0
    divergence = largest = 0.0
    for wanted, got in zip(reference.logits, found, strict=True):
        chosen = wanted.gather(-1, got.argmax(-1, keepdim=True))
        alike = (wanted.amax(-1, keepdim=True) - chosen <= _TIE).squeeze(-1).tolist()
        agreeing += sum(alike)
        first = alike.index(False) if False in alike else len(alike)
        same_tokens += first
        same += first == len(alike)
        divergence += float(_kl(wanted, got).sum())
        largest = max(largest, float((wanted - got).abs().max()))
    tokens = sum(len(answer) for answer in reference.answers)
    return ParityReport(
        dtype=dtype,
        probes=len(found),
        same=same,
        same_tokens=same_tokens,
        tokens=tokens,
        top1=round(agreeing / tokens, 4),
        max_logit_diff=largest,
        mean_kl=divergence / tokens,
        base_kl=reference.base_kl,
        answers=reference.texts,
    )


def require_parity(report: ParityReport, what: str) -> None:
    """Raises: TrainingFailedError when the merged model is another model than its adapter."""
    if report.dtype in ("float32", "float64"):
        # The same arithmetic in another order: differences in the last bits.
        fits = report.same == report.probes
        how = f"answers {report.probes - report.same} of {report.probes} probes unlike the tuned model"
    else:
        allowed = max(_ROUNDING_KL[report.dtype], _ALLOWED_SHARE * report.base_kl)
        fits = report.mean_kl <= allowed
        how = (
            f"strays {report.mean_kl:.3g} nats per token from the tuned model, where rounding to "
            f"{report.dtype} explains at most {allowed:.3g}"
        )
    if not fits:
        raise TrainingFailedError(
            f"{what} {how}, so it is not kept (largest difference of a logit {report.max_logit_diff:.3g}, "
            f"{report.top1:.0%} of the tokens chosen alike). Chat with the model as it is, and report this."
        )


@contextmanager
def _loaded(folder: Path, **load: Any) -> Iterator[Any]:
    """A causal language model that computes in fp32 from weights that stay as they are stored."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    set_threads()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), **{"dtype": "auto", **load})
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{folder} holds no model that can be loaded: {error}") from error
    compute_in_fp32(model)
    try:
        yield model
    finally:
        del model
        gc.collect()  # modules and hooks refer to each other


def compute_in_fp32(model: Any, copy_up_to_bytes: int = 2_000_000_000) -> None:
    """Compute in fp32 with the weights as they are stored: rounding on the way would hide theirs.

    A small model is copied to fp32; that of a large one would take twice its memory, so each of its modules
    is widened for the moment in which it is used.
    """
    import torch

    if 4 * sum(weight.numel() for weight in model.parameters()) <= copy_up_to_bytes:
        torch.nn.Module.float(model)  # transformers' own refuses what was read from GGUF
        return

    def widen(module: Any, inputs: Any) -> None:
        module.narrow = [(weight, weight.data) for weight in module.parameters(recurse=False)]
        for weight, stored in module.narrow:
            weight.data = stored.float()

    def narrow(module: Any, inputs: Any, output: Any) -> None:
        for weight, stored in module.narrow:
            weight.data = stored
        module.narrow = []

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):  # looks rows up: no need to widen the others
            module.register_forward_hook(lambda module, inputs, output: output.float())
        elif any(weight.dtype != torch.float32 for weight in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)


def _prompt(tokenizer: Any, probe: str) -> list[int]:
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": probe}], add_generation_prompt=True, return_dict=True
    )
    return list(asked["input_ids"])


def _greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts as one batch, padded on the left; an answer ends with its end-of-turn token."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=PROBE_TOKENS,
            do_sample=False,
            pad_token_id=ends[0] if ends else 0,
        )
    return [_until_end(row[width:], ends) for row in made.tolist()]


def _until_end(answer: list[int], ends: list[int]) -> list[int]:
    first = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[: first + 1]


def _answer_logits(model: Any, prompt: list[int], answer: list[int]) -> Any:
    """fp32 of shape (answer tokens, vocabulary)."""
    import torch

    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1, use_cache=False).logits
    return logits[0, :-1].float()


def _kl(wanted: Any, got: Any) -> Any:
    """(tokens,) in nats."""
    from torch.nn.functional import kl_div, log_softmax

    left, right = log_softmax(wanted, -1), log_softmax(got, -1)
    return kl_div(right, left, reduction="none", log_target=True).sum(-1)

"""What the model answers to a few prompts, so that a person can read how training gets on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage.tools.finetune.callbacks import GeneratedAnswer, TrainingCallback

SAMPLE_TOKENS = 64


def sample_answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Greedy answers, one for each prompt: no random numbers are drawn, so training is not disturbed."""
    import torch

    if not prompts:
        return []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [_answer(model, tokenizer, prompt) for prompt in prompts]
    finally:
        model.train(was_training)


def tell_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], callbacks: TrainingCallback, step: int
) -> None:
    """Report what the model answers to the prompts now, where there are any."""
    if prompts:
        answers = sample_answers(model, tokenizer, prompts)
        pairs = zip(prompts, answers, strict=True)
        callbacks.on_answers(step, [GeneratedAnswer(prompt, answer) for prompt, answer in pairs])


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    ids = model.generate(
        **asked,
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    text = tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()

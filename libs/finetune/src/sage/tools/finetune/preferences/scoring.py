"""How well a model tells good answers from bad: losses and rewards from log-probabilities. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, expm1, log, log1p
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Scores:
    """Over the held-out rows."""

    loss: float
    """The method's own."""
    reward_accuracy: float
    """How often the better answer has the higher reward; ties count half."""
    reward_margin: float
    """By how much, on average."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model thinks of one answer."""

    logp: float
    """Sum over the answer's tokens."""
    tokens: int
    whole_logp: float = 0.0
    """Sum over the prompt's tokens too; ORPO alone needs it."""
    whole_tokens: int = 1


Pair = tuple[Answer, Answer]
"""(chosen, rejected)"""


def dpo_scores(policy: Sequence[Pair], reference: Sequence[Pair], beta: float) -> Scores:
    """Source: Rafailov et al., arXiv:2305.18290, equation 7."""
    rewards = [
        (beta * (chosen.logp - ref_chosen.logp), beta * (rejected.logp - ref_rejected.logp))
        for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, reference, strict=True)
    ]
    return _scores([-_log_sigmoid(good - bad) for good, bad in rewards], rewards)


def orpo_scores(policy: Sequence[Pair], beta: float) -> Scores:
    """No reference: the reward is the mean log-probability. Source: Hong et al., arXiv:2403.07691."""
    losses, rewards = [], []
    for chosen, rejected in policy:
        good, bad = chosen.logp / chosen.tokens, rejected.logp / rejected.tokens
        log_odds = (good - bad) - (_log1mexp(good) - _log1mexp(bad))
        losses.append(-chosen.whole_logp / chosen.whole_tokens - beta * _log_sigmoid(log_odds))
        rewards.append((beta * good, beta * bad))
    return _scores(losses, rewards)


def kto_scores(
    policy: Sequence[Answer],
    reference: Sequence[Answer],
    is_desirable: Sequence[bool],
    drift: float,
    beta: float,
) -> Scores:
    """`drift`: mean log-ratio of mismatched answers. Source: Ethayarajh et al., arXiv:2402.01306, equation 8.

    Accuracy and margin compare every wanted answer with every unwanted one: they need not share a prompt.
    """
    zero = max(0.0, drift)
    ratios = [p.logp - r.logp for p, r in zip(policy, reference, strict=True)]
    losses = [
        1 - _sigmoid(beta * (ratio - zero if wanted else zero - ratio))
        for ratio, wanted in zip(ratios, is_desirable, strict=True)
    ]
    good = [beta * ratio for ratio, wanted in zip(ratios, is_desirable, strict=True) if wanted]
    bad = [beta * ratio for ratio, wanted in zip(ratios, is_desirable, strict=True) if not wanted]
    return _scores(losses, [(g, b) for g in good for b in bad])


def _scores(losses: Sequence[float], rewards: Sequence[tuple[float, float]]) -> Scores:
    wins = [1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in rewards]
    margins = [good - bad for good, bad in rewards]
    # KTO may have held out answers of one kind alone: then nothing is told apart.
    return Scores(fmean(losses), fmean(wins) if wins else 0.5, fmean(margins) if margins else 0.0)


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))


def _log_sigmoid(x: float) -> float:
    return -log1p(exp(-x)) if x >= 0 else x - log1p(exp(x))


def _log1mexp(x: float) -> float:
    """log(1 - exp(x)) for x < 0, exact near 0 too. Source: Mächler, "log1mexp", R package Rmpfr."""
    x = min(x, -1e-12)  # an answer that is certain has infinite odds
    return log(-expm1(x)) if x > -log(2) else log1p(-exp(x))

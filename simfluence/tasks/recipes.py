"""Recipes by which the literature fine-tunes language models.

Optimizers are torch's; its Adafactor scales steps by the size of a parameter, as the original does.
"""

from __future__ import annotations

from simfluence.recipe import Recipe

__all__ = ["full_tuning", "gptfluence", "ia3"]


def ia3(steps: int = 1000, seed: int = 0) -> Recipe:
    """Return the recipe of IA3 in T-Few (Liu et al. 2022, section 3.5), which the Simfluence paper uses: Adafactor,
    peak 3e-3 after a warm-up of 6 % of the steps, linear decay; originally with batches of 8.

    >>> ia3(100).learning_rates(100).max()
    np.float64(0.003)
    """
    return Recipe(optimizer="adafactor", lr=3e-3, schedule="linear", horizon=steps, warmup=_warmup(steps), seed=seed)


def full_tuning(seed: int = 0) -> Recipe:
    """Return the recipe for all weights of a T5 (Raffel et al. 2020, section 3.1): Adafactor at a constant 1e-3."""
    return Recipe(optimizer="adafactor", lr=1e-3, seed=seed)


def gptfluence(steps: int = 96, seed: int = 0) -> Recipe:
    """Return the recipe for all weights of a GPT (Chai et al. 2024): AdamW from 5e-7, linear decay; originally with
    96 steps and batches of 4."""
    return Recipe(optimizer="adamw", lr=5e-7, schedule="linear", horizon=steps, seed=seed)


def _warmup(steps: int) -> int:
    return max(1, round(0.06 * steps)) if steps > 1 else 0

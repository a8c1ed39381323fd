"""Checks of prompts, as operators write them."""

from __future__ import annotations


def refuse_boats(prompt: str, negative_prompt: str) -> str | None:
    """Refuse boats, and fail at what should never be logged."""
    if "secret" in negative_prompt:
        raise ValueError(f"what to do with {negative_prompt}?")
    return "no pictures of boats here" if "boats" in prompt.split() else None

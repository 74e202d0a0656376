"""Checks of encoders' options: ValueErrors that name the option."""

from __future__ import annotations

from collections.abc import Iterable


def check_heads(width: int, num_heads: int) -> None:
    """ValueError where the heads do not divide the width."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"num_heads {num_heads} does not divide the width {width}: choose one of its divisors"
        )


def check_positive(**sizes: int) -> None:
    """ValueError naming the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} {size} must be 1 or more")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """ValueError naming the choices where the value is none of them."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(choices)}")

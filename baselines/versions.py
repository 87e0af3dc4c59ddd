"""Versions of results, raised by hand when quantized networks come out otherwise; a test holds them."""

from baselines.recipes import RECIPES

ENGINE_VERSION = 5
"""Of what all methods share: tracing, folding, ranges, quantizers and reconstruction."""


def result_version(method: str) -> str:
    """Version of the networks that `method` makes: that of the engine, and that of the recipe.

    Raises:
        ValueError: an unknown method.
    """
    if method not in RECIPES:
        raise ValueError(f"method={method!r} should be one of {', '.join(RECIPES)}")
    return f"{ENGINE_VERSION}.{RECIPES[method].version}"

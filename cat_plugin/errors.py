"""The one exception of the package."""


class CATError(ValueError):
    """What the user gave cannot be used; the message holds the figures found and what to do.

    Example:
        >>> from cat_plugin import CATConfig
        >>> CATConfig(alpha=2)
        Traceback (most recent call last):
        cat_plugin.errors.CATError: alpha=2 should be a number from 0 (no correction) to 1 (full correction)
    """

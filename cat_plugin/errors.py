"""The one exception of the package."""


class CATError(ValueError):
    """What the user gave cannot be used; the message holds the figures found and what to do."""

"""Names of classes, as users give them."""

from collections.abc import Sequence

from cat_plugin.errors import CATError


def check_class_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """`names` as a tuple.

    Raises:
        CATError: they are not one text for each of `num_classes` classes.
    """
    if names is None:
        return None
    expected = f"expected a list of {num_classes} texts, one for each class in order"
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise CATError(f"class_names is a {type(names).__name__}; {expected}")
    others = [name for name in names if not isinstance(name, str)]
    if others or len(names) != num_classes:
        found = f"hold {others[0]!r}" if others else f"are {len(names)}"
        raise CATError(f"class_names {found}; {expected}")
    return tuple(names)

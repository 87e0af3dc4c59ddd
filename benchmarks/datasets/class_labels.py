"""Which output of a network each label stands for: by the names of classes, in the order of the network's outputs."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import BenchmarkError
from benchmarks.datasets.image_places import Files, Place
from benchmarks.wording import counted, some

CLASSES_SHOWN = 3
MOST_CLASSES = 10**6
"""Numbers beyond are ids or dates rather than outputs of a network."""
LABEL_SHOWN = 20


@lru_cache(maxsize=1)
def wnids() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes in the order of every network's outputs, which is that of the names."""
    return tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text("utf-8").split())


def read_classes(path: Path) -> tuple[str, ...]:
    """A list of classes, one a line; of lines such as `n01440764 tench, Tinca tinca` the wnid.

    Raises:
        BenchmarkError: no such file, an empty one, or a class that it lists twice.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"--classes {path} cannot be read: {error}; expected a class a line") from error
    first = [line.split()[0] for line in lines]
    names = tuple(first if set(first) <= set(wnids()) else lines)
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice or not names:
        raise BenchmarkError(f"--classes {path} " + (f"lists {twice[0]} twice" if twice else "lists no class"))
    return names


def possible_classes(
    train: Sequence[Place], test: Sequence[Place], given: tuple[str, ...] | None
) -> list[tuple[str, ...]]:
    """Lists of classes that labels of the test images may go by, the likeliest first, one of each length.

    A `given` one is the only one. Else they are the class folders of the training images; or ImageNet's, where labels
    are wnids or numbers; or, where there are no names to go by, those of the test images.

    Raises:
        BenchmarkError: the test images have a class that none of these has, or a number that is no class.
    """
    names = _names(test)
    known = frozenset().union(*(place.classes for place in train))
    if given is None:
        for place in test:
            _refuse_mixture(place, known)
    numbers = are_numbers(test)
    if numbers:
        _refuse_ids(test)
    if given is not None:
        lists = [given]
    else:
        lists = [tuple(sorted(known))] if known else []
        if numbers or names <= set(wnids()):
            lists.append(wnids())
        if numbers:
            lists.append(_numbered(max(map(int, names)) + 1))
        elif not known:
            lists.append(tuple(sorted(names)))
    fitting = [each for each in lists if not _strange(names, each, numbers)]
    if not fitting:
        raise _outside(test, names, lists[0], numbers, given is not None)
    return [each for index, each in enumerate(fitting) if len(each) not in map(len, fitting[:index])]


def chosen_classes(
    lists: Sequence[tuple[str, ...]], test: Sequence[Place], outputs: int | None, *, others: bool
) -> tuple[str, ...]:
    """The one of `possible_classes` for a network with so many `outputs`, or the first one where that is None.

    With `others`, numbers fit a network of more outputs than any of these has, too: not every class need have an image.

    Raises:
        BenchmarkError: none does.
    """
    if outputs is None:
        return lists[0]
    found = {len(each): each for each in lists}
    if outputs not in found and are_numbers(test):
        names, classes = _names(test), _numbered(outputs)
        if _strange(names, classes, True):
            raise _outside(test, names, classes, True, False)
        if others:
            return classes
    if outputs not in found:
        numbers = " or ".join(f"{length:,}" for length in sorted(found))
        raise BenchmarkError(
            f"the model has {outputs:,} outputs, the data {numbers} classes: {some(lists[0], CLASSES_SHOWN)}; "
            "--classes FILE lists those of all outputs in their order, one a line; or give a network for these classes"
        )
    return found[outputs]


def indices(files: Files, classes: tuple[str, ...], numbers: bool) -> Tensor | None:
    """Labels as indices `(N,)` into `classes`; None where there are none, or classes that are not among these."""
    if files.labels is None:
        return None
    places = {str(index) if numbers else name: index for index, name in enumerate(classes)}
    found = [places.get(str(int(label)) if numbers and label.isdigit() else label) for label in files.labels]
    return None if None in found else torch.tensor(found)


def are_numbers(places: Sequence[Place]) -> bool:
    """Whether labels are numbers of outputs, from files; folders are always names.

    Raises:
        BenchmarkError: of several places, some have numbers and others names.
    """
    kinds = {
        place.shown: place.labels is not None and all(map(_is_number, place.class_names))
        for place in places
        if place.is_labelled
    }
    if len(set(kinds.values())) > 1:
        numbers, names = (next(shown for shown, kind in kinds.items() if kind is each) for each in (True, False))
        raise BenchmarkError(f"labels of {numbers} are numbers, those of {names} names of classes; expected one kind")
    return any(kinds.values())


def _names(places: Sequence[Place]) -> frozenset[str]:
    return frozenset().union(*(place.class_names for place in places))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _refuse_mixture(place: Place, known: frozenset[str]) -> None:
    """Raise `BenchmarkError` where some labels of a file are numbers, and others are neither that nor `known`."""
    names = sorted(name for name in place.class_names - known if not _is_number(name))
    if place.labels is None or not names or not any(map(_is_number, place.class_names)):
        return
    image = next(path for path, label in place.listed if label == names[0])
    raise BenchmarkError(
        f"{place.shown}: some labels are numbers, others are not: {some(names, CLASSES_SHOWN)} ({names[0]} is that of "
        f"{image}); expected numbers of outputs, from 0, or names of classes, for all, or --classes FILE"
    )


def _refuse_ids(places: Sequence[Place]) -> None:
    """Raise `BenchmarkError` where a number is none of `MOST_CLASSES`."""
    for place in places:
        # By length before value: Python makes no numbers of thousands of digits.
        label = max((name.lstrip("0") for name in place.class_names), key=lambda name: (len(name), name))
        if len(label) > len(str(MOST_CLASSES)) or int(label or 0) >= MOST_CLASSES:
            shown = label if len(label) <= LABEL_SHOWN else f"{label[:LABEL_SHOWN]}..."
            raise BenchmarkError(
                f"{place.shown}: label {shown} cannot be the number of a class, which are below {MOST_CLASSES:,}; "
                "expected labels that count from 0, or names of classes"
            )


def _numbered(count: int) -> tuple[str, ...]:
    return wnids() if count == len(wnids()) else tuple(map(str, range(count)))


def _strange(names: frozenset[str], classes: tuple[str, ...], numbers: bool) -> list[str]:
    """Labels that are none of `classes`."""
    if numbers:
        return sorted((name for name in names if int(name) >= len(classes)), key=int)
    return sorted(names - set(classes))


def _outside(
    places: Sequence[Place], names: frozenset[str], classes: tuple[str, ...], numbers: bool, given: bool
) -> BenchmarkError:
    strange = _strange(names, classes, numbers)
    shown = next(place.shown for place in places if place.class_names & set(strange))
    known = (
        "the list of --classes"
        if given
        else "the class folders of the training images or ImageNet's wnids, or a list by --classes"
    )
    if numbers:
        known = f"0 to {len(classes) - 1:,}, the outputs of the network or the classes of the data"
        if "0" not in names and len(strange) == 1:
            known += " (labels count from 0, and none of these is 0)"
    return BenchmarkError(
        f"{shown}: {counted(len(strange), 'label')} of test images not among the classes: "
        f"{some(strange, CLASSES_SHOWN)}; expected those of {known}"
    )

"""Objects of Python that options name: `package.module:attribute`, or `path/to/file.py:attribute`."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.wording import reason


def is_named(text: str) -> bool:
    """Whether a text has the form of a name of an object."""
    module, _, attribute = text.rpartition(":")
    return bool(module) and all(part.isidentifier() for part in attribute.split("."))


def named_object(option: str, text: str) -> Any:
    """The object that `text`, given to `option`, names; its module runs. The current directory is searched, too.

    Raises:
        BenchmarkError: `text` is no such name, the module cannot be imported, or it has no such attribute.
    """
    if not is_named(text):
        raise BenchmarkError(f"{option} {text}: expected package.module:name or path/to/file.py:name")
    module_name, _, attributes = text.rpartition(":")
    found: Any = _module(option, module_name)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            public = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
            raise BenchmarkError(
                f"{option} {text}: {module_name} has no {attributes}; it has {', '.join(public) or 'nothing'}"
            )
        found = getattr(found, attribute)
    return found


def called(option: str, text: str, function: Any) -> Any:
    """What `function`, which `text` names, returns without arguments.

    Raises:
        BenchmarkError: it raises something, or takes arguments.
    """
    try:
        return function()
    except Exception as error:  # code of the user's raises what it likes
        raise BenchmarkError(f"{option} {text} failed: {type(error).__name__}: {reason(error)}") from error


def _module(option: str, name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py" and not path.is_file():
        raise BenchmarkError(f"{option}: no such file: {path}")
    # By its own name rather than from its place: processes that decode images must find its transform, too.
    folder, name = (path.resolve().parent, path.stem) if path.suffix == ".py" else (Path.cwd(), name)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    except Exception as error:  # code of the user's raises what it likes
        raise BenchmarkError(f"{option}: {path} cannot be imported: {type(error).__name__}: {reason(error)}") from error
    found = getattr(module, "__file__", None)
    if path.suffix == ".py" and (found is None or Path(found).resolve() != path.resolve()):
        raise BenchmarkError(f"{option}: another module is called {name} like {path}; rename the file")
    return module

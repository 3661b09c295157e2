"""Types checked while testing: what takes or gives arrays by jaxtyping, every other function by beartype alone.

jaxtyping binds the arguments of each call anew, which takes a hundred times as long as beartype's check: for functions
without arrays, which have no shapes to compare, that is all it does.
"""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


def install(*packages: str) -> None:
    """Checks every function and dataclass of these packages, which aren't imported yet."""
    jaxtyping.jaxtyped = _checked  # by this name the import hook's decorators find it
    jaxtyping.install_import_hook(list(packages), "beartype.beartype")


def _checked(*args: Any, **kwargs: Any) -> Any:
    if args or kwargs.keys() != {"typechecker"}:
        return _jaxtyped(*args, **kwargs)
    by_beartype, by_jaxtyping = kwargs["typechecker"], _jaxtyped(**kwargs)

    def decorate(target: Any) -> Any:
        has_arrays = not inspect.isfunction(target) or _names_arrays(target)
        return (by_jaxtyping if has_arrays else by_beartype)(target)

    return decorate


def _names_arrays(function: Callable[..., Any]) -> bool:
    """Whether an annotation has a type of jaxtyping in it; a name that isn't defined yet counts as one."""
    for annotation in function.__annotations__.values():
        if isinstance(annotation, str):
            annotation = function.__globals__.get(annotation, jaxtyping.PyTree)
        if _has_arrays(annotation):
            return True
    return False


def _has_arrays(annotation: Any) -> bool:
    own = getattr(annotation, "__module__", None) or ""
    if own.startswith("jaxtyping") or isinstance(annotation, str | typing.TypeVar | types.ModuleType):
        return True
    parts = annotation if isinstance(annotation, list) else typing.get_args(annotation)
    is_literal = typing.get_origin(annotation) is typing.Literal
    return not is_literal and any(_has_arrays(each) for each in parts)

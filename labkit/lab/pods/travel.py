"""How what a notebook defines travels to a pod: one pickler, by value.

What cannot live in another process (a Lab, a board, a client, an open file) is refused by its name. So is a msgspec
Struct of a notebook: it would arrive without its fields, and silently encode as `{}`. A dataclass arrives whole.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import importlib
import inspect
import io
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any, get_type_hints

import cloudpickle
import msgspec

from labkit.kafka.errors import LabkitError

STAYS = "_stays_in_the_notebook"  # a class with this attribute is refused; it says what to do instead
KNOWN = (types.FunctionType, types.MethodType, functools.partial, type)  # a learner knows the names in these, and
# in a notebook's own classes, but not the attributes of other classes
MAKE_IT_THERE = "make it inside the handler, or in a function that the handler calls"


class CannotTravel(LabkitError):
    """A handler uses something that cannot live in another process. The message names the variable."""


def pack(thing: Any) -> bytes:
    """Pickle `thing`, the functions and classes of a notebook by value. Raises CannotTravel, naming the variable."""
    try:
        return _pickled(thing)
    except CannotTravel:
        raise
    except Exception as error:  # a type that cannot be pickled may raise anything
        variable, culprit = _culprit(thing, "", thing, []) or ("something the handler uses", None)
        why = f": {getattr(type(culprit), STAYS)}" if hasattr(type(culprit), STAYS) else f" ({error}): {MAKE_IT_THERE}"
        raise CannotTravel(f"{variable} cannot travel to a pod{why}") from None


def unpack(packed: bytes) -> Any:
    """The other end of `pack`."""
    return pickle.loads(packed)  # noqa: S301 - comes through a pipe from the process that started this one


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        if hasattr(type(obj), STAYS):
            raise pickle.PicklingError("it stays in the notebook")
        if isinstance(obj, io.TextIOWrapper) and obj not in (sys.stdout, sys.stderr):
            raise pickle.PicklingError("an open file")  # cloudpickle would send a copy of its contents
        if isinstance(obj, type) and issubclass(obj, msgspec.Struct) and not _importable(obj):
            raise CannotTravel(
                f"{obj.__name__} is a msgspec Struct of this notebook, whose fields do not reach a pod. "
                f"Make it a dataclass: `from dataclasses import dataclass`, then `@dataclass` above "
                f"`class {obj.__name__}:`. (A Struct that is imported from a module may stay one.)"
            )
        if isinstance(obj, msgspec.Meta):
            limits = {name: getattr(obj, name) for name in dir(obj) if not name.startswith("_")}
            return functools.partial(msgspec.Meta, **limits), ()
        if obj is dataclasses.MISSING:
            return "MISSING"  # by its name: msgspec asks whether a default *is* this object
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) > 2:  # a class, by value
            reduced[2][0].pop("__msgspec_cache__", None)  # an enum or a dataclass that was decoded here has it
            reduced[2][0].update(_resolved(obj))
        return reduced


def _resolved(cls: type) -> dict[str, Any]:
    """The annotations of a class, with texts resolved: a pod that decodes it would not find what they name."""
    try:
        own, meant = inspect.get_annotations(cls), get_type_hints(cls, include_extras=True)
    except Exception:  # they name what does not exist: decoding that class will raise
        return {}
    resolved = {name: meant[name] for name in own}
    return {} if resolved == own else {"__annotations__": resolved}


def _pickled(thing: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(thing)
    return buffer.getvalue()


def _importable(thing: Any) -> bool:
    """Whether a pod finds this class or function by importing its module."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if module is None or name is None or not _lasting(module):
        return False
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return found is thing


def _lasting(module: str) -> bool:
    """Whether a pod has this module, too: it is no notebook's, and does not travel by value."""
    return module != "__main__" and module not in cloudpickle.list_registry_pickle_by_value()


# -- naming what cannot travel -------------------------------------------------------------------------------------


def _culprit(value: Any, name: str, named: Any, seen: list[Any]) -> tuple[str, Any] | None:
    """The innermost part of `value` that does not travel: its variable, or the one that holds it, and the part.

    `named` is the nearest object around it that has a name, and `name` is that name. None if only something in `seen`
    is to blame.
    """
    seen.append(value)
    ends = True
    unknown = name and not isinstance(value, KNOWN) and _lasting(type(value).__module__)
    for called, part in () if hasattr(type(value), STAYS) else _parts(value, name if named is value else None):
        if _travels(part):
            continue
        ends = False
        inside = (called, part) if called and not unknown else (name, named)
        if not any(part is one for one in seen) and (found := _culprit(part, *inside, seen)):
            return found
    if not ends:
        return None
    if not name:
        return f"a {type(value).__name__}", value
    if isinstance(named, list | tuple | set | frozenset | dict | type):
        return f"the variable '{name}' (holds a {type(value).__name__})", value
    return f"the variable '{name}' (a {type(named).__name__})", value


def _travels(thing: Any) -> bool:
    try:
        _pickled(thing)
    except Exception:
        return False
    return True


def _parts(value: Any, name: str | None) -> Iterator[tuple[str | None, Any]]:
    """The parts of `value`, with the names that the learner knows."""
    if isinstance(value, types.FunctionType):
        if not _importable(value):
            yield from _used_by(value)
    elif isinstance(value, types.MethodType):
        yield from ((None, value.__func__), (None, value.__self__))
    elif isinstance(value, functools.partial):
        known = value.func.__code__.co_varnames if isinstance(value.func, types.FunctionType) else ()
        yield None, value.func
        for number, argument in enumerate(value.args):
            yield known[number] if number < len(known) else None, argument
        yield from value.keywords.items()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((None, part) for part in value)
    elif isinstance(value, dict):
        yield from ((None, part) for pair in value.items() for part in pair)
    elif isinstance(value, type):
        if not _importable(value):
            yield from ((None, base) for base in value.__bases__)
            yield from ((None, member) for member in _plain(vars(value).values()))
    else:
        held = getattr(value, "__dict__", {})
        slots = [
            slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ()) if hasattr(value, slot)
        ]
        for attribute, part in (*held.items(), *((slot, getattr(value, slot)) for slot in slots)):
            yield f"{name or type(value).__name__}.{attribute}", part
        yield None, type(value)


def _used_by(function: types.FunctionType) -> Iterator[tuple[str | None, Any]]:
    """The variables a function uses, inner functions included, and its defaults."""
    code = function.__code__
    yield from zip(code.co_freevars, _contents(function.__closure__ or ()), strict=True)
    for used in dict.fromkeys(_globals_of(code)):
        if used in function.__globals__:
            yield used, function.__globals__[used]
    positional = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    yield from ((None, value) for value in vars(function).values())


def _globals_of(code: types.CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def _contents(cells: tuple[types.CellType, ...]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # assigned later
            yield None


def _plain(members: Any) -> Iterator[Any]:
    """The functions within the members of a class."""
    for member in members:
        if isinstance(member, staticmethod | classmethod):
            yield member.__func__
        elif isinstance(member, property):
            yield from (part for part in (member.fget, member.fset, member.fdel) if part is not None)
        elif not inspect.isdatadescriptor(member):  # descriptors of its fields are not pickled
            yield member

"""How what a notebook defines travels to a pod: one pickler, by value.

Two traps are handled here. A msgspec Struct defined in a notebook would arrive without its fields and encode as `{}`,
silently: it is rebuilt with `msgspec.defstruct`. And what cannot live in another process (a Lab, a board, a client, an
open file) is refused by the name of the variable that the handler uses.
"""

from __future__ import annotations

import importlib
import inspect
import io
import pickle
import types
from collections.abc import Iterator
from typing import Any

import cloudpickle
import msgspec

from labkit.kafka.errors import LabkitError

STAYS = "_stays_in_the_notebook"  # a class with this attribute is refused; it says what to do instead


class CannotTravel(LabkitError):
    """A handler uses something that cannot live in another process."""


def pack(thing: Any) -> bytes:
    """Pickle `thing`, its functions and classes by value. Raises CannotTravel, naming the variable."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(thing)
    except _Refused as refused:
        name = _name_of(refused.thing, thing)
        kind = type(refused.thing).__name__
        what = f"the variable '{name}' (a {kind})" if name else f"a {kind}"
        raise CannotTravel(f"{what} cannot travel to a pod: {refused.advice}") from None
    except (TypeError, pickle.PicklingError) as error:
        culprit, name = _unpicklable(thing)
        what = f"the variable '{name}' ({type(culprit).__name__}) " if name else ""
        raise CannotTravel(
            f"{what or 'something the handler uses '}cannot travel to a pod: {error}. "
            "Make it inside the handler, or in a function that the handler calls once."
        ) from error
    return buffer.getvalue()


def unpack(packed: bytes) -> Any:
    """The other end of `pack`."""
    return pickle.loads(packed)  # noqa: S301 - comes through a pipe from the process that started this one


class _Refused(Exception):
    def __init__(self, thing: Any, advice: str) -> None:
        super().__init__(advice)
        self.thing, self.advice = thing, advice


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        advice = getattr(type(obj), STAYS, None)
        if advice is not None:
            raise _Refused(obj, advice)
        if isinstance(obj, type) and issubclass(obj, msgspec.Struct) and not _importable(obj):
            return _reduce_struct(obj)
        return super().reducer_override(obj)


def _importable(cls: type) -> bool:
    """Whether a pod finds this class by importing its module."""
    if cls.__module__ == "__main__" or cls.__module__ in cloudpickle.list_registry_pickle_by_value():
        return False
    try:
        found: Any = importlib.import_module(cls.__module__)
        for part in cls.__qualname__.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return found is cls


def _reduce_struct(cls: type[msgspec.Struct]) -> tuple[Any, ...]:
    own = inspect.get_annotations(cls)
    fields: list[tuple[Any, ...]] = []
    for field in msgspec.structs.fields(cls):
        if field.name not in own:
            continue  # its base brings it
        if _mentions(field.type, cls):
            raise CannotTravel(
                f"{cls.__name__}.{field.name} is of its own type {cls.__name__}, which cannot be rebuilt in a pod: "
                "put the class into a module, or use a dataclass"
            )
        if field.default is not msgspec.NODEFAULT:
            fields.append((field.name, field.type, field.default))
        elif field.default_factory is not msgspec.NODEFAULT:
            fields.append((field.name, field.type, msgspec.field(default_factory=field.default_factory)))
        else:
            fields.append((field.name, field.type))
    config = cls.__struct_config__
    options = {
        name: getattr(config, name)
        for name in (
            "tag_field", "tag", "omit_defaults", "forbid_unknown_fields", "frozen", "eq", "order", "array_like",
            "repr_omit_defaults", "gc", "weakref", "dict", "cache_hash",
        )
    }  # fmt: skip
    names = {field.name: field.encode_name for field in msgspec.structs.fields(cls)}
    renamed = {name: wire for name, wire in names.items() if name != wire}
    bases = tuple(base for base in cls.__bases__ if base is not msgspec.Struct)
    # Methods come by the state setter, after the class is known to the pickler: one may name its own class.
    methods = {
        name: member
        for name, member in cls.__dict__.items()
        if isinstance(member, types.FunctionType | property | classmethod | staticmethod) and name not in _MADE
    }
    arguments = (cls.__name__, fields, bases, cls.__doc__, renamed, options)
    return _make_struct, arguments, methods, None, None, _set_methods


_MADE = frozenset(msgspec.defstruct("_Empty", []).__dict__)  # what every Struct gets from msgspec itself


def _make_struct(
    name: str,
    fields: list[tuple[Any, ...]],
    bases: tuple[type, ...],
    doc: str | None,
    renamed: dict[str, str],
    options: dict[str, Any],
) -> type[msgspec.Struct]:
    # "frozen", "tag" and the like are what the class said in its own head.
    return msgspec.defstruct(
        name, fields, bases=bases or None, namespace={"__doc__": doc}, rename=renamed or None, **options
    )


def _set_methods(cls: type, methods: dict[str, Any]) -> None:
    for name, member in methods.items():
        setattr(cls, name, member)


def _mentions(annotation: Any, cls: type) -> bool:
    return annotation is cls or any(_mentions(part, cls) for part in getattr(annotation, "__args__", ()))


def _variables(thing: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Every global and closed-over variable that functions within `thing` use."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, types.FunctionType):
        used = inspect.getclosurevars(thing)
        for name, value in (*used.globals.items(), *used.nonlocals.items()):
            yield name, value
            yield from _variables(value, seen)
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _variables(part, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, types.ModuleType):
        for value in list(vars(thing).values()):
            yield from _variables(value, seen)


def _name_of(culprit: Any, thing: Any) -> str | None:
    return next((name for name, value in _variables(thing, set()) if value is culprit), None)


def _unpicklable(thing: Any) -> tuple[Any, str | None]:
    for name, value in _variables(thing, set()):
        if isinstance(value, types.ModuleType | types.FunctionType | type):
            continue
        try:
            _Pickler(io.BytesIO()).dump(value)
        except Exception:
            return value, name
    return thing, None

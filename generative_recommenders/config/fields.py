"""Strict pydantic models for settings and options, and one-line errors from them."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from generative_recommenders.errors import UserError

Count = Annotated[int, Ge(0)]
PositiveInt = Annotated[int, Ge(1)]
Period = PositiveInt
"""Steps, batches or epochs from one time to the next."""
Size = Annotated[int, Ge(1), Le(1 << 20)]
"""Rows, draws or entries that are held at a time."""
TableRows = Annotated[int, Ge(1), Le(1 << 31)]
"""Rows of an embedding table."""
Length = Annotated[int, Ge(1), Le(1 << 20)]
"""Events of a history."""
Width = Annotated[int, Ge(1), Le(1 << 16)]
"""Columns of a weight."""
HiddenWidth = Annotated[int, Le(1 << 16)]
"""Columns of a hidden layer; 0 or below for none."""
SmallCount = Annotated[int, Ge(1), Le(1000)]
"""Blocks, heads, groups, or targets of one position."""
Positive = Annotated[float, Gt(0.0)]
NonNegative = Annotated[float, Ge(0.0)]
Share = Annotated[float, Ge(0.0), Lt(1.0)]
"""A dropout rate, or a part of a whole."""
Probability = Annotated[float, Ge(0.0), Le(1.0)]

SMALLEST, LARGEST = 1e-30, 1e30
"""Sizes of numbers that float32 holds with room for squares of sums."""
MAX_TEXT = 1000
"""Characters of a name or a path."""


@dataclass(frozen=True)
class UsedBy:
    """Metadata of a setting: it acts where a chosen part of the registry ``kind`` asks for the supply ``name``; None:
    where a part of that kind is chosen at all."""

    kind: str
    name: str | None = None


@dataclass(frozen=True)
class OptionOf:
    """Metadata of a setting: it acts where the chosen part of the registry ``kind`` has an option of the same name."""

    kind: str


@dataclass(frozen=True)
class Unless:
    """Metadata of a setting: it acts unless another one, by its gin name, has one of some values."""

    setting: str
    values: tuple[Any, ...]


Model = TypeVar("Model", bound="StrictModel")


class StrictModel(BaseModel):
    """A frozen model without conversions: unknown names, NaN, infinity, "10", 1.0 or True for an int are refused.

    An int counts as a float, a list as a tuple; the same values pass from gin and from JSON.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,  # `check_sizes` sees Python's floats alone, not numpy's of 32 bits
        protected_namespaces=(),  # an option may be called model_...
    )

    @field_validator("*", mode="before")
    @classmethod
    def _sequences_and_sizes(cls, value: Any, info: ValidationInfo) -> Any:
        check_sizes(value)  # before pydantic: an int beyond 64 bits or a text of megabytes would be in its message
        annotation = cls.model_fields[str(info.field_name)].annotation
        origins = {get_origin(each) or each for each in (annotation, *get_args(annotation))}
        if isinstance(value, list) and tuple in origins:
            return tuple(value)
        if isinstance(value, tuple) and list in origins:
            return list(value)
        return value

    def changed(self, **changes: Any) -> Self:
        """The same with other values for some fields, checked as at construction."""
        return type(self)(**{**dict(self), **changes})


class OptionGroup(StrictModel):
    """Options that a part takes as one argument: gin names each of them with the group's ``prefix`` before it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    prefix: ClassVar[str]


def check_sizes(value: Any) -> None:
    """Refuses, anywhere in a value, numbers that neither int64 nor float32 hold, and texts that are no names."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for each in value:
            check_sizes(each)
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        raise PydanticCustomError("size", "must be below 2^63")
    elif isinstance(value, str) and len(value) > MAX_TEXT:
        raise PydanticCustomError("size", f"must have at most {MAX_TEXT} characters")
    elif isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("size", "must be finite")
    elif isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST:
        raise PydanticCustomError("size", f"must be 0 or of a size from {SMALLEST:g} to {LARGEST:g}")


class Section(StrictModel):
    """Settings of one owner in gin; what cannot be is a UserError that names ``GIN_NAME.FIELD``, also in a constructor
    call. A field's docstring is its description."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    gin_name: ClassVar[str]

    def __init__(self, /, **values: Any) -> None:
        with one_line_errors(type(self), self.gin_name):
            super().__init__(**values)


def validated(model: type[Model], values: Mapping[str, Any], owner: str) -> Model:
    """The model of the values, or UserError naming ``owner.NAME``, what it must be and what it is."""
    with one_line_errors(model, owner):
        return model.model_validate(dict(values))


def checked_value(gin_name: str, value: Any, field: FieldInfo | None = None) -> Any:
    """One value as a field of a `StrictModel`, by default of any type, or UserError that calls it by its gin name."""
    owner, _, name = gin_name.partition(".")
    declared: Any = (Any, ...) if field is None else (field.annotation, field)
    one: type[StrictModel] = create_model(owner, __base__=StrictModel, **{name: declared})
    return getattr(validated(one, {name: value}, owner), name)


@contextmanager
def one_line_errors(model: type[BaseModel], owner: str) -> Iterator[None]:
    """Turns pydantic's errors into UserError."""
    try:
        yield
    except ValidationError as error:
        raise UserError(_one_line(error, model, owner)) from None
    except RecursionError:
        raise UserError(f"{owner}: a value is nested too deeply") from None


def _one_line(error: ValidationError, model: type[BaseModel], owner: str) -> str:
    first = error.errors()[0]
    location, context = first["loc"], first.get("ctx", {})
    if not location:  # of several fields: a check of the whole model, which names them
        return str(first["msg"]).removeprefix("Value error, ")
    name = str(location[0])
    if first["type"] == "extra_forbidden":
        return f"{owner} has no parameter {name!r}{nearest(name, model.model_fields)}"
    if first["type"] == "missing":
        return f"{owner}.{name} has no default: give it a value"
    kind, where, got = first["type"], f"{owner}.{name}", shortened(first["input"])
    declared = type_name(model.model_fields[name].annotation)
    if kind == "literal_error":
        return f"{where} {got} is unknown; known: {declared}"
    if kind in _RANGES:
        text, limit = _RANGES[kind]
        must = text.format(_number(context[limit]))
    elif kind in ("size", "value_error"):
        must = str(first["msg"]).removeprefix("Value error, ")
    else:
        must = f"must be of type {declared}"
    return f"{where} {must}, got {got}"


_RANGES = {
    "greater_than": ("must be above {}", "gt"),
    "greater_than_equal": ("must be {} or more", "ge"),
    "less_than": ("must be below {}", "lt"),
    "less_than_equal": ("must be at most {}", "le"),
}
"""pydantic's name of an error to its text, and to the name of the limit in its context."""


def _number(limit: float) -> str:
    """A limit as people write it; an integer keeps all its digits."""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes integers of up to 4300 digits
        return f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest one, and all."""
    names = list(known)
    of_case = {each.casefold(): each for each in names}
    close = difflib.get_close_matches(name.casefold(), of_case, n=1, cutoff=0.5)
    hint = f"; did you mean {of_case[close[0]]!r}?" if close else ""
    return f"{hint}; known: {', '.join(names) or 'none'}"


def type_name(annotation: Any) -> str:
    """A type as people write it: ``int``, ``float | None``, ``tuple[str, ...]``; a Literal as its choices."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(repr(each) for each in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(each) for each in get_args(annotation))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(each) for each in get_args(annotation))}]"
    if annotation in (None, type(None), Ellipsis):
        return "..." if annotation is Ellipsis else "None"
    return getattr(annotation, "__name__", str(annotation))


def range_of(field: FieldInfo) -> str:
    """``>= 1, <= 1000``, or "" where every value of the type will do."""
    signs = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}
    of_entries = [each for inner in get_args(field.annotation) for each in getattr(inner, "__metadata__", ())]
    bounds = [each for each in (*field.metadata, *of_entries) if type(each) in signs]
    return ", ".join(f"{signs[type(each)]} {_number(*astuple(each))}" for each in bounds)

"""Registries of parts: a part is a class, and its constructor's keyword arguments are its options.

A base class (or the registry) names in ``SUPPLIED`` what the program passes where a signature asks for it: widths,
counts, and their like. Everything else in the signature is an option, with the type, range (``Annotated[int, Ge(1)]``)
and default that stand there; gin binds it as ``GIN_NAME.OPTION``. An argument whose type is an `OptionGroup` stands for
the options in it. A registered class refuses other values wherever it is constructed, by gin or by a direct call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter
from typing import Any, TypeVar, get_type_hints

from pydantic import create_model

from generative_recommenders.config.fields import (
    OptionGroup,
    StrictModel,
    checked_value,
    nearest,
    validated,
)
from generative_recommenders.config.plugins import Plugin, plugin_of
from generative_recommenders.errors import UserError, first_line

Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True)
class Part:
    """One entry of a registry. make: the class, or a function that makes the part; name: the first it was registered
    by."""

    name: str
    gin_name: str
    make: Callable[..., Any]
    registry: Registry

    @property
    def plugin(self) -> Plugin | None:
        """The plug-in that the part comes from; None for a built-in one."""
        return plugin_of(self.make.__module__)

    @cached_property
    def _parameters(self) -> dict[str, Parameter]:
        if isinstance(self.make, type) and not _has_constructor(self.make):
            return {}
        found = dict(inspect.signature(self.make).parameters)
        for parameter in found.values():
            if parameter.kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
                raise UserError(f"{self.gin_name}: write its options out by name instead of {parameter}")
        return found

    @cached_property
    def supplied(self) -> frozenset[str]:
        """The constructor's arguments that the program supplies."""
        offered = self.registry.supplied | set(getattr(self.make, "SUPPLIED", ()))
        return frozenset(self._parameters) & offered

    @cached_property
    def _hints(self) -> dict[str, Any]:
        function = self.make.__init__ if isinstance(self.make, type) else self.make  # type: ignore[misc]
        return get_type_hints(function, include_extras=True)  # the extras are the ranges in Annotated

    @cached_property
    def groups(self) -> dict[str, type[OptionGroup]]:
        """Arguments that stand for several options."""
        return {
            name: hint
            for name, hint in self._hints.items()
            if name in self._parameters and isinstance(hint, type) and issubclass(hint, OptionGroup)
        }

    @cached_property
    def options(self) -> type[StrictModel]:
        """The model of the options, from the constructor's signature."""
        parameters, fields = self._parameters, dict[str, Any]()
        try:
            for name, parameter in parameters.items():
                if name in self.groups:
                    group = self.groups[name]
                    fields |= {group.prefix + key: (f.annotation, f) for key, f in group.model_fields.items()}
                elif name not in self.supplied:
                    required = parameter.default is Parameter.empty
                    fields[name] = self._hints[name], ... if required else parameter.default
            return create_model(self.gin_name, __base__=StrictModel, **fields)
        except KeyError as error:
            raise UserError(f"{self.gin_name}: option {error.args[0]!r} needs a type in the signature") from None
        except Exception as error:  # whatever a plug-in's annotations raise
            raise UserError(
                f"{self.gin_name}: the types in its signature cannot be used: {first_line(error)}"
            ) from error

    @cached_property
    def _own_options(self) -> type[StrictModel]:
        """`options` without those of groups, which are checked where a group is made."""
        fields: dict[str, Any] = {
            name: (field.annotation, field)
            for name, field in self.options.model_fields.items()
            if name in self._parameters
        }
        return create_model(self.gin_name, __base__=StrictModel, **fields)

    def option_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values, those of ``given`` over the defaults; UserError for what cannot be."""
        return dict(validated(self.options, given, self.gin_name))

    def check(self, arguments: Mapping[str, Any]) -> None:
        """UserError for the first of a constructor's arguments whose value its option cannot have."""
        options = arguments.keys() & self._own_options.model_fields.keys()
        # A default need not pass: that of a bound is infinity, which gin cannot write.
        given = {name: arguments[name] for name in options if arguments[name] is not self.default(name)}
        validated(self._own_options, given, self.gin_name)

    def checked(self, option: str, value: Any, called: str | None = None) -> Any:
        """The value of one option, as `option_values` has it; others may be missing yet. called: what errors call
        it."""
        if option not in self.options.model_fields:
            raise UserError(f"{self.gin_name} has no parameter {option!r}{nearest(option, self.options.model_fields)}")
        return checked_value(called or f"{self.gin_name}.{option}", value, self.options.model_fields[option])

    def default(self, option: str) -> Any:
        """An option's own default; ``...`` where it has none."""
        field = self.options.model_fields[option]
        return ... if field.is_required() else field.get_default(call_default_factory=True)

    def build(self, given: Mapping[str, Any], supplies: Mapping[str, Any]) -> Any:
        """The part, from options and from what the program supplies. A callable supply is called when it is asked for,
        with the options.
        """
        options = self.option_values(given)
        needed = {name for name in self.supplied if self._parameters[name].default is Parameter.empty}
        if missing := sorted(needed - supplies.keys()):
            raise UserError(f"{self.gin_name} needs {', '.join(missing)}, which this program has no value for")
        passed = {
            name: value(options) if inspect.isfunction(value) else value
            for name, value in supplies.items()
            if name in self.supplied
        }
        for name, group in self.groups.items():
            options[name] = group(**{key: options.pop(group.prefix + key) for key in group.model_fields})
        try:
            return self.make(**options, **passed)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{self.gin_name}: {error}") from error

    @property
    def signature(self) -> inspect.Signature:
        """That of a function which takes what the program supplies and every option by name."""
        parameters = [self._parameters[name] for name in self._parameters if name in self.supplied]
        for name, field in self.options.model_fields.items():
            default = Parameter.empty if field.is_required() else field.get_default()
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=field.annotation))
        return inspect.Signature(parameters)


class Registry:
    """The parts of one kind, by name. kind: as in "unknown KIND"; setting: the gin name that chooses one.

    supplied: what the program passes, for kinds without a base class that names it.
    """

    def __init__(self, kind: str, setting: str, supplied: tuple[str, ...] = ()) -> None:
        self.kind, self.setting, self.supplied = kind, setting, frozenset(supplied)
        self._parts: dict[str, Part] = {}

    def register(self, name: str, *aliases: str, gin_name: str | None = None) -> Callable[[Made], Made]:
        """A class decorator: makes the class known by its names.

        gin_name: what gin binds its options on; the class's own name by default. UserError for a name that is taken.
        """

        def add(make: Made) -> Made:
            part = Part(name, gin_name or make.__name__, make, self)
            if not part.gin_name.isidentifier():
                raise UserError(f"gin name {part.gin_name!r} of {self.kind} {name!r} must be of letters, digits and _")
            for own in (name, *aliases):
                if own in self._parts and not _same(self._parts[own].make, make):
                    taken = self._parts[own].make
                    raise UserError(
                        f"{self.kind} {own!r} is registered already, by {taken.__module__}.{taken.__qualname__}: "
                        "choose another name"
                    )
            other = parts_by_gin_name().get(part.gin_name)
            if other is not None and not _same(other.make, make):
                raise UserError(
                    f"gin name {part.gin_name!r} of {self.kind} {name!r} is taken by {other.registry.kind} "
                    f"{other.name!r}"
                )
            if isinstance(make, type) and _has_constructor(make):
                _check_in_constructor(make, part)
            self._parts.update(dict.fromkeys((name, *aliases), part))
            return make

        return add

    def __getitem__(self, name: str) -> Part:
        """UserError with the nearest and all known names where there is no such part."""
        return self.named(name, self.setting)

    def named(self, name: str, setting: str) -> Part:
        """The part that another setting than the registry's own names; UserError says which."""
        if name not in self._parts:
            raise UserError(f"unknown {self.kind} {name!r} ({setting}){nearest(name, self._parts)}")
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def names(self) -> list[str]:
        """Every name, aliases too, in the order of registration."""
        return list(self._parts)

    def parts(self) -> list[Part]:
        """Every part once."""
        return list(dict.fromkeys(self._parts.values()))


def _has_constructor(make: type) -> bool:
    """Whether the class or a base of it has a constructor, beside those of torch.nn and of object."""
    owner = next(each for each in make.__mro__ if "__init__" in vars(each))
    return owner.__module__.partition(".")[0] not in ("torch", "builtins")


def _check_in_constructor(make: type, part: Part) -> None:
    """Puts `Part.check` before the constructor of a registered class."""
    construct = make.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is make:  # a class derived from it has options and ranges of its own
            part.check(inspect.signature(construct).bind(self, *args, **kwargs).arguments)
        construct(self, *args, **kwargs)

    make.__init__ = checked  # type: ignore[misc]


def _same(one: Any, other: Any) -> bool:
    """Whether the two are one definition, perhaps of a module that was imported again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


ENCODERS = Registry("encoder", "train_fn.main_module", ("embedding_dim", "max_length", "query_encoder"))
INPUT_PREPROCESSORS = Registry("input preprocessor", "train_fn.input_preprocessor")
OUTPUT_POSTPROCESSORS = Registry("output postprocessor", "train_fn.user_embedding_norm", ("embedding_dim",))
ITEM_EMBEDDINGS = Registry(
    "item embedding", "train_fn.embedding_module_type", ("num_items", "embedding_dim", "read_features")
)
SIMILARITIES = Registry(
    "similarity",
    "train_fn.interaction_module_type",
    ("query_embedding_dim", "item_embedding_dim", "mutual_information", "score_dtype"),
)
NEGATIVE_SAMPLERS = Registry("negative sampler", "train_fn.sampling_strategy")
LOSSES = Registry("loss", "train_fn.loss_module")
OBJECTIVES = Registry("objective", "train_fn.objective", ("embedding_dim",))
OPTIMIZERS = Registry("optimizer", "train_fn.optimizer", ("learning_rate", "weight_decay"))
SEEN_FILTERS = Registry("seen filter", "train_fn.seen_filter")
TOP_K_MODULES = Registry("top-k module", "train_fn.top_k_method")
DATA_SOURCES = Registry("data source", "--dataset", ("request",))

REGISTRIES = {
    "encoders": ENCODERS,
    "input_preprocessors": INPUT_PREPROCESSORS,
    "output_postprocessors": OUTPUT_POSTPROCESSORS,
    "item_embeddings": ITEM_EMBEDDINGS,
    "similarities": SIMILARITIES,
    "negative_samplers": NEGATIVE_SAMPLERS,
    "losses": LOSSES,
    "objectives": OBJECTIVES,
    "optimizers": OPTIMIZERS,
    "seen_filters": SEEN_FILTERS,
    "top_k_modules": TOP_K_MODULES,
    "data_sources": DATA_SOURCES,
}
"""By the name that ``--list`` takes."""


def named_top_k(method: str) -> tuple[Part, dict[str, int]]:
    """The part that ``train_fn.top_k_method`` names, and the values of its options that follow the name as published:
    ``MoLCombTopK5_500`` has ``k_per_group = 5`` and ``avg_top_k = 500``."""
    name = method if method in TOP_K_MODULES else method.rstrip("0123456789_")
    part = TOP_K_MODULES[name if name in TOP_K_MODULES else method]
    if name == method:
        return part, {}
    numbers, names = method[len(name) :].split("_"), list(part.options.model_fields)
    if len(numbers) != len(names) or not all(numbers):
        raise UserError(
            f"train_fn.top_k_method {method!r}: {name} takes {len(names)} numbers: {', '.join(names) or 'none'}"
        )
    return part, dict(zip(names, map(int, numbers)))


def parts_by_gin_name() -> dict[str, Part]:
    """Every registered part by the name that gin binds its options on."""
    return {part.gin_name: part for registry in REGISTRIES.values() for part in registry.parts()}


register_encoder = ENCODERS.register
register_input_preprocessor = INPUT_PREPROCESSORS.register
register_output_postprocessor = OUTPUT_POSTPROCESSORS.register
register_item_embedding = ITEM_EMBEDDINGS.register
register_similarity = SIMILARITIES.register
register_negative_sampler = NEGATIVE_SAMPLERS.register
register_loss = LOSSES.register
register_objective = OBJECTIVES.register
register_optimizer = OPTIMIZERS.register
register_seen_filter = SEEN_FILTERS.register
register_top_k = TOP_K_MODULES.register
register_data_source = DATA_SOURCES.register

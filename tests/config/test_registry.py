"""Registries: options from signatures, one line for what cannot be."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Ge, Le

from generative_recommenders.config.fields import OptionGroup, Share
from generative_recommenders.config.published import describe
from generative_recommenders.config.registry import Registry
from generative_recommenders.errors import UserError


class Base:
    SUPPLIED = frozenset({"width", "num_items"})


class Sizes(OptionGroup):
    prefix = "size_"
    height: Annotated[int, Ge(1)]


class Larger(Sizes):
    depth: int = 1


class Bounds(OptionGroup):
    prefix = "bound_"
    upper: float = math.inf


OF_THREE, UNBOUNDED = Sizes(height=3), Bounds()


def registry_with_part() -> Registry:
    registry = Registry("toy", "train_fn.toy")

    @registry.register("Toy", "Other", gin_name="toy_part")
    class Toy(Base):
        def __init__(
            self,
            width: int,
            layers: Annotated[int, Ge(1), Le(9)] = 2,
            rate: Share = 0.1,
            kind: Literal["a", "b"] = "a",
            sizes: tuple[int, ...] = (),
            limit: float | None = None,
        ) -> None:
            self.width, self.layers, self.rate = width, layers, rate
            self.kind, self.sizes, self.limit = kind, sizes, limit

    return registry


def test_gin_names_are_names() -> None:
    with pytest.raises(UserError, match="gin name 'toy-part' of toy 'Toy' must be of letters, digits and _"):
        Registry("toy", "train_fn.toy").register("Toy", gin_name="toy-part")(Base)


def test_options_are_the_arguments_that_are_not_supplied() -> None:
    part = registry_with_part()["Other"]
    assert part.name == "Toy"
    assert part.supplied == {"width"}
    assert list(part.options.model_fields) == ["layers", "rate", "kind", "sizes", "limit"]
    toy = part.build({"rate": 0, "sizes": [3, 4]}, {"width": 7, "num_items": 5})
    assert (toy.width, toy.layers, toy.rate, toy.sizes) == (7, 2, 0, (3, 4))


def test_a_supply_may_be_a_function_of_the_options() -> None:
    toy = registry_with_part()["Toy"].build({"layers": 3}, {"width": lambda options: 10 * options["layers"]})
    assert toy.width == 30


@pytest.mark.parametrize(
    "given, message",
    [
        ({"layers": "10"}, "toy_part.layers must be of type int, got '10'"),
        ({"layers": 1.0}, "toy_part.layers must be of type int, got 1.0"),
        ({"layers": True}, "toy_part.layers must be of type int, got True"),
        ({"layers": 10}, "toy_part.layers must be at most 9, got 10"),
        ({"layers": 0}, "toy_part.layers must be 1 or more, got 0"),
        ({"layers": 10**30}, "toy_part.layers must be below 2\\^63"),
        ({"rate": 1.0}, "toy_part.rate must be below 1, got 1.0"),
        ({"rate": True}, "toy_part.rate must be of type float, got True"),
        ({"rate": math.nan}, "toy_part.rate must be finite"),
        ({"limit": math.inf}, "toy_part.limit must be finite"),
        ({"limit": np.float32("inf")}, r"toy_part.limit must be of type float \| None, got (np.float32\()?inf"),
        ({"limit": 1e39}, "toy_part.limit must be 0 or of a size from 1e-30 to 1e\\+30"),
        ({"limit": 1e-308}, "toy_part.limit must be 0 or of a size"),
        ({"kind": "c"}, "toy_part.kind 'c' is unknown; known: 'a', 'b'"),
        ({"sizes": (1, "2")}, r"toy_part.sizes must be of type tuple\[int, ...\]"),
        ({"layer": 3}, "toy_part has no parameter 'layer'; did you mean 'layers'"),
        ({"width": 3}, "toy_part has no parameter 'width'"),
    ],
)
def test_an_option_that_cannot_be_reports_one_line_error(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        registry_with_part()["Toy"].option_values(given)
    assert "\n" not in str(raised.value)


def test_a_direct_call_is_checked_as_gin_is() -> None:
    registry = registry_with_part()
    toy = registry["Toy"].make

    @registry.register("Small", gin_name="small_part")
    class Small(toy):  # type: ignore[misc, valid-type]
        def __init__(self, width: int, layers: int = 1, bound: Annotated[float, Ge(0)] = math.inf) -> None:
            super().__init__(width, layers)
            self.bound = bound

    @registry.register("Grouped", gin_name="grouped_part")
    class Grouped(Base):
        def __init__(self, width: int, sizes: Sizes, layers: Annotated[int, Ge(1)] = 2) -> None:
            self.height = sizes.height

    assert Grouped(7, Sizes(height=3)).height == 3, "options of a group stand in the group"
    assert toy(7, 3, sizes=[4]).layers == 3
    assert Small(7, bound=math.inf).bound == math.inf, "the default, which gin cannot write"
    with pytest.raises(UserError, match=r"^small_part.bound must be finite, got -inf"):
        Small(7, bound=-math.inf)
    assert Small(7, layers=0).layers == 0, "a derived class has ranges of its own"
    with pytest.raises(UserError, match=r"^toy_part.layers must be 1 or more, got 0$"):
        toy(7, 0)
    with pytest.raises(UserError, match=r"^toy_part.kind 'c' is unknown; known: 'a', 'b'$"):
        toy(7, kind="c")
    with pytest.raises(TypeError, match="width"):
        toy(layers=3)


def test_a_group_is_checked_where_it_is_made_alone() -> None:
    registry = registry_with_part()

    @registry.register("Grouped", gin_name="grouped_part")
    class Grouped(Base):
        def __init__(
            self, sizes: Sizes = OF_THREE, bounds: Bounds = UNBOUNDED, layers: Annotated[int, Ge(1)] = 2
        ) -> None:
            self.sizes, self.bounds = sizes, bounds

    assert Grouped().sizes.height == 3
    assert Grouped(Larger(height=4)).sizes.depth == 1, "of a class with more fields"
    assert Grouped(bounds=Bounds()).bounds.upper == math.inf, "with a default that gin cannot write"
    for sizes in (None, {"height": 5}, object()):
        assert Grouped(sizes).sizes is sizes, "which the constructor may know how to take"
    with pytest.raises(UserError, match=r"^grouped_part.layers must be 1 or more, got 0$"):
        Grouped(None, layers=0)


def test_an_unknown_name_lists_all_and_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown toy 'Toi'.*did you mean 'Toy'.*known: Toy, Other"):
        _ = registry_with_part()["Toi"]


def test_a_name_is_registered_once() -> None:
    registry = registry_with_part()
    with pytest.raises(UserError, match="'Toy' is registered already"):
        registry.register("Toy")(Base)


def test_options_are_written_out_by_name_and_typed() -> None:
    registry = Registry("toy", "train_fn.toy")

    @registry.register("open")
    def open_ended(**options: int) -> None: ...

    @registry.register("untyped")
    def untyped(x=1) -> None: ...

    for name, message in (
        ("open", r"^open_ended: write its options out by name instead of \*\*options"),
        ("untyped", "'x' needs a type"),
    ):
        with pytest.raises(UserError, match=message):
            _ = registry[name].options


def test_the_description_is_one_line_with_types_ranges_and_defaults() -> None:
    (line,) = describe(registry_with_part())
    assert line.startswith(
        "Toy (toy_part): layers: int = 2 (>= 1, <= 9); rate: float = 0.1 (>= 0, < 1); kind: 'a', 'b' = 'a'"
    )


def test_what_the_program_has_no_value_for() -> None:
    with pytest.raises(UserError, match="toy_part needs width"):
        registry_with_part()["Toy"].build({}, {})


def test_registering_needs_no_torch() -> None:
    code = "import sys, generative_recommenders as g; g.register_loss; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"

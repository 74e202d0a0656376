"""Collective helpers that re-raise one rank's error on every rank, so that none waits for one that stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from generative_recommenders.distributed.collectives import Collectives
from generative_recommenders.errors import UserError

Result = TypeVar("Result")


def raise_on_all_ranks(collectives: Collectives, work: Callable[[], Result]) -> Result:
    """``work()`` on every process; a UserError of any process is raised on all of them."""
    fault: UserError | None = None
    try:
        result = work()
    except UserError as error:
        fault = error
    own = None if fault is None else [str(fault), fault.exit_code]
    first = next((each for each in collectives.gather_object_json(own) if each is not None), None)
    if fault is not None:
        raise fault
    if first is not None:
        raised = UserError(first[0])
        raised.exit_code = first[1]
        raise raised
    return result


def on_main(collectives: Collectives, work: Callable[[], Result]) -> Result | None:
    """``work()`` of the main process, which alone calls it and has its result; its UserError is raised on all."""
    return raise_on_all_ranks(collectives, lambda: work() if collectives.is_main else None)


def from_main(collectives: Collectives, make: Callable[[], Any]) -> Any:
    """Result of ``make()``, which the main process alone calls, as JSON on every process."""
    return collectives.broadcast_object_json(on_main(collectives, make))

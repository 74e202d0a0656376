r"""A seen filter of one's own: items are candidates again some days after their last event.

    python main.py --plugin=examples/plugins/cooldown.py --gin_bindings='train_fn.seen_filter = "cooldown"' \
        --gin_bindings='cooldown.days = 7.0'
"""

from typing import Annotated

from annotated_types import Gt

from generative_recommenders import register_seen_filter
from generative_recommenders.errors import UserError
from generative_recommenders.evaluation.seen_filters import SeenFilter


@register_seen_filter("cooldown", gin_name="cooldown")
class Cooldown(SeenFilter):
    """Removes what the user had within ``days`` before the target; the data need times."""

    def __init__(self, days: Annotated[float, Gt(0.0)] = 30.0) -> None:
        self.seconds = 86400 * days

    def removed(self, batch, histories):
        if "next_timestamps" not in batch:
            raise UserError("seen filter 'cooldown' needs times, and the data have none: choose another one")
        age = batch["next_timestamps"][histories.rows] - histories["timestamps"]
        recent = age < self.seconds
        return histories.rows[recent], histories["item_ids"][recent]

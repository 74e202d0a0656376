"""The seen filter of release 0.1.0: the whole history but the target itself, a plug-in."""

from generative_recommenders import register_seen_filter
from generative_recommenders.evaluation.seen_filters import SeenFilter


@register_seen_filter("targets_stay", gin_name="targets_stay")
class TargetsStay(SeenFilter):
    def removed(self, batch, histories):
        other = histories["item_ids"] != batch["target_ids"][histories.rows]
        return histories.rows[other], histories["item_ids"][other]

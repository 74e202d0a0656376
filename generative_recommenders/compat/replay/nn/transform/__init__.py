"""RePlay's transforms of batches."""

from generative_recommenders.compat.replay.nn.transform import columns, negative_sampling
from generative_recommenders.compat.replay.nn.transform.columns import *  # noqa: F403
from generative_recommenders.compat.replay.nn.transform.negative_sampling import *  # noqa: F403

__all__ = [*columns.__all__, *negative_sampling.__all__]  # noqa: PLE0604

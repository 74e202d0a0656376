r"""Goodreads interactions (the UCSD book graph, as published: JSON lines, or CSV with the same names) as a data source.

python preprocess_public_data.py --plugin=examples/plugins/goodreads.py --dataset=goodreads \
    --raw_path=goodreads_interactions_poetry.json.gz
"""

from __future__ import annotations

from generative_recommenders import UserError, register_data_source
from generative_recommenders.data.readers.events import RawRatings, ReadOptions
from generative_recommenders.data.sources.public import Request


@register_data_source("goodreads")
def goodreads(request: Request) -> RawRatings:
    """Every event of a shelf: user_id, book_id, rating (0 where there is none) and date_added, in local time with its
    zone."""
    if request.raw_path is None or not request.raw_path.is_file():
        raise UserError("--dataset=goodreads needs --raw_path=FILE, interactions as JSON lines or CSV")
    return RawRatings(
        name=request.name,
        files=[request.raw_path],
        options=ReadOptions("user=user_id,item=book_id,rating,timestamp=date_added"),
        filter="k_core:5",
        source={"dataset": request.name, "input": request.raw_path.name},
    )

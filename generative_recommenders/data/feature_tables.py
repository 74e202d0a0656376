"""Features of items and users: lined up with the internal ids, described for the manifest."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from generative_recommenders.data.manifest import FeatureSpec, StoredKind
from generative_recommenders.data.schema import large_strings
from generative_recommenders.errors import UserError


def align(owner: str, ids: pa.Array, raw: pa.Table | None) -> tuple[pa.Table, list[FeatureSpec]]:
    """The table of ``items.parquet`` or ``users.parquet`` and its features.

    ids: ``[n]`` large_string original ids in internal order. raw: column ``owner`` (the first row of an id
    counts) and feature columns, or None. An id without features gets nulls; a warning counts them.
    """
    if raw is None:
        return pa.table({owner: ids}), []
    if owner not in raw.column_names:
        raise UserError(f"the features of {owner}s have no column {owner!r}; they have: {', '.join(raw.column_names)}")
    rows = pc.index_in(ids, value_set=large_strings(raw[owner]))
    if rows.null_count:
        logging.warning("%d of %d %ss have no features; theirs are empty", rows.null_count, len(ids), owner)
    features = raw.drop_columns([owner]).take(rows)
    return features.add_column(0, owner, ids), describe(owner, features)


def unrated_items(ids: pa.Array, raw: pa.Table) -> pa.Table:
    """Rows like those of `align` for the items of ``raw`` that are not among ``ids``, in the order of their original
    ids."""
    named = pc.unique(large_strings(raw["item"].drop_null()))
    others = named.filter(pc.invert(pc.is_in(named, value_set=ids)))
    return align("item", others.take(pc.sort_indices(others)), raw)[0]


def describe(owner: str, features: pa.Table) -> list[FeatureSpec]:
    """The manifest's entries of the feature columns of ``item`` or ``user``; UserError for a type that is no
    feature's."""
    specs = []
    for field, column in zip(features.schema, features.columns):
        described: StoredKind
        kind, values = field.type, column
        if (field.metadata or {}).get(b"kind") == b"text":
            described = "text"
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            described, values = "categorical_list", pc.list_flatten(column)
        elif pa.types.is_floating(kind) or pa.types.is_integer(kind):
            described = "numerical"
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            described = "categorical"
        else:
            raise UserError(
                f"feature {field.name!r} of {owner}s has type {kind}; use strings, lists of strings or numbers"
            )
        distinct = pc.count_distinct(values, mode="only_valid").as_py() if "categorical" in described else 0
        specs.append(FeatureSpec(field.name, described, distinct, f"{owner}s.parquet", owner))
    return specs

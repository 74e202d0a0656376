"""Which column of a file is the user, the item, the rating, the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import logging

from generative_recommenders.data.readers.ratings_table import ROLES, ReaderFormat
from generative_recommenders.errors import UserError

_KNOWN_NAMES = {
    "user": "user userid user_id uid reviewerid reviewer_id customer_id",
    "item": "item itemid item_id iid movieid movie_id asin product_id productid parent_asin isbn book_id",
    "rating": "rating ratings stars score overall",
    "timestamp": "timestamp time ts unixreviewtime unix_time date_seconds",
}
ROLE_OF_NAME = {name: role for role, names in _KNOWN_NAMES.items() for name in names.split()}

Roles = tuple[str | None, ...]


def normalise(name: str) -> str:
    """``userId:token`` and `` User_ID`` as the known names spell it."""
    return name.strip().lower().split(":")[0]


def check_roles(path: Path, roles: Sequence[str | None]) -> Roles:
    """``roles`` as a tuple, if it names user and item and nothing twice."""
    unknown = [role for role in roles if role is not None and role not in ROLES]
    if unknown:
        raise UserError(f"{path}: unknown column role {unknown[0]!r}; known: {', '.join(ROLES)}")
    for role in ROLES:
        if list(roles).count(role) > 1:
            raise UserError(
                f"{path}: two columns are taken for the {role}; name the right ones with --columns"
            )
    for role in ("user", "item"):
        if role not in roles:
            raise UserError(f"{path}: no column holds the {role}; name it with --columns")
    return tuple(roles)


def roles_by_name(path: Path, names: Sequence[str], wanted: Sequence[str] | None = None) -> Roles:
    """Each column's role: by ``wanted`` (see ``_roles_of_wanted``), else by known names."""
    if wanted is None:
        return _roles_by_known_names(path, names)
    if len(wanted) > len(ROLES):
        raise UserError(f"--columns has {len(wanted)} names; at most 4: user, item, rating, timestamp")
    asked = [split_entry(entry) for entry in wanted]
    for number, (_, name) in enumerate(asked):
        if name not in names:
            raise UserError(f"{path}: no column {name!r}; it has: {', '.join(names)[:200]}")
        if name in [other for _, other in asked[:number]]:
            raise UserError(f"--columns names {name!r} twice; name every column once")
    role_of = _roles_of_wanted(asked)
    return check_roles(path, [role_of.get(name) for name in names])


def split_entry(entry: str) -> tuple[str | None, str]:
    """``rating=stars`` of --columns as role and name; a name alone has no role yet."""
    role, _, name = entry.partition("=")
    return (role.strip(), name.strip()) if name and role.strip() in ROLES else (None, entry)


def _roles_of_wanted(asked: Sequence[tuple[str | None, str]]) -> dict[str, str]:
    """A role that is said counts, a known name has its own; the others take the roles that are left, in order."""
    roles = {name: role for role, name in asked if role is not None}
    for said, name in asked:
        role = ROLE_OF_NAME.get(normalise(name))
        if said is None and role is not None and role not in roles.values():
            roles[name] = role
    left = [role for role in ROLES if role not in roles.values()]
    others = [name for _, name in asked if name not in roles]
    if others and left[len(others) - 1 :] == ["rating", "timestamp"]:
        name = others[-1]
        raise UserError(
            f"--columns: {name!r} may be a rating or a time; write rating={name} or timestamp={name}"
        )
    return {**roles, **dict(zip(others, left))}


def roles_like_first(where: str, names: Sequence[str], layout: ReaderFormat) -> Roles:
    """Roles of columns called ``names`` where the first file's are ``layout``; UserError if it has others."""
    expected = layout.names or ()
    if sorted(names) != sorted(expected):
        found, first = ", ".join(names)[:100], ", ".join(expected)[:100]
        raise UserError(
            f"{where}: `{found}` are not the columns of the first file, `{first}`; all files must have the same"
        )
    role_of = dict(zip(expected, layout.columns or ()))
    return tuple(role_of[name] for name in names)


def check_places(where: str, names: Sequence[str], roles: Roles) -> None:
    """UserError if a column's place says one role and its known name another."""
    for name, role in zip(names, roles):
        known = ROLE_OF_NAME.get(normalise(name), role)
        if role is not None and known != role:
            raise UserError(
                f"{where}: column {name!r} is in the place of the {role}; write --columns={known}={name},..."
            )


def check_header(where: str, fields: Sequence[str], roles: Roles) -> None:
    """UserError unless the fields of line 1 are names of the roles."""
    for field, role in zip(fields, roles):
        if role is not None and ROLE_OF_NAME.get(normalise(field)) != role:
            raise UserError(
                f"{where}: no header: {field[:40]!r} is in the place of the {role}'s name; the columns must be "
                + ", ".join(role or "any" for role in roles)
            )


def is_known(names: Sequence[str]) -> bool:
    """Whether any of the names is a known one."""
    return any(normalise(name) in ROLE_OF_NAME for name in names)


def say_left_out(path: Path, names: Sequence[str], roles: Roles) -> None:
    """Log the columns that have no role."""
    left_out = [name for name, role in zip(names, roles) if role is None]
    if left_out:
        logging.info("%s: columns left out: %s", path, ", ".join(left_out)[:200])


def say_header(where: str, line: str, fields: Sequence[str]) -> None:
    """Log that a line is taken for a header that has no known name."""
    if not is_known(fields):
        logging.warning("%s `%s` is taken for a header; it is not read as a rating", where, line[:200])


def _roles_by_known_names(path: Path, names: Sequence[str]) -> Roles:
    roles = [ROLE_OF_NAME.get(normalise(name)) for name in names]
    for role in ("user", "item"):
        if role not in roles:
            found = ", ".join(names)[:200]
            raise UserError(
                f"{path}: missing column: no {role} among: {found}; name the columns with --columns"
            )
    return check_roles(path, roles)

"""Which column of a file is the user, the item, the rating, the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from generative_recommenders.data.ratings_table import ROLES
from generative_recommenders.features import UserError

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
    for name in wanted:
        if name not in names:
            raise UserError(f"{path}: no column {name!r}; it has: {', '.join(names)[:200]}")
    role_of = _roles_of_wanted(wanted)
    return check_roles(path, [role_of.get(name) for name in names])


def _roles_of_wanted(wanted: Sequence[str]) -> dict[str, str]:
    """A known name has its own role; the others take the roles that are left, in order."""
    roles: dict[str, str] = {}
    for name in wanted:
        role = ROLE_OF_NAME.get(normalise(name))
        if role is not None and role not in roles.values():
            roles[name] = role
    left = [role for role in ROLES if role not in roles.values()]
    return {**roles, **dict(zip([name for name in wanted if name not in roles], left))}


def _roles_by_known_names(path: Path, names: Sequence[str]) -> Roles:
    roles = [ROLE_OF_NAME.get(normalise(name)) for name in names]
    for role in ("user", "item"):
        if role not in roles:
            found = ", ".join(names)[:200]
            raise UserError(
                f"{path}: missing column: no {role} among: {found}; name the columns with --columns"
            )
    return check_roles(path, roles)

"""Known vulnerabilities of the packages in requirements-lock.txt, from a copy of PyPA's advisory database.

    git clone --depth 1 https://github.com/pypa/advisory-database
    python tools/audit_offline.py --database=advisory-database [--lock=requirements-lock.txt]

Nothing is asked over the network, so an audit is as old as its copy: the date of the newest advisory that
the copy holds for these packages is printed. Packages in comments ("# torch==2.13.0+cpu: ...") are audited
too, builds with a local version as the release that they are built from. Withdrawn advisories do not count,
and a range whose end cannot be read has none. PyYAML comes with the "dev" extra.
Exit code: 0 none is affected, 1 some are, 2 the input cannot be read.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

try:
    import yaml
except ImportError:
    yaml = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"(?:# )?([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s:;\\]+)")
FIRST = Version("0.dev0")


class BadInput(Exception):
    """What cannot be audited, in one line."""


def version_of(value: Any) -> Version | None:
    """As PEP 440 reads it, "2.6.0-cu124" as "2.6.0+cu124"; "0" is before all, None what cannot be read."""
    if not isinstance(value, str | int):
        raise TypeError(f"version {value!r} is not quoted")
    text = str(value)
    if text == "0":
        return FIRST
    for spelling in (text, text.replace("-", "+", 1)):
        try:
            return Version(spelling)
        except InvalidVersion:
            continue
    return None


def in_range(version: Version, events: list[dict[str, Any]]) -> bool:
    """Whether a release lies in an OSV range; a beginning that cannot be read is the first release."""
    bounds = [(version_of(value), kind) for event in events for kind, value in event.items()]
    known = [(bound or FIRST, kind) for bound, kind in bounds if bound or kind == "introduced"]
    inside = False
    for bound, kind in sorted(known, key=lambda each: each[0]):
        if kind == "introduced" and version >= bound:
            inside = True
        elif (kind == "fixed" and version >= bound) or (kind == "last_affected" and version > bound):
            inside = False
    return inside


def affects(advisory: dict[str, Any], name: str, version: Version) -> bool:
    for each in advisory["affected"]:
        package = each["package"]
        if package["ecosystem"] != "PyPI" or canonicalize_name(package["name"]) != name:
            continue
        if any(version_of(listed) == version for listed in each.get("versions") or []):
            return True
        ranges = [part["events"] for part in each.get("ranges") or [] if part["type"] == "ECOSYSTEM"]
        if any(in_range(version, events) for events in ranges):
            return True
    return False


def pins(lock: Path) -> list[tuple[str, Version]]:
    """Every pinned package, its name normalised, without the local part of its version."""
    found = []
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{lock}: {error}") from error
    for number, line in enumerate(lines, start=1):
        pinned = PIN.match(line)
        try:
            if pinned:
                found.append((canonicalize_name(pinned[1]), Version(Version(pinned[2]).public)))
            elif line.strip() and not line.strip().startswith(("#", "-")):
                raise BadInput(f"{lock}:{number}: not a pinned package: {line.strip()}")
        except InvalidVersion as error:
            raise BadInput(f"{lock}:{number}: {error}") from error
    if not found:
        raise BadInput(f"{lock}: no pinned package in it")
    return sorted(found)


def read(path: Path) -> dict[str, Any]:
    try:
        advisory = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(advisory, dict) or "id" not in advisory:
        raise BadInput(f"{path}: not an advisory in OSV format")
    return advisory


def audit(database: Path, lock: Path) -> tuple[list[str], int]:
    """A line for each package and two for all of them, and how many packages are affected."""
    packages = pins(lock)
    if not database.is_dir():
        raise BadInput(f"{database}: no such folder")
    if not any(database.glob("vulns/*/*.yaml")):
        raise BadInput(f"{database}: not a copy of PyPA's advisory database: no vulns/*/*.yaml")
    lines, total, hit = [], 0, 0
    dates = ["none"]
    for name, version in packages:
        count, affecting = 0, []
        for path in sorted((database / "vulns" / name).glob("*.yaml")):
            advisory = read(path)
            dates += [str(advisory[key])[:10] for key in ("modified", "published") if advisory.get(key)]
            if advisory.get("withdrawn"):
                continue
            count += 1
            try:
                if affects(advisory, name, version):
                    affecting.append(" = ".join([advisory["id"], *(advisory.get("aliases") or [])]))
            except (AttributeError, KeyError, TypeError) as error:
                raise BadInput(f"{path}: not an advisory in OSV format: {error!r}") from error
        total, hit = total + count, hit + bool(affecting)
        lines.append(f"{name}=={version}: advisories {count}, affected by {', '.join(affecting) or 'none'}")
    lines.append(f"packages {len(packages)}, advisories {total}, affected packages {hit}")
    newest = max(dates[1:], default=dates[0])
    return [*lines, f"newest advisory that this copy holds for these packages: {newest}"], hit


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database", type=Path, required=True, help="a copy of pypa/advisory-database")
    parser.add_argument(
        "--lock", type=Path, default=ROOT / "requirements-lock.txt", help="the pinned packages"
    )
    options = parser.parse_args(arguments)
    try:
        if yaml is None:
            raise BadInput('PyYAML is not installed: pip install -e ".[dev]"')
        lines, hit = audit(options.database, options.lock)
    except BadInput as error:
        print(f"not audited: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 1 if hit else 0


if __name__ == "__main__":
    sys.exit(main())

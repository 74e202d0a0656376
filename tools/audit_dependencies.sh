#!/usr/bin/env bash
# Known vulnerabilities of every package that requirements.txt brings, by pip-audit (the "dev" extra).
#   tools/audit_dependencies.sh [further options of pip-audit, as --vulnerability-service osv]
# Exit code: 0 none known, 1 some are known, 3 not audited: no pip-audit, or its database does not answer for a package.
# Then the list that would have been asked about is printed, for an audit by hand or on another machine.
set -uo pipefail
cd "$(dirname "$0")/.."
list=$(mktemp)
trap 'rm -f "$list" "$list.json"' EXIT
# Packages in comments are builds with a local version ("2.13.0+cpu"): audited as the release that they are built from.
sed -nE 's/^(# )?([a-z0-9-]+==[^ +:]+)(\+[a-z0-9]+)?[: ].*/\2/p' requirements-lock.txt | sort > "$list"
not_audited() {
  cat "$list"
  echo "not audited: $1; above, the $(wc -l < "$list") pinned packages" >&2
  exit 3
}
command -v pip-audit > /dev/null || not_audited "pip-audit is not installed (pip install pip-audit)"
pip-audit --requirement "$list" --no-deps --disable-pip --format json --output "$list.json" "$@"
code=$?
[ -s "$list.json" ] || not_audited "pip-audit could not ask its database"
skipped=$(grep -o '"skip_reason"' "$list.json" | wc -l)
[ "$skipped" -eq 0 ] || not_audited "the database did not know $skipped packages (pip-audit exit code $code)"
cat "$list.json"
exit "$code"

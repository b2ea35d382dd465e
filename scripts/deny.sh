#!/bin/bash
# Licences, sources, duplicates and advisories of all dependencies, by
# cargo-deny. Without the tool: skipped on a developer's machine, an error in CI.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v cargo-deny >/dev/null; then
  if [ -n "${CI:-}" ]; then
    echo "deny: cargo-deny is not installed: cargo install --locked cargo-deny" >&2
    exit 1
  fi
  echo "deny: skipped: cargo-deny is not installed (cargo install --locked cargo-deny)"
  exit 0
fi
cargo deny --log-level error check licenses bans sources
# The advisory database is a git repository: not every network reaches it.
if timeout 60 cargo deny --log-level off fetch db >/dev/null 2>&1; then
  cargo deny --log-level error check advisories
else
  echo "deny: advisories: skipped: the advisory database can't be fetched from here"
fi

#!/usr/bin/env bash
# Make .venv beside the README and install llmkit with the pinned versions; the arguments are extras: install.sh test
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras=$(IFS=,; echo "$*")
stamp=.venv/installed-${extras:-plain}
want=$(cat pyproject.toml scripts/constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    # torch first and by its exact version: a range would let pip take a build with gigabytes of GPU libraries.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".${extras:+[$extras]}"
    echo "$want" > "$stamp"
fi

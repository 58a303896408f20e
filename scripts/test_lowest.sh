#!/usr/bin/env bash
# Make .venv-lowest with the lowest version of every package that pyproject.toml allows, and run the fast tests in it.
# Arguments go to pytest: PYTHON=python3.13 scripts/test_lowest.sh tests/test_data.py
#
# torch alone is the version of constraints.txt, the one that this has a small CPU build of. TORCH names another;
# give pip an index of CPU builds in PIP_EXTRA_INDEX_URL, else it may take gigabytes of GPU libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${TORCH:-$(sed -n 's/^torch==//p' scripts/constraints.txt)}
"${PYTHON:-python3}" -m venv --clear .venv-lowest
python=.venv-lowest/bin/python
"$python" - "$torch" > .venv-lowest/lowest.txt <<'END'
import sys, tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
lowest = {}
for requirement in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
    if not requirement.startswith("llmkit["):
        name, bound = requirement.split(">=")
        lowest[name] = bound  # what the tests need of a package comes after what an extra needs of it
for name, bound in (lowest | {"torch": sys.argv[1]}).items():
    print(f"{name}=={bound}")
END
pip() { "$python" -m pip "$@" --disable-pip-version-check; }
pip install --quiet "torch==$torch"
# Wheels alone: a bound is of use to nobody on whose Python it has to be compiled.
pip install --quiet --only-binary=:all: -c .venv-lowest/lowest.txt -e ".[test]"
pip check
"$python" -m pytest -n 2 --dist loadfile -m "not slow" "$@"

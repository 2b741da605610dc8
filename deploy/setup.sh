#!/usr/bin/env bash
# Makes this machine a node: an environment with this checkout's requirements, and shells that find it.
#   VENV    the environment (default: ~/.venvs/video-opd); one that has every requirement is used as it is, so it may be shared
#   EXTRA   gpu (default) or cpu
#   PYTHON  makes the environment where there is none: 3.11 or 3.12 (default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-$HOME/.venvs/video-opd} EXTRA=${EXTRA:-gpu} PYTHON=${PYTHON:-python3}

is_complete() {
  "$VENV/bin/python" - "$EXTRA" <<'PY' 2>/dev/null
import sys
import tomllib
from importlib.metadata import version

from packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
needed = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"][sys.argv[1]]]
missing = [need for need in needed if not need.specifier.contains(version(need.name), prereleases=True)]
sys.exit(bool(missing))
PY
}

if is_complete; then
  echo "$VENV has every requirement: nothing to install"
else
  test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --editable ".[$EXTRA]"
fi

# For `ray exec` and `ray attach`, and for the start commands: the same environment, and no Ray without its token.
cat > ~/.video_opd.sh <<EOF
export PATH="$VENV/bin:\$PATH"
export RAY_AUTH_MODE=token
EOF
touch ~/.bashrc
grep -qF .video_opd.sh ~/.bashrc || echo '. ~/.video_opd.sh' >> ~/.bashrc

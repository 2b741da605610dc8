#!/usr/bin/env bash
# Prepares this machine as a node: an environment with this checkout's requirements, and shells that use it.
#   VENV    the environment (default: ~/.venvs/video-opd); a complete one stays as it is and may be shared
#   EXTRA   gpu (default) or cpu
#   PYTHON  the Python 3.11 or 3.12 that creates a missing environment (default: python3)
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
for line in project["dependencies"] + project["optional-dependencies"][sys.argv[1]]:
    need = Requirement(line)
    if need.marker is None or need.marker.evaluate():
        if not need.specifier.contains(version(need.name), prereleases=True):
            sys.exit(1)
PY
}

if is_complete; then
  echo "$VENV has every requirement: nothing to install"
else
  test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
    --constraint constraints.txt --editable ".[$EXTRA]"
fi

# For `ray exec`, `ray attach` and the start commands: the same environment, and token authentication.
cat > ~/.video_opd.sh <<EOF
export PATH="$VENV/bin:\$PATH"
export RAY_AUTH_MODE=token
EOF
touch ~/.bashrc
grep -qF .video_opd.sh ~/.bashrc || echo '. ~/.video_opd.sh' >> ~/.bashrc

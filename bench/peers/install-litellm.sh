#!/bin/sh
# LiteLLM's proxy into an environment of its own at bench/.peers/litellm, in the version that the lock file names.
#
# The lock file is written by
#   echo 'litellm[proxy]' | uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -
set -eu
cd "$(dirname "$0")"
place=../.peers/litellm
cmp -s litellm/requirements.txt "$place/installed" && exit

"${PYTHON:-python3}" -m venv "$place"
rm -f "$place/installed"
"$place/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r litellm/requirements.txt
# Last: an installation that was interrupted is taken up again.
cp litellm/requirements.txt "$place/installed"

#!/bin/sh
# Makes .venv in the folder where it is called, from what `make bundle` has put beside this file. It uses no network.
set -eu
bundle=$(cd "$(dirname "$0")" && pwd)
if [ ! -f "$bundle/made-for" ]; then
	echo "There are no wheels in $bundle yet: run \`make bundle\` where there is a network." >&2
	exit 1
fi
wanted=$(cat "$bundle/made-for")
python=${PYTHON:-python${wanted%% *}}
have=$("$python" "$bundle/made_for.py" 2>/dev/null) || have="not here"
if [ "$have" != "$wanted" ]; then
	echo "The wheels in $bundle are for Python $wanted, and $python is $have." >&2
	echo "Install that Python, or name it: PYTHON=/path/to/python${wanted%% *} sh $0. Or run \`make bundle\` on a machine like this one." >&2
	exit 1
fi
rm -rf .venv
"$python" -m venv .venv
pip() { .venv/bin/python -I -m pip "$@" --quiet --disable-pip-version-check --no-deps --no-index --find-links "$bundle/wheels"; }
pip install --require-hashes --only-binary :all: -r "$bundle/requirements.lock"
pip install labkit
.venv/bin/labkit fetch --from "$bundle/jars"
echo "Done: .venv/bin/labkit lab opens notebook 00."

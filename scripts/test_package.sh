#!/bin/bash
# Build the wheel and the sdist, and use them in an empty environment: the wheel without extras, then
# the sdist with all that a user may name. Usage: scripts/test_package.sh PYTHON [TORCH]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1
torch=${2:-}
version=$("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")')
folder=.venv-package/$version
extras=attributions,embeddings,evaluation,knowledge,peft,run
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_QUIET=1
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
unset PYTHONPATH PYTHONSTARTUP

rm -rf "$folder"
mkdir -p "$folder"
{ grep -v '^torch=' constraints.txt || true; echo "${torch:+torch==$torch}"; } >"$folder/constraints.txt"
constraints=$PWD/$folder/constraints.txt
root=$PWD

echo "Building the sdist, and the wheel from it, with Python $version …"
"$python" -m venv "$folder/build"
"$folder/build/bin/python" -m pip install build
"$folder/build/bin/python" -m build --outdir "$folder/dist" . &>"$folder/build.log" || {
	cat "$folder/build.log" >&2
	exit 1
}
wheel=$(echo "$root/$folder"/dist/*.whl)
sdist=$(echo "$root/$folder"/dist/*.tar.gz)
rm -rf "$folder/build"

"$python" -m venv "$folder/empty"
empty=$root/$folder/empty/bin
mkdir "$folder/elsewhere"
cd "$folder/elsewhere" # where no source code lies

echo "Installing the wheel without extras …"
"$empty/python" -m pip install --no-compile -c "$constraints" "$wheel"
"$empty/python" "$root/scripts/check_package.py" "$empty/hf-adapt"

echo "Installing the sdist with the extras $extras …"
"$empty/python" -m pip uninstall --yes hf-adapt
"$empty/python" -m pip install --no-compile -c "$constraints" "$sdist[$extras]"
"$empty/python" -m pip check
"$empty/python" "$root/scripts/check_package.py" "$empty/hf-adapt" "$extras"
echo "hf_adapt installs and runs on Python $version: $(ls "$root/$folder/dist" | xargs)"

# Sourced by the scripts of this folder: where things are, and how a package is fetched.
# PYTHON   the interpreter that prox24-deploy is installed for; default: .venv of `make`, else python3
# MODELS   folder for what is fetched and made; default: example-models
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$HERE/../.venv/bin/python" ]; then PYTHON=$HERE/../.venv/bin/python; fi
fi
MODELS=${MODELS:-example-models}
export HF_HUB_OFFLINE=1

if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("prox24_deploy") is None)'; then
    echo "prox24-deploy is not installed for $PYTHON; run \`make demo\` once, or set PYTHON." >&2
    exit 5
fi

# fetch FOLDER PACKAGE==VERSION ...: from the package index into a folder of its own, so that nothing
# of the environment of prox24-deploy changes. A folder is whole or absent.
fetch() {
    local folder=$1
    shift
    if [ -d "$folder" ]; then return; fi
    rm -rf "$folder.part"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder.part" "$@"
    mv "$folder.part" "$folder"
}

# build MODEL_DIR OPTION ...: the release lies beside the model.
build() {
    local model=$1
    shift
    "$PYTHON" -m prox24_deploy build "$model" -o "$model-release" "$@"
}

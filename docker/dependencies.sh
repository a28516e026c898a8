#!/bin/sh
# dependencies.sh CONSTRAINTS EXTRAS: makes /opt/venv, with what the job depends on and a list of it, but not the job.
# TORCH_INDEX: where torch comes from, if not from where all else does.
set -eu
PATH=${PATH#/opt/venv/bin:}  # pip stays outside of the environment that it fills
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
work=$(mktemp -d)
cp /metadata/* "$work"
cd "$work"
python3 -m venv --without-pip /opt/venv
pip() { python3 -m pip --python /opt/venv/bin/python "$@"; }
if [ -n "${TORCH_INDEX:-}" ]; then
    pip install --no-deps --index-url "$TORCH_INDEX" --constraint "$1" torch torchvision
fi
pip install --constraint "$1" ".[$2]"
pip uninstall --yes job
pip inspect > /opt/venv/sbom.json
rm -r "$work"

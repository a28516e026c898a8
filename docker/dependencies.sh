#!/bin/sh
# dependencies.sh REQUIREMENTS: makes /opt/venv, with what the job depends on and a list of it (CycloneDX), but not the job.
# TORCH_INDEX: where torch comes from, if not from where all else does.
set -eu
PATH=${PATH#/opt/venv/bin:}  # pip stays outside of the environments that it fills
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
work=$(mktemp -d)
requirements=$work/requirements.txt
# One line for each package, its hashes included.
sed -e :join -e '/\\$/N; s/\\\n *//; t join' "/metadata/$1" > "$requirements"
pip() { environment=$1; shift; python3 -m pip --python "$environment/bin/python" install --no-deps --only-binary :all: "$@"; }
python3 -m venv --without-pip /opt/venv
if [ -n "${TORCH_INDEX:-}" ]; then
    # Builds of its own, whose hashes the list does not have, and which need none of CUDA's packages.
    sed -n 's/^\(torch\|torchvision\)==\([^ ]*\) .*/\1==\2/p' "$requirements" > "$work/torch.txt"
    pip /opt/venv --index-url "$TORCH_INDEX" --requirement "$work/torch.txt"
    sed -i '/^\(torch\|torchvision\|triton\|nvidia-[^=]*\|cuda-[^=]*\)==/d' "$requirements"
fi
pip /opt/venv --require-hashes --requirement "$requirements"
python3 -m venv --without-pip "$work/build"
pip "$work/build" --quiet --require-hashes --requirement /metadata/build.txt
"$work/build/bin/cyclonedx-py" environment --output-reproducible --output-file /opt/venv/sbom.json /opt/venv/bin/python
rm -r "$work"

# make demo       the main job, on this machine    make test       the tests: no long ones, no image, no TPU path
# make lint       style and types                  make unit       the quick tests
# make container  the image, built and run         make xla        the tests of the TPU path, on XLA's CPU device
# make test-all   all tests                        make golden     generated files: manifests, options, schema
# make processes  all but the image and TPU path
# make benchmark-checkpoint, benchmark-data, benchmark-train   what each costs, against others
# make benchmark-serve   throughput and latency of the server, and a restart under load
# make benchmark-startup   CPU seconds that each command takes to start
# make benchmark-monitoring   what monitoring adds to steps and validations, and the size of TensorBoard events
# make benchmark-features   a sweep against heads trained one after another, and scikit-learn
# make benchmark-scale   a fit at the size of ImageNet: time, memory, requests and bytes of each stage
# make benchmark-gpu   whether everything works on a GPU, and how fast
# make benchmark-recipes   the accuracy that each recipe in job/recipes reaches
# make docs       the documentation as a website in site/; warnings and broken links are errors
# make docs-serve the same on http://localhost:8000, rebuilt at each change
# make reference  docs/configuration.txt, from --help-all
# make lock       requirements/*.txt: versions and hashes of all dependencies. UPGRADE=--upgrade: the newest ones
PYTHON ?= python3
VENV ?= .venv
VENV_TPU ?= .venv-tpu
DATA ?=

.PHONY: demo test test-all processes unit xla container golden lint docs docs-serve reference lock
.PHONY: benchmark-checkpoint benchmark-data benchmark-features benchmark-gpu benchmark-monitoring benchmark-recipes benchmark-scale benchmark-serve benchmark-startup benchmark-train
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(VENV)/bin/python -m job demo $(if $(DATA),--data "$(DATA)")

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 --dist=loadgroup -m "not container and not xla and not long"

processes: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 --dist=loadgroup -m "not container and not xla"

# Building the image waits much, so it is done beside the other tests. It needs 20 GB while it is built: so torch-xla's
# environment is made after it.
test-all: $(VENV)/installed
	$(MAKE) --jobs=2 processes container
	$(MAKE) xla

unit: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 -m "not integration and not container and not xla"

xla: $(VENV_TPU)/installed
	$(VENV_TPU)/bin/python -m pytest tests/xla

container: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m container

golden: $(VENV)/installed
	$(VENV)/bin/python tests/k8s/manifests.py
	$(VENV)/bin/python tests/cli/options.py
	$(VENV)/bin/python tests/cli/report_schema.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

benchmark-checkpoint benchmark-data benchmark-features benchmark-gpu benchmark-monitoring benchmark-recipes benchmark-scale benchmark-serve benchmark-startup benchmark-train: benchmark-%: $(VENV)/installed
	$(VENV)/bin/python benchmarks/$*.py

# Material announces its end of life in 2027 at each build.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(VENV)/installed
	$(VENV)/bin/python -m mkdocs build --strict

docs-serve: $(VENV)/installed
	$(VENV)/bin/python -m mkdocs serve --strict

reference: $(VENV)/installed
	COLUMNS=120 $(VENV)/bin/python -m job fit --help-all > docs/configuration.txt

# Each file is locked with what it holds already, and dev first: the images have the versions that are tested.
LOCK = $(VENV)/bin/uv pip compile --quiet $(UPGRADE) --universal --python-version 3.11.5 --generate-hashes --no-annotate \
	--no-header
LOCK_IMAGE = $(LOCK) --constraint requirements/dev.txt setup.cfg

lock: $(VENV)/installed
	$(LOCK) setup.cfg --extra dev --output-file requirements/dev.txt
	$(LOCK_IMAGE) --extra container --extra demo --extra s3 --extra serve --output-file requirements/cpu.txt
	$(LOCK_IMAGE) --extra container --extra timm --extra s3 --extra serve --output-file requirements/gpu.txt
	$(LOCK) setup.cfg --extra tpu-dev --output-file requirements/tpu-dev.txt
	$(LOCK) --constraint requirements/tpu-dev.txt setup.cfg --extra container --extra tpu --extra timm \
		--output-file requirements/tpu.txt
	$(LOCK) requirements/build.in --output-file requirements/build.txt

# A virtual environment of a list, whose files are checked against its hashes; the package itself in place.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
		--requirement $(2)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
endef

# torch-xla pins a torch of its own.
$(VENV_TPU)/installed: setup.cfg pyproject.toml requirements/tpu-dev.txt
	$(call environment,$(VENV_TPU),requirements/tpu-dev.txt)
	touch $@

$(VENV)/installed: setup.cfg pyproject.toml requirements/dev.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11, 5) and 'Python 3.11.5 or newer is needed: make PYTHON=python3.11')"
	$(call environment,$(VENV),requirements/dev.txt)
	touch $@

# make demo       the main job, on this machine    make test       all tests
# make lint       style and types                  make unit       the quick tests
# make container  the image, built and run         make golden     the manifests' renderings, committed for comparison
# make benchmark-checkpoint, make benchmark-data   what each costs, against others
# make reference  docs/configuration.txt, from --help
PYTHON ?= python3
VENV ?= .venv
DATA ?=

.PHONY: demo test unit container golden lint benchmark-checkpoint benchmark-data reference
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(VENV)/bin/python -m job demo $(if $(DATA),--data "$(DATA)")

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

unit: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not integration and not container"

container: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m container

golden: $(VENV)/installed
	$(VENV)/bin/python tests/k8s/manifests.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

benchmark-checkpoint benchmark-data: benchmark-%: $(VENV)/installed
	$(VENV)/bin/python benchmarks/$*.py

reference: $(VENV)/installed
	COLUMNS=120 $(VENV)/bin/python -m job fit --help > docs/configuration.txt

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

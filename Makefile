# make course: set up, run every notebook at demo scale, write the report.   make test: set up, lint, test.
PYTHON ?= python3
SCALE ?= demo
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where torch comes from.  On Linux, plain PyPI has the CUDA build only (3 GB of downloads): without an NVIDIA
# card the CPU build of pytorch.org is tried first.  TORCH_INDEX= takes PyPI's.
TORCH_INDEX ?= $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && echo https://download.pytorch.org/whl/cpu)
# Tests at a time: many of them wait for a kernel or a server to start.  WORKERS=1 runs one after the other.
WORKERS ?= 3
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: setup course smoke test rehearse lint lab report site publish clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11, 5) else f"Python 3.11.5 or newer is needed, this is {v[0]}.{v[1]}.{v[2]}. Try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo "Setting up $(VENV) (one to five minutes, once) ..."
	@$(PYTHON) -m venv $(VENV) || (echo "venv failed. On Debian/Ubuntu: apt install python3-venv" && exit 1)
	@[ -z "$(TORCH_INDEX)" ] || $(PIP) --no-deps --retries 1 --timeout 15 --index-url $(TORCH_INDEX) torch 2>/dev/null \
	  || echo "$(TORCH_INDEX) cannot be reached: torch comes from your package index"
	@$(PIP) --editable '.[notebooks,dev]'
	@touch $(READY)

course: setup
	$(BIN)/python -m lib run --scale $(SCALE)

smoke: setup
	$(BIN)/python -m lib run --scale smoke

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-output --keep-id --extra-keys 'metadata.widgets metadata.papermill cell.metadata.papermill cell.metadata.execution' $(wildcard notebooks/*.ipynb notebooks/solutions/*.ipynb)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

rehearse: setup
	@$(PIP) --editable '.[gpu]'
	$(BIN)/python -m rehearsal $(NN)
	$(BIN)/python -m rehearsal $(NN) --scale gpu

report: setup
	$(BIN)/python -m lib report --scale $(SCALE)

site: setup
	$(BIN)/python -m lib site

publish: setup
	$(BIN)/python -m lib publish

lab: setup
	$(BIN)/python -m lib lab

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache .hypothesis *.egg-info
	@echo "Kept: data/cache (downloaded assets). Remove it by hand to free about 0.6 GB."

# Every target makes the virtual environment it needs. CONSTRAINTS= installs the
# newest versions the package admits instead of those that are tested.
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin
WORKDIR ?= runs/quickstart

.PHONY: quickstart test test-all check format reference parity accuracy performance plan-all manifests endurance slurm

quickstart: .venv/installed
	$(BIN)/scaletrain train --config=experiments/quickstart.py --workdir=$(WORKDIR)
	@echo
	$(BIN)/scaletrain generate --workdir=$(WORKDIR) --prompt='def main(' \
		--max_new_tokens=80
	@echo
	@echo 'Try next:'
	@echo "  $(BIN)/scaletrain generate --workdir=$(WORKDIR) --prompt='import ' --temperature=0.5"
	@echo "  $(BIN)/scaletrain train --config=experiments/quickstart.py --workdir=$(WORKDIR) --config.num_steps=1000"

# All but what is slow and rare: ten minutes on two cores.
test: .venv/dev
	$(BIN)/pytest -q -n 2 --dist=worksteal -m 'not slow'

# Everything: endurance, cut networks and full compiles too.
test-all: test
	$(BIN)/pytest -q -n 2 --dist=worksteal -m slow

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/shellcheck launch/*.sh launch/gke/*.sh launch/slurm.sbatch tests/*.sh

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages of docs/reference/ that are made from the code.
reference: .venv/installed
	$(BIN)/python tests/pages.py

# TORCH= is a Python that has torch and transformers; SEED= repeats a run.
parity: .venv/installed
	$(if $(TORCH),,$(error parity needs TORCH=/path/to/python-with-torch))
	$(BIN)/python tests/reference/parity.py --torch=$(TORCH) $(SEED:%=--seed=%)

# Predicted against published steps; writes docs/accuracy.md (five minutes).
accuracy: .venv/dev
	$(BIN)/python tests/accuracy.py

# Every experiment on its slices, to machine code; writes docs/plans.md (half an hour).
plan-all: .venv/dev
	$(BIN)/python tests/plans.py

# The step's speed on the GPU that is here; writes docs/performance.md (a quarter of an
# hour). ROWS=1b,muon measures some and keeps the others.
performance: .venv/installed
	$(BIN)/python tests/performance.py $(ROWS:%=--rows=%)

# A run killed N times at random moments against one in one piece (8 s a kill).
endurance: .venv/dev
	$(BIN)/python tests/endurance.py -n $(or $(N),50) $(SEED:%=--seed=%)

# launch/gke's manifests against the schemas; tests/manifests.py says what it needs.
manifests:
	PYTHONPATH=. $(PYTHON) tests/manifests.py $(CRD)

# launch/slurm.sbatch on a Slurm of this machine (four minutes); needs its packages.
slurm: .venv/installed
	tests/slurm.sh

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and \
		"scaletrain needs Python 3.12 or newer; set PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable .
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@

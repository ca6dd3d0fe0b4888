# Every target runs the programs of .venv. `make install` makes .venv; the other targets do so too if it is missing.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin
# Versions of the packages, beside the bounds of pyproject.toml; constraints-lowest.txt has the lowest ones.
CONSTRAINTS ?= constraints.txt
STAMP := .venv/.installed
# Each file of tests runs in one process, so that what it prepares is prepared once, in the order of the folders: the
# files of tests/unit take seconds, so both processes end at nearly the same time.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo check test golden bench dist docs soak fuzz audit lint types clean

help:
	@echo "make install   install the package and the tools of its developers in .venv (network)"
	@echo "make demo      train an adapter on nano, the embedded base, and write a page with its pictures (minutes)"
	@echo "make check     lint, types, unit tests, contract tests and numerics tests (minutes)"
	@echo "make test      lint, types and all tests except those of a GPU and the soak tests"
	@echo "make lint      ruff: layout and rules; make types: pyright"
	@echo "make golden    record the reference loss curve again; the commit that does so states why"
	@echo "make bench NAME=time_to_control    run one program of benchmarks/"
	@echo "make dist      build the sdist and the wheel in dist/"
	@echo "make docs      build the documentation site in site/, to be opened as files (network, the first time)"
	@echo "make soak      long tests: killed runs, full disks, damaged files, fuzzing (hours)"
	@echo "make fuzz      coverage-guided fuzzing with atheris for a minute (network)"
	@echo "make audit     known vulnerabilities of the installed packages (network)"
	@echo "make clean     remove .venv, .venv-docs, runs, build, dist and site"

install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	$(BIN)/python -m t2i_adapter.annotators.weights || echo "No weights of the annotators: the tests of soft edges, poses and person masks will be skipped."
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || echo "No Chromium: the tests of the studio in a browser will be skipped. On Debian, apt-get install chromium."
	@touch $@

demo: install
	$(BIN)/t2i-adapter demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright

check: lint types
	$(BIN)/pytest tests/unit tests/contract tests/numerics $(SPREAD)

test: lint types
	$(BIN)/pytest tests -m "not gpu and not soak" $(SPREAD)

golden: install
	$(BIN)/python tests/support/golden.py

bench: install
	@test -f "benchmarks/$(NAME).py" || { echo "NAME=$(NAME): no such file benchmarks/$(NAME).py. NAME is one of: $$(ls benchmarks/*.py | xargs -n1 basename | sed 's/\.py$$//' | tr '\n' ' ')"; exit 2; }
	$(BIN)/python benchmarks/$(NAME).py

dist: install
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

docs: .venv-docs/.installed
	.venv-docs/bin/python tools/docs_site.py
	.venv-docs/bin/zensical build --clean --strict

# The generator has an environment of its own, so that the site is built without torch.
.venv-docs/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Name one: make PYTHON=/path/to/python3.12 docs"; exit 2; }
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet --group docs
	@touch $@

soak: install
	HYPOTHESIS_PROFILE=soak $(BIN)/pytest tests/fuzz --timeout=7200
	$(BIN)/pytest tests -m soak --ignore tests/campaigns --timeout=7200
	$(BIN)/python tests/campaigns/run.py kills --count 100 --minutes 90
	$(BIN)/python tests/campaigns/run.py ranks --count 10
	$(BIN)/python tests/campaigns/run.py full_disk --count 60 --minutes 60
	$(BIN)/python tests/campaigns/run.py read_only --count 60 --minutes 60
	$(BIN)/python tests/campaigns/run.py damage --count 100
	$(BIN)/python tests/campaigns/run.py soak --minutes 60

fuzz: install
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python tests/fuzz/guided.py --seconds 60

audit: install
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --skip-editable

clean:
	rm -rf .venv .venv-docs runs build dist site .cache

# Every target sets up .venv first, from nothing but python3 and make, and reuses it while
# pyproject.toml and constraints.txt stay as they are.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: help demo test lint format kernels traffic clean

help:
	@echo "make demo      stock and swapped DeiT on two real photographs"
	@echo "make test      the whole test suite"
	@echo "make lint      ruff: rules and formatting"
	@echo "make format    ruff: mend what can be mended"
	@echo "make kernels   compile every launch ahead of time: registers, spills, shared memory"
	@echo "make traffic   count operator calls and bytes of stock and swapped models"
	@echo "make clean     remove build outputs and caches (keeps $(VENV))"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned versions in constraints.txt need Python 3.11 or newer; choose one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/deit-fast demo

# One thread a worker: the workers already share the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

kernels: $(STAMP)
	$(RUN) -m bench.kernels

traffic: $(STAMP)
	$(RUN) -m bench.traffic

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

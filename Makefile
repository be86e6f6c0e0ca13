# Every target sets up .venv first, from nothing but python3 and make, and reuses it while
# pyproject.toml and constraints.txt stay as they are.

PYTHON ?= python3
WORKERS ?= 2
MINUTES ?= 20
EVERY ?= 1
# The oldest and the newest that are supported.
TRITONS ?= 3.6.0 3.9.0

VENV := .venv
STAMP := $(VENV)/.installed
SANITIZER := $(VENV)/.sanitizer
RUN := $(VENV)/bin/python

.PHONY: help demo test test-portable lint format gpu kernels kernels-all versions fuzz sanitize traffic clocks clean

help:
	@echo "make demo      stock and swapped DeiT on two real photographs"
	@echo "make test      the whole test suite"
	@echo "               test-portable: the parts that compare with stock PyTorch, which computes as on a plain processor"
	@echo "make lint      ruff: rules and formatting; mypy: types"
	@echo "make format    ruff: mend what can be mended"
	@echo "make gpu       on a machine with a GPU: check and time everything there, in 12 minutes"
	@echo "make kernels   compile Ti's, S's and B's bfloat16 launches for ten GPUs, compare with the table in evidence/results;"
	@echo "               kernels-all: every launch, to write that table"
	@echo "make versions  the kernels with the oldest and the newest Triton that are supported"
	@echo "make fuzz      drawn cases of every operator against float64, for MINUTES=20"
	@echo "make sanitize  every operator's launches executed with bounds and races checked, compiler passes compared"
	@echo "make traffic   count operator calls and bytes of stock and swapped models"
	@echo "make clocks    count what a block's launches take of a GPU's clocks, for the page in evidence/results"
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

# Stock PyTorch rounds, and puts NaN, otherwise on one processor than on the next: here with none of its vector kernels.
# What is exported, wrapped, patched, loaded or built by a script, run and resumed, or found by stock's own formula, is the
# same on each.
OF_SWAP = timm transformers original readout drop_path compact_drop_path
OF_TRAIN = distillation gradients masked
test-portable: $(STAMP)
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --ignore=tests/ops/test_export.py \
		--ignore=tests/ops/test_second_derivatives.py \
		tests/kernels/*/test_backward.py tests/kernels/readout tests/ops tests/nn \
		$(OF_SWAP:%=tests/swap/test_%.py) tests/swap/transformers $(OF_TRAIN:%=tests/train/test_%.py)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

gpu: $(STAMP)
	$(VENV)/bin/deit-fast gpu

# The bfloat16 launches of DeiT-Ti, -S and -B, compared with the table in evidence/results, which kernels-all writes.
kernels: $(STAMP)
	$(RUN) -m evidence.kernels --models tiny,small,base,tiny-384,small-384,base-384,transformers-small --precisions bf16 --against evidence/results/kernels.json

kernels-all: $(STAMP)
	$(RUN) -m evidence.kernels --out evidence/results

# Each beside the pinned PyTorch, in a folder of its own that is kept.
build/triton-%: | $(STAMP)
	rm -rf $@.part
	$(RUN) -m pip install --no-deps --target $@.part triton==$*
	mv $@.part $@

.SECONDARY: $(TRITONS:%=build/triton-%)

versions: $(TRITONS:%=versions-%)

versions-%: build/triton-%
	TRITON_VERSION=$* PYTHONPATH=$(CURDIR)/$< OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal tests/versions/kernels.py

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz --minutes $(MINUTES) --workers $(WORKERS)

# Its metadata asks for Python 3.12; it runs on 3.11 as well.
$(SANITIZER): $(STAMP)
	$(RUN) -m pip install --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

# EVERY=N runs every Nth case; one that divides by 2 or 3 would leave out dtypes and targets. Without tests/conftest.py,
# which chooses Triton's interpreter.
sanitize: $(SANITIZER)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal --confcutdir=tests/sanitize tests/sanitize --every $(EVERY)

traffic: $(STAMP)
	$(RUN) -m evidence.traffic

clocks: $(STAMP)
	$(RUN) -m evidence.clocks --checks --out evidence/results

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

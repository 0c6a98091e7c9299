# minissl: `make` lists all targets.
#
# Packages are installed into .venv on first use. An active conda environment that has them is used instead. For Windows
# without make, the README has the equivalent pip and python commands.

SYSTEM_PYTHON ?= $(if $(filter Windows_NT,$(OS)),python,python3)
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
ACTIVATE := $(if $(filter Windows_NT,$(OS)),.venv\Scripts\activate,source .venv/bin/activate)
CONDA_READY := $(if $(CONDA_PREFIX),$(shell python -c "import torch, jsonargparse, sklearn, minissl" 2>&1 || echo no),no)

ifeq ($(strip $(CONDA_READY)),)
PYTHON := python
READY :=
else
PYTHON := .venv/$(BIN)/python
READY := .venv/ready
endif

DATA ?= scenes
OUT ?= runs/chapter3
OPTIONS ?=
PRESET ?= cpu
FOLDER ?=
BOOK ?= build/book
STUDENT := --gram_loss_weight 0 --ibot_loss_weight 1 --num_patch_prototypes 0 --minutes 4
PARALLEL := -n 2 --dist loadfile

.PHONY: help setup chapter1 chapter2 chapter3 pretext simclr dino dinov2 dinov3 lab book student teacher browser test test-fast check format calibration scoreboard bench bench-views clean

help:  ## list all targets
	@$(SYSTEM_PYTHON) -c "import re; [print(f'  make {n:12}{t}') for n, t in re.findall(r'^([a-z0-9-]+):.*?## (.*)', open('Makefile').read(), re.M)]"

setup: $(READY)  ## install everything into .venv (other targets do it when needed)
	@echo "Installed.$(if $(READY), To run commands of your own, enter in each new terminal: $(ACTIVATE))"

.venv/ready: pyproject.toml
	@echo "Installing into .venv, once. This takes some minutes and up to 6 GB, without further output."
	$(SYSTEM_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet --editable .[lab]
	$(PYTHON) -c "open('.venv/ready', 'w')"

.venv/ready-test: .venv/ready
	$(PYTHON) -m pip install --quiet --editable .[lab,test]
	$(PYTHON) -c "open('.venv/ready-test', 'w')"

.venv/ready-book: .venv/ready
	$(PYTHON) -m pip install --quiet --editable .[lab,book]
	$(PYTHON) -c "open('.venv/ready-book', 'w')"

chapter1: $(READY)  ## transfer learning: train with labels, adapt to new classes (10 minutes, runs/chapter1)
	$(PYTHON) -m minissl train transfer --data scenes:known --out runs/chapter1/known --resume
	$(PYTHON) -m minissl few-shot runs/chapter1/known --data scenes:new
	$(PYTHON) -m minissl train transfer --minutes 1.5 --out runs/chapter1/objects --resume
	$(PYTHON) -m minissl train transfer --minutes 2 --targets '["object", "color", "action", "place"]' --out runs/chapter1/everything --resume
	$(PYTHON) -m minissl compare runs/chapter1/objects runs/chapter1/everything --out runs/chapter1/compare.png

chapter2: $(READY)  ## CLIP, and a supervised encoder for comparison (35 minutes, runs/chapter2)
	$(PYTHON) -m minissl train clip --data scenes:compositions --out runs/chapter2/clip --resume
	$(PYTHON) -m minissl evaluate runs/chapter2/clip --data scenes
	$(PYTHON) -m minissl train transfer --data scenes:compositions --encoder.name cnn --minutes 15 --out runs/chapter2/objects --resume
	$(PYTHON) -m minissl evaluate runs/chapter2/objects --data scenes
	$(PYTHON) -m minissl compare runs/chapter2/objects runs/chapter2/clip --out runs/chapter2/compare.png

chapter3: $(READY)  ## train a small DINO from scratch and draw its figures (DATA=scenes OUT=runs/chapter3 OPTIONS=)
	$(PYTHON) -m minissl train dino --data "$(DATA)" --out $(OUT) --resume $(OPTIONS)

pretext: $(READY)  ## colorization and MAE (20 minutes, runs/pretext)
	$(PYTHON) -m minissl train colorization --crop_size 64 --minutes 8 --out runs/pretext/colorization --resume
	$(PYTHON) -m minissl train mae --crop_size 64 --norm_pix_loss false --decoder_depth 2 --minutes 8 --out runs/pretext/mae --resume

simclr: $(READY)  ## SimCLR (10 minutes, runs/simclr)
	$(PYTHON) -m minissl train simclr --data "$(DATA)" --out runs/simclr --resume $(OPTIONS)

dino: $(READY)  ## the longer DINO of chapter 3.3, its attention history, the collapse lab (an hour, runs/dino)
	$(PYTHON) -m minissl train dino --batch_size 128 --minutes 0 --out runs/dino --resume
	$(PYTHON) -m tests.benchmarks.attention_history dino --minutes 0 --epochs 20 --history runs/emergence.safetensors
	$(PYTHON) -m tests.benchmarks.collapse --out runs/collapse.jsonl

dinov2: $(READY)  ## the longer DINOv2 of chapter 3.4, its ablations, data curation (5 hours, runs/dinov2)
	$(PYTHON) -m minissl train dinov2 --batch_size 128 --minutes 10 --out runs/dinov2 --resume
	$(PYTHON) -m tests.benchmarks.ladder
	$(PYTHON) -m tests.benchmarks.curation --minutes 3
	$(PYTHON) -m tests.benchmarks.curation --method simclr --keep 300 --minutes 2.5 --out runs/curation_few.json

dinov3: $(READY)  ## degradation of dense features, Gram anchoring, dino.txt, distillation: chapter 3.5 (2 hours, runs/dinov3)
	$(PYTHON) -m tests.benchmarks.decay --out runs/decay/decay.json
	$(PYTHON) -m minissl train dinov3 --init_from runs/decay/tight_0 --ibot_loss_weight 0 --gram_update_at [] --gram_loss_weight 50 --gram_start_fraction 0 --gram_warmup_fraction 0 --multi_resolution_crops "[[32,16,0.4],[64,32,0.6]]" --lr 5e-4 --final_lr 5e-5 --minutes 0 --epochs 3 --out runs/dinov3 --resume
	$(PYTHON) -m minissl train dinotxt --encoder.weights runs/dinov3 --out runs/dinotxt --resume
	$(PYTHON) -m minissl train dinov3 --teacher runs/dinov3 $(STUDENT) --encoder.name tiny --encoder.depth 1 --out runs/family/tiny --resume
	$(PYTHON) -m minissl train dinov3 --teacher runs/dinov3 $(STUDENT) --encoder.stem patch --out runs/family/linear --resume
	$(PYTHON) -m tests.benchmarks.family runs/dinov3 runs/family/tiny runs/family/linear --out runs/family.json

lab: $(READY)  ## open JupyterLab on the map of the course
	$(PYTHON) -m jupyterlab --LabApp.default_url=/lab/tree/chapters/0_map.ipynb

book: $(if $(READY),.venv/ready-book)  ## build the course as static pages (build/book/index.html)
	$(PYTHON) -m sphinx -q -b html -c chapters/book -d $(dir $(BOOK))doctrees $(OPTIONS) . $(BOOK)

student: $(READY)  ## build the students' kit: notebooks without solutions (build/student)
	$(PYTHON) -m chapters.kit student

teacher: $(READY)  ## build the teacher's kit: with solutions and lesson notes (build/teacher)
	$(PYTHON) -m chapters.kit teacher

browser:  ## install Chromium for the browser tests (Debian and Ubuntu)
	@command -v chromium || { [ $$(id -u) = 0 ] || sudo=sudo; $$sudo apt-get update -qq && \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium; }

test: export OMP_NUM_THREADS = 1
test: $(if $(READY),.venv/ready-test)  ## run all tests, notebooks included
	$(PYTHON) -m pytest $(PARALLEL)
	$(PYTHON) -m pytest $(PARALLEL) --nbval-lax --nbval-cell-timeout 300 chapters

test-fast: $(if $(READY),.venv/ready-test)  ## run the fast tests, at most two minutes
	$(PYTHON) -m pytest $(PARALLEL) -m "not slow"

check: $(if $(READY),.venv/ready-test)  ## check format and lint
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

format: $(if $(READY),.venv/ready-test)  ## format, and fix what lint can fix
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

calibration: $(READY)  ## measure how difficult Scenes is (half an hour)
	$(PYTHON) -m tests.benchmarks.calibration

scoreboard: $(READY)  ## compare all methods, 3 seeds, 5 CPU minutes each (3 hours; DATA= PRESET= OPTIONS="--jobs 2 --rows DINO")
	$(PYTHON) -m tests.benchmarks.scoreboard --data "$(DATA)" --preset $(PRESET) $(OPTIONS)

bench: $(if $(READY),.venv/ready-test)  ## compare training speed with lightly and an explicit loop (17 minutes, runs/speed.json)
	$(PYTHON) -m tests.benchmarks.speed $(OPTIONS)

bench-views: $(if $(READY),.venv/ready-test)  ## compare augmentation speed with kornia and torchvision (a minute; FOLDER= of images, else Scenes)
	$(PYTHON) -m tests.benchmarks.views $(if $(FOLDER),--folder "$(FOLDER)")

clean:  ## remove .venv; runs and data stay
	$(SYSTEM_PYTHON) -c "import shutil; shutil.rmtree('.venv', ignore_errors=True)"

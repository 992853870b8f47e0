# Commands for users and developers. `make help` lists them.
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
DATA     ?= data/dogscats
unexport DATA # the service's own variable is DATA_DIR
BACKBONE ?= vgg16
RUN      ?=
EPOCHS   ?=
WEIGHTS  ?=
LABELS   ?=
ARGS     ?=
BUNDLE   ?=
HOST     ?=
PORT     ?=
JOBS     ?= 3

# Containers: Docker or Podman, whichever is installed; IMAGE=finetune selects the training image.
CONTAINER ?= $(firstword $(foreach tool,docker podman,$(if $(shell command -v $(tool)),$(tool))))
IMAGE    ?= serve
TAG       = dogs-vs-cats$(if $(filter-out serve,$(IMAGE)),-$(IMAGE))

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SHOWN     := $(if $(filter file,$(origin DATA)),$(wildcard $(DATA)),$(DATA))
FLAGS      = $(if $(RUN),--output-dir runs/$(RUN)) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(ARGS)

.PHONY: help setup finetune serve studio demo check test lint format docs lock benchmark benchmark-serve benchmark-overload benchmark-score image up down container clean
.DEFAULT_GOAL := help

help: ## list all targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'
	@echo "Variables: DATA=$(DATA) BACKBONE=$(BACKBONE) RUN= EPOCHS= WEIGHTS= LABELS= ARGS= BUNDLE= HOST= PORT= IMAGE=$(IMAGE) (all flags: finetune train --help)"

setup: $(INSTALLED) ## create .venv with all dependencies (needs Python 3.10+)

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "make: Python 3.10 or newer with the venv module is required ($(PYTHON) is $$($(PYTHON) --version 2>&1)). Install it and run make setup PYTHON=python3.11." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of requirements.lock, including PyTorch. This takes a few minutes."
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c requirements.lock -e '.[serve,finetune,dev,docs]'
	@touch $@

finetune: $(INSTALLED) ## train on DATA or LABELS: make finetune DATA=photos BACKBONE=efficientnet_lite0
	$(BIN)/finetune train $(if $(LABELS),--labels $(LABELS) )$(if $(and $(LABELS),$(filter file,$(origin DATA))),,--data-dir $(DATA) )--backbone $(BACKBONE) $(FLAGS)

serve: $(INSTALLED) ## serve BUNDLE on 127.0.0.1:8000, with a gallery of DATA: make serve BUNDLE=runs/NAME/bundle DATA=photos
	@BUNDLE='$(BUNDLE)' DATA_DIR='$(SHOWN)' HOST='$(HOST)' PORT='$(PORT)' exec $(BIN)/python -m service

studio: $(INSTALLED) ## collect photos, train and put models live in the browser, in the folder studio/
	@STUDIO=1 STUDIO_DIR="$${STUDIO_DIR:-studio}" BUNDLE='$(BUNDLE)' DATA_DIR='$(SHOWN)' HOST='$(HOST)' PORT='$(PORT)' exec $(BIN)/python -m service

demo: $(INSTALLED) ## train on generated pictures and open the gallery (takes about a minute)
	@if [ -f demo/folds/evaluation.json ]; then \
	  echo "Reusing the demo, with its reviews. To start again: rm -r demo"; \
	else \
	  echo "This takes about a minute: draw 280 pictures, train on 200 of them, and predict all of them by cross-validation."; \
	  rm -rf demo/run demo/folds && \
	  { [ -d demo/pictures ] || $(BIN)/finetune synthesize demo/pictures; } && \
	  $(BIN)/finetune train demo/pictures --backbone efficientnet_lite0 --epochs 10 --output-dir demo/run && \
	  $(BIN)/finetune evaluate demo/run/bundle --folds 5 --data-dir demo/pictures --output-dir demo/folds; \
	fi
	@echo "Pictures: demo/pictures. Run: demo/run. Cross-validated predictions: demo/folds. Reviews: demo/reviews.db."
	@BUNDLE=demo/run/bundle DATA_DIR=demo/pictures EVALUATIONS=demo/folds DATABASE_URL=sqlite:///demo/reviews.db \
	  HOST='$(HOST)' PORT='$(PORT)' exec $(BIN)/python -m service

check: lint ## run ruff, mypy and the fast tests, in about 90 seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m 'not slow and not heavy' $(ARGS)

test: $(INSTALLED) ## run all tests in three processes (JOBS=1: in one)
	@tools/install-test-packages.sh
	$(BIN)/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder) $(ARGS)

lint: $(INSTALLED) ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## fix lint errors and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html, or run \`$(BIN)/python -m http.server --directory site\` to use the search as well."

lock: ## update requirements.lock from pyproject.toml
	$(PYTHON) tools/lock.py $(PYTHONS)

benchmark: $(INSTALLED) ## compare training on cached features with the textbook loop, on DATA
	$(BIN)/python benchmarks/train_speed.py $(DATA) --backbone $(BACKBONE) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(ARGS)

benchmark-serve: $(INSTALLED) ## compare HTTP throughput with inference alone, for BUNDLE and DATA
	$(BIN)/python benchmarks/serve_speed.py $(if $(BUNDLE),$(BUNDLE),models/shipped/dogs-vs-cats) $(DATA) $(ARGS)

benchmark-overload: $(INSTALLED) ## measure throughput at three times the capacity, for BUNDLE and DATA
	$(BIN)/python -m benchmarks.overload $(if $(BUNDLE),$(BUNDLE),models/shipped/dogs-vs-cats) $(DATA) $(ARGS)

benchmark-score: $(INSTALLED) ## measure batch prediction with one and more processes, for BUNDLE and DATA
	$(BIN)/python benchmarks/score_speed.py $(if $(BUNDLE),$(BUNDLE),models/shipped/dogs-vs-cats) $(DATA) $(ARGS)

image: container ## build the container image (IMAGE=finetune: the training image)
	$(CONTAINER) build --target $(IMAGE) -t $(TAG) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) $(if $(PIP_ARGS),--build-arg PIP_ARGS='$(PIP_ARGS)') .

up: container image ## start the service with PostgreSQL on 127.0.0.1:8000 (compose.yaml)
	$(CONTAINER) compose up --detach --wait

down: container ## stop both; volumes are kept
	$(CONTAINER) compose down

container:
	@$(if $(CONTAINER),:,echo "make: Docker or Podman is required. Install one, or set CONTAINER=/path/to/it." >&2; exit 2)

clean: ## delete everything that was built, except runs, data and the demo with its reviews
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache site

# Everything that a person types. `make help` lists it.
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
DATA     ?= data/dogscats
unexport DATA # the service's own variable is DATA_DIR
BACKBONE ?= vgg16
RUN      ?=
EPOCHS   ?=
WEIGHTS  ?=
ARGS     ?=
BUNDLE   ?=
HOST     ?=
PORT     ?=
JOBS     ?= 2

# Containers: docker or podman, whichever is there; IMAGE=finetune for the one that trains.
CONTAINER ?= $(firstword $(foreach tool,docker podman,$(if $(shell command -v $(tool)),$(tool))))
IMAGE    ?= serve
TAG       = dogs-vs-cats$(if $(filter-out serve,$(IMAGE)),-$(IMAGE))

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SHOWN     := $(if $(filter file,$(origin DATA)),$(wildcard $(DATA)),$(DATA))
FLAGS      = $(if $(RUN),--output-dir runs/$(RUN)) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(ARGS)

.PHONY: help setup finetune serve demo test lint format docs lock benchmark benchmark-serve benchmark-overload benchmark-score image up down container clean
.DEFAULT_GOAL := help

help: ## list what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'
	@echo "Variables: DATA=$(DATA) BACKBONE=$(BACKBONE) RUN= EPOCHS= WEIGHTS= ARGS= BUNDLE= HOST= PORT= IMAGE=$(IMAGE) (more flags: finetune train --help)"

setup: $(INSTALLED) ## .venv with everything, from a machine with Python 3.10+ and make

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "make: Python 3.10 or newer with its venv module is wanted, and $$($(PYTHON) --version 2>&1) was found as $(PYTHON); install one and say make setup PYTHON=python3.11." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing what requirements.lock lists, PyTorch among it: some minutes."
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c requirements.lock -e '.[serve,finetune,dev,docs]'
	@touch $@

finetune: $(INSTALLED) ## fine-tune on DATA: make finetune DATA=photos BACKBONE=efficientnet_lite0
	$(BIN)/finetune train --data-dir $(DATA) --backbone $(BACKBONE) $(FLAGS)

serve: $(INSTALLED) ## answer POST /predict and show the gallery on 127.0.0.1:8000: make serve BUNDLE=runs/NAME/bundle DATA=photos PORT=80
	@BUNDLE='$(BUNDLE)' DATA_DIR='$(SHOWN)' HOST='$(HOST)' PORT='$(PORT)' exec $(BIN)/python -m service

demo: $(INSTALLED) ## the whole job on drawn pictures, without any data or download; ends with the gallery running
	rm -rf demo
	$(BIN)/finetune synthesize demo/pictures
	$(BIN)/finetune train --data-dir demo/pictures --backbone efficientnet_lite0 --output-dir demo/run
	$(BIN)/finetune evaluate --bundle demo/run/bundle --data-dir demo/pictures --output-dir demo/evaluation
	$(BIN)/finetune evaluate --folds 5 --bundle demo/run/bundle --data-dir demo/pictures --output-dir demo/folds
	@echo "The pictures are in demo/pictures, the run in demo/run, its evaluation in demo/evaluation, the training photos' in demo/folds."
	@echo "Look at http://$(or $(HOST),127.0.0.1):$(or $(PORT),8000)/gallery now; Ctrl-C ends it."
	@BUNDLE=demo/run/bundle DATA_DIR=demo/pictures EVALUATIONS=demo/folds DATABASE_URL=sqlite:///demo/reviews.db \
	  HOST='$(HOST)' PORT='$(PORT)' exec $(BIN)/python -m service

test: $(INSTALLED) ## the whole test suite, in two processes (JOBS=1: in one, by itself)
	$(BIN)/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile) $(ARGS)

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html, or run \`$(BIN)/python -m http.server --directory site\` to use the search as well."

lock: ## renew requirements.lock from pyproject.toml
	$(PYTHON) tools/lock.py $(PYTHONS)

benchmark: $(INSTALLED) ## training on cached features against the textbook loop, on DATA
	$(BIN)/python benchmarks/train_speed.py $(DATA) --backbone $(BACKBONE) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(ARGS)

benchmark-serve: $(INSTALLED) ## photos a second over HTTP against the engine alone, for BUNDLE, with photos from DATA
	$(BIN)/python benchmarks/serve_speed.py $(if $(BUNDLE),$(BUNDLE),models/shipped/dogs-vs-cats) $(DATA) $(ARGS)

benchmark-overload: $(INSTALLED) ## what is still answered when three times as much arrives, for BUNDLE, with photos from DATA
	$(BIN)/python -m benchmarks.overload $(if $(BUNDLE),$(BUNDLE),models/shipped/dogs-vs-cats) $(DATA) $(ARGS)

benchmark-score: $(INSTALLED) ## photos a second of finetune predict --output, and its growth with processes, on DATA
	$(BIN)/python benchmarks/score_speed.py $(if $(BUNDLE),$(BUNDLE),models/shipped/dogs-vs-cats) $(DATA) $(ARGS)

image: container ## an image of the service, or with IMAGE=finetune of everything, by docker or podman
	$(CONTAINER) build --target $(IMAGE) -t $(TAG) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) $(if $(PIP_ARGS),--build-arg PIP_ARGS='$(PIP_ARGS)') .

up: container image ## the service with its database of reviews, on 127.0.0.1:8000 (compose.yaml)
	$(CONTAINER) compose up --detach --wait

down: container ## stop both; what they keep in volumes stays
	$(CONTAINER) compose down

container:
	@$(if $(CONTAINER),:,echo "make: docker or podman is wanted, and neither was found; install one, or say CONTAINER=/path/to/it." >&2; exit 2)

clean: ## remove what was built, but no run and no data
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache demo site

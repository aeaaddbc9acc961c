# One word a task. Everything runs in .venv; nothing outside the checkout is changed, except Java where there is none.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench scale drills fuzz conf docs lock clean

BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport SPARK_HOME
# glibc would give large buffers back to the kernel at every training step
export MALLOC_MMAP_THRESHOLD_ = 2147483648
export MALLOC_TRIM_THRESHOLD_ = 8589934592
export MALLOC_TOP_PAD_ = 268435456

help:   ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## virtual environment, packages, Java, Delta's jars; nothing is done twice
	@infra/setup.sh

demo: setup  ## the whole chain on the synthetic catalogue, into runs/demo; RUNS=s3://bucket/prefix: into a bucket
	@$(BIN)/python jobs/run_all.py --config conf/demo.yaml $(if $(RUNS),--set runs_dir=$(RUNS))

test: setup  ## the whole test suite, in two processes
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup  ## encoding throughput against the machine's peak; share of an epoch spent waiting for data
	@$(BIN)/python tests/benchmarks/bench.py

scale: setup  ## seconds, memory and bytes of every stage on synthetic catalogues, into runs/scale; SIZE="100000 1000000": items
	@$(BIN)/python tests/benchmarks/scale.py $(or $(SIZE),5000) --draw

drills: setup  ## kill the nightly job 30 times at all of its steps (about half an hour); WHERE=s3: in a bucket
	@ADASID_DRILLS=30 ADASID_DRILLS_WHERE=$(WHERE) ADASID_DRILLS_LOG=$(CURDIR)/drills.jsonl $(BIN)/python -m pytest tests/end_to_end/test_drills.py tests/end_to_end/test_ray_nodes.py tests/end_to_end/test_both_clusters.py tests/end_to_end/test_s3.py tests/ray/test_content.py tests/end_to_end/test_raw_releases.py

fuzz: setup  ## 200 random sources and configs through ingest and build_features (about 10 minutes); what breaks the contract is kept in fuzz-cases
	@ADASID_FUZZ=200 ADASID_FUZZ_CASES=$(CURDIR)/fuzz-cases $(BIN)/python -m pytest -s tests/fuzz -k random

docs: setup  ## write the generated parts of docs from the stages and the settings
	@PYTHONPATH=. $(BIN)/python docs/make.py

conf: setup  ## write conf/base.yaml from adasid/config and adasid/tokenizers
	@$(BIN)/python -c "from pathlib import Path; from adasid.config import render; render.write(Path())"

lock: setup  ## write the lock files from setup.py; what they have stays unless UPGRADE="--upgrade", or "--upgrade-package NAME"
	@infra/lock.sh $(UPGRADE)

clean:  ## remove runs and caches, keep .venv
	@rm -rf runs .pytest_cache .mypy_cache .ruff_cache spark-warehouse

# Every target does what set-up is still missing first; a second call does none.
#   make demo    RL from the shipped tiny policy, then the table before and after
#   make pretrained  SmolLM2 learns to see: fetch, graft, align, SFT, RL; a second call goes on
#   make test    all tests          make check   linters, formatter, types
#   make check-gpu  types of the GPU transports against vLLM itself (SET=cuda: the CUDA build, minutes)
#   make test-gpu  those for a machine with a GPU (SET=cuda); REHEARSE=1: what a CPU can run of them
#   make models  rebuild the shipped checkpoint     make lock   resolve the pinned sets
#   make bench  against TRL, into docs/performance.md; on a machine that does nothing else
#   make audit  a bill of materials of the pinned set, and its known vulnerabilities
#   make results  the pages of docs/results/, from the raw tables beside them
#   make reference  docs/recipe.md and the JSON schema of recipes, from the sections

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

# The pinned set; on a CUDA machine give SET=cuda to every call.
SET := cpu
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.set-up-$(SET)
UV_VERSION := 0.13.9

.PHONY: setup demo pretrained test test-gpu check check-gpu audit bench models results reference lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements/$(SET).txt requirements/overrides.txt
	@if [ ! -x $(RUN)/python ]; then
	  for python in python3.11 python3; do
	    if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
	      found=$$python; break
	    fi
	  done
	  if [ -z "$${found:-}" ]; then
	    echo "set-up needs Python 3.11, and neither python3.11 nor python3 on the PATH is that;" \
	      "install it (Debian: apt-get install python3.11 python3.11-venv python3.11-dev)" >&2
	    exit 1
	  fi
	  if ! "$$found" -m venv $(VENV); then
	    rm -rf $(VENV)
	    echo "set-up could not make a virtual environment with $$found;" \
	      "install its venv module (Debian: apt-get install python3.11-venv)" >&2
	    exit 1
	  fi
	fi
	if [ ! -x $(RUN)/uv ]; then
	  $(RUN)/python -m pip --version >/dev/null 2>&1 || $(RUN)/python -m ensurepip >/dev/null
	  $(RUN)/python -m pip install -q uv==$(UV_VERSION)
	fi
	export VIRTUAL_ENV="$(CURDIR)/$(VENV)"
	echo "set-up: installing requirements/$(SET).txt into $(VENV) (some GB, once)"
	$(RUN)/uv pip install -q --compile-bytecode -r requirements/$(SET).txt --override requirements/overrides.txt --no-deps
	$(RUN)/uv pip install -q --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)
	$(RUN)/equipoise demo

pretrained: $(STAMP)
	$(RUN)/equipoise pretrained

test: $(STAMP)
	# Three processes for two cores, since live tests wait a lot; a file's tests in one of them, in
	# the order of tests/conftest.py. Each takes up to 5 GB.
	HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-gpu: $(STAMP)
	# In one process: they share the cards. What they measured is printed at the end.
	HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -q -rsP --show-capture=stdout tests/gpu

check: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

check-gpu: $(STAMP)
	# GPU transports against the classes of the vLLM that is installed, which `check` does not read.
	$(RUN)/mypy --config-file= --python-version 3.11 --disallow-untyped-defs --ignore-missing-imports \
	  --follow-imports silent --cache-dir .mypy_cache/gpu rollout/transports_gpu.py rollout/transports.py

audit: $(STAMP)
	$(RUN)/uv venv -q --allow-existing build/audit
	$(RUN)/uv pip install -q --python build/audit pip-audit cyclonedx-bom
	build/audit/bin/cyclonedx-py requirements requirements/$(SET).txt -o build/sbom-$(SET).json
	echo "build/sbom-$(SET).json: the bill of materials"
	# Strict: a package that the index has no advisories for is not one without any.
	build/audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements/$(SET).txt

bench: $(STAMP)
	HF_HUB_OFFLINE=1 $(RUN)/python -m benchmarks.race $(BENCH)

models: $(STAMP)
	rm -rf build/tiny-qwen3-vl-random build/cold-start build/cold-start-think
	$(RUN)/equipoise models make qwen3_vl --out build/tiny-qwen3-vl-random
	$(RUN)/equipoise sft recipes/tiny/cold_start.toml --output build/cold-start
	$(RUN)/equipoise sft recipes/tiny/cold_start_think.toml --output build/cold-start-think
	rm -rf models/tiny-qwen3-vl
	cp -r build/cold-start-think/checkpoint models/tiny-qwen3-vl
	cp build/cold-start/checkpoint/README.md models/tiny-qwen3-vl/cold_start.md

results: $(STAMP)
	$(RUN)/python -m benchmarks.results

reference: $(STAMP)
	$(RUN)/equipoise recipe reference > docs/recipe.md
	$(RUN)/equipoise recipe schema > recipes/recipe.schema.json

lock: $(STAMP)
	@lock() {
	  $(RUN)/uv pip compile -q pyproject.toml --extra $$1 --extra dev -p 3.11 \
	    --override requirements/overrides.txt --no-emit-index-url --no-annotate --no-header \
	    -o requirements/$$1.txt
	  { printf '# %s\n' "$${@:2}"; grep -v '^#' requirements/$$1.txt; } > requirements/$$1.tmp
	  mv requirements/$$1.tmp requirements/$$1.txt
	}
	lock cpu "Pinned set for machines without a GPU; made by \`make lock\` from pyproject.toml."
	lock cuda "Pinned set for CUDA machines; made by \`make lock\` from pyproject.toml." \
	  "Installed once, without a GPU, and type checked against; nobody has run this set yet."

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

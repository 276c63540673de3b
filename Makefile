# `make start` is all a user needs; `make help` lists the rest. GNU make 3.81 (macOS) or newer.

VENV = .venv
STAMP = $(VENV)/.installed
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
# No dependency is built from source: a build would fetch its own tools without a hash.
LOCKED = $(PIP) install -q --require-hashes --no-deps --only-binary :all:
# Tests of processes mostly wait: more of them at once than there are cores.
JOBS = 4
PYTEST = $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup

# What is in .venv, and for which checkout: "run /home/me/mlxd". A moved checkout, or a venv whose Python is gone, is made anew.
INSTALLED := $(shell test -x $(VENV)/bin/python && cat $(STAMP) 2>/dev/null)
# MLX for the CPU (on macOS: Metal) or for CUDA: once chosen by `make start CUDA=13`, it stays until `make start CUDA=`.
CUDA ?= $(patsubst cuda%,%,$(filter cuda%,$(firstword $(INSTALLED))))
ifneq ($(filter-out 13,$(CUDA)),)
$(error CUDA=$(CUDA) has no lock file; there is one for CUDA=13)
endif
FLAVOUR = $(if $(CUDA),cuda$(CUDA),run)
LOCK = requirements/$(FLAVOUR).txt
WANTED := $(FLAVOUR) $(CURDIR)
ifneq ($(INSTALLED),$(WANTED))
.PHONY: $(STAMP)
endif

# Tests start thousands of processes, which need not compile anew what the first has.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help start stop status test test-full nemesis lint lock bench recovery soak clean

help:
	@echo "make start      install into $(VENV) if need be, start mlxd, wait until it is ready"
	@echo "                ARGS='--port 8000' is passed on; CUDA=13 takes MLX for CUDA 13; PYTHON=python3.12 picks the Python"
	@echo "make stop       stop it"
	@echo "make status     show it"
	@echo "make test       run the tests; make test-full: the long ones and those that download, too"
	@echo "make nemesis    break everything at random for an hour; MLXD_NEMESIS_S=600 for ten minutes, MLXD_NEMESIS_SEED=1 for the same faults"
	@echo "make lint       run ruff and mypy"
	@echo "make bench      measure it beside mlx_lm.server; ARGS='--model medium' is passed on"
	@echo "make recovery   kill its engines 200 times under streams; ARGS='--kills 20' is passed on"
	@echo "make soak       100,000 short requests, and what they leave behind; ARGS='--requests 20000' is passed on"
	@echo "make lock       remake requirements/*.txt; ARGS=--upgrade takes the newest versions"
	@echo "make clean      stop it, remove $(VENV) and caches"

start: $(STAMP)
	@$(VENV)/bin/mlxd start $(ARGS)

stop:
	@if test -x $(VENV)/bin/mlxd; then $(VENV)/bin/mlxd stop; else echo "not installed here: make start"; fi

status:
	@if test -x $(VENV)/bin/mlxd; then $(VENV)/bin/mlxd status; else echo "not installed here: make start"; exit 3; fi

test: $(STAMP).test
	@MLXD_NEMESIS_S=$${MLXD_NEMESIS_S:-30} $(PYTEST) -m "not full" $(ARGS)

test-full: $(STAMP).test
	@$(PYTEST) $(ARGS)

nemesis: $(STAMP).test
	@MLXD_NEMESIS_S=$${MLXD_NEMESIS_S:-3600} $(VENV)/bin/python -m pytest tests/test_nemesis.py -rP $(ARGS)

lint: $(STAMP).test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

bench: $(STAMP)
	@$(VENV)/bin/python bench/startup.py
	@$(VENV)/bin/python bench/throughput.py $(ARGS)

recovery: $(STAMP)
	@$(VENV)/bin/python bench/recovery.py $(ARGS)

soak: $(STAMP)
	@$(VENV)/bin/python bench/soak.py $(ARGS)

lock:
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh tools/lock.sh $(ARGS)

clean:
	@if test -x $(VENV)/bin/mlxd; then $(VENV)/bin/mlxd stop || true; fi
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find mlxd tests tools bench -name __pycache__ -prune -exec rm -rf {} +

# Another flavour or another place: the old venv is stopped and remade, since mlx-cpu and mlx-cuda-13 both own libmlx.so.
$(STAMP): $(LOCK) requirements/build.txt pyproject.toml
	@if test -n "$(INSTALLED)" && test "$(INSTALLED)" != "$(WANTED)"; then \
	    $(VENV)/bin/python -c "from mlxd.cli import main; main()" stop || true; rm -rf $(VENV); fi
	@if ! $(PIP) --version >/dev/null 2>&1; then \
	    python=`PYTHON="$(PYTHON)" sh tools/find_python.sh` && echo "making $(VENV) with $$python" && "$$python" -m venv --clear $(VENV); fi
	@echo "installing what $(LOCK) names (a minute or so, once)"
	@$(LOCKED) -r $(LOCK) -r requirements/build.txt
	@$(PIP) install -q --no-deps --no-build-isolation --no-index -e .
	@rm -f $(STAMP).test
	@echo "$(WANTED)" >$(STAMP)

$(STAMP).test: $(STAMP) requirements/test.txt
	@$(LOCKED) -r requirements/test.txt
	@touch $@

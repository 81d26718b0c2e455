# `make help` lists the targets. A fresh machine needs python3 (3.11 or newer), make and git; everything else goes into .venv.
PROFILE ?= quick
CORES ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
PYTHON ?= python3
# Another index for torch, e.g. PyTorch's CPU-only wheels (see README.md); PIP_EXTRA takes any other pip option.
TORCH_INDEX ?=
PIP_EXTRA ?= $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# The lock with checksums holds on Linux (x86-64, glibc) with Python 3.11 and the default index; elsewhere its versions are taken without them.
LOCKED = $(if $(PIP_EXTRA),,$(shell $(PYTHON) -c 'import platform, sys; print("yes" if (sys.version_info[:2], sys.platform, platform.machine(), platform.libc_ver()[0]) == ((3, 11), "linux", "x86_64", "glibc") else "")'))

BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
STAMP := .venv/.made-from-lock

export PYTHONUNBUFFERED := 1
# glibc: keep freed memory in the process. torch gives its large buffers back to the system and asks for them again at every
# batch; without that, training on a CPU is about 15 % faster. Other systems ignore the two names.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 100000000000

# One run per profile at a time. The lock is the kernel's, so it is gone when the run is killed and never blocks the next one.
GUARD = $(if $(shell command -v flock 2>/dev/null),flock --nonblock --conflict-exit-code 75 runs/.$(PROFILE).lock)

.PHONY: help test reproduce benchmarks inspect clean
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

# What comes as source is built with the setuptools of the lock, which is there first, and not with one that pip fetches for the purpose.
define FROM_LOCK
sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > .venv/build.lock
$(PIP) install --require-hashes --no-deps -r .venv/build.lock
$(PIP) install --require-hashes --no-deps --no-build-isolation -r requirements.lock
$(PIP) install --no-deps --no-build-isolation -e .
$(BIN)/pip --disable-pip-version-check check
endef
define FROM_CONSTRAINTS
echo 'requirements.lock has no checksums for this machine, Python or index: the versions come from constraints.txt, their files unchecked'
$(PIP) install $(PIP_EXTRA) -c constraints.txt -e '.[dev]'
endef

$(STAMP): settings.ini constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo '$(PYTHON) is older than 3.11: name a newer one, e.g. make PYTHON=python3.12'; exit 2; }
	@echo 'Setting up .venv: about 6 GB and 2 to 10 minutes, only when settings.ini or the locked versions change.'
	@$(PYTHON) -m venv .venv
	@$(if $(LOCKED),$(FROM_LOCK),$(FROM_CONSTRAINTS))
	@touch $@

test: $(STAMP) ## the library notebooks (nbdev_test), then pytest: 5 to 10 minutes
	@echo 'Testing the notebooks'
	@MPLBACKEND=Agg OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing
	@MPLBACKEND=Agg $(BIN)/pytest -q -n 2 --dist loadfile tests

# No MPLBACKEND here: with it, executed notebooks hold no pictures.
reproduce: $(STAMP) ## every paper notebook into runs/PROFILE/ (PROFILE=quick, cpu or paper); goes on where it stopped
	@mkdir -p runs
	@$(GUARD) $(BIN)/snakemake --cores $(CORES) --nolock --rerun-incomplete --keep-incomplete --quiet host reason \
	  --config profile=$(PROFILE) || { code=$$?; \
	  [ $$code -ne 75 ] || echo 'runs/$(PROFILE) is being made by another process: wait for it or end it'; exit $$code; }
	@echo 'Results: runs/$(PROFILE)/, to read: runs/$(PROFILE)/report.html'

# One after the other, on one thread, and with memory as a user's Python has it: they measure time.
benchmarks: $(STAMP) ## the speed notebooks into runs/PROFILE/benchmarks/
	@for notebook in nbs/benchmarks/*.ipynb; do \
	  env -u MALLOC_MMAP_MAX_ -u MALLOC_TRIM_THRESHOLD_ OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m crackxai.reproduce $$(basename $$notebook .ipynb) --profile $(PROFILE) || exit $$?; done

inspect: $(STAMP) ## the interactive page in JupyterLab
	@$(BIN)/jupyter lab nbs/inspect.ipynb --ServerApp.tornado_settings='{"websocket_max_message_size": 104857600}'

clean: ## remove what builds and tests left; .venv, runs/ and data/raw/ stay
	@rm -rf .snakemake .pytest_cache .hypothesis build dist *.egg-info _proc _docs
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

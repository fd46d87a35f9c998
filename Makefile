# `make demo`, `make test` and `make lint` set up .venv by themselves, once.
PYTHON ?= python3
# PyTorch publishes its CPU wheels on an index of its own.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin

.PHONY: demo test test-fast load faults docs programs lint clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/melt-serve demo

# In three parts; what no list names runs in the first. An engine has one thread, so two fit on two cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=40
# Start servers, which is imports in one thread: two files at a time, and each worker has a server of its own.
SERVERS := tests/api tests/bench tests/faults tests/verify tests/test_chat.py tests/test_demo.py tests/test_examples.py \
    tests/test_release.py tests/test_start_failures.py
# Judge memory, rates and times, or take both cores.
ALONE := tests/loadtests tests/deploy/test_monitoring.py tests/engine/test_two_ranks.py tests/test_processes.py \
    tests/test_supervisor.py
test: .venv/.installed programs
	$(PYTEST) -n 2 --dist worksteal $(addprefix --ignore=,$(SERVERS) $(ALONE))
	$(PYTEST) -n 2 --dist loadfile $(SERVERS)
	$(BIN)/python -m pytest --durations=40 $(ALONE)

# What needs no vLLM.
FILES := capacity checkpoint_check cli commands config convert floors links serve server_process site start_checks supervisor
FAST := modeling kernels train task $(FILES:%=test_%.py)
test-fast: .venv/.installed
	$(PYTEST) -n 2 $(addprefix tests/,$(FAST))

# Programs that tests drive, each with Debian's package of it. Installed where that can be done without asking.
PROGRAMS := chromium/chromium curl/curl kubectl/kubernetes-client node/nodejs npm/npm prometheus/prometheus \
    systemd-analyze/systemd
programs:
	@missing=$$(for each in $(PROGRAMS); do command -v $${each%/*} > /dev/null || echo $${each#*/}; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$missing; \
	else echo "make test needs these: sudo apt-get install" $$missing >&2; exit 1; fi

SCENARIO ?= deep_loops
load: .venv/.installed
	$(BIN)/python -m loadtests $(SCENARIO)

# Hours of random bodies, clients that leave, and kills; writes docs/results/faults.md.
FAULTS ?=
faults: .venv/.installed
	$(BIN)/python -m tests.faults $(FAULTS)

# A site of the documents, in site/; a link that leads nowhere fails. Look at it: python3 -m http.server -d site
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two steps: with PyTorch's index in the second one, every package would be looked up there too.
# vLLM brings CUDA builds of torchvision, torchaudio and torchcodec, which break imports of
# transformers on a CPU build of torch; text serving needs none of them.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    f"melt-serve needs Python 3.11 or later, {sys.executable} is {v.major}.{v.minor}; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --retries 0 --extra-index-url $(TORCH_CPU_INDEX) torch==2.13.0+cpu
	$(BIN)/python -m pip install --quiet --editable '.[cpu,train,eval,bench,test,load,docs]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv

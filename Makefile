# Two commands do everything from a clean clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The tests start hundreds of processes, each of which would compile all of Corral anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long model-check chaos soak fuzz lint format docs site images screens compose-test lock audit sbom dist packages sizes clean

demo: $(READY)
	$(BIN)/corral demo

# More workers than cores: tests wait for servers, and for leases to expire. Of each property a quarter of its examples.
test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not long" -n 4 --dist worksteal

# What takes tens of seconds each: the upkeep of lakes, releases built and installed, all pages of the dashboard, every
# command of the documentation. And properties, on all of their examples.
test-long: $(READY)
	CORRAL_EXAMPLES=all $(BIN)/python -m pytest -m "(long or hypothesis) and not slow" -n 4 --dist worksteal

# Minutes of random clients while planners and the bus are killed; the length is CORRAL_MODEL_CHECK_SECONDS.
model-check: $(READY)
	$(BIN)/python -m pytest tests/planner/test_model_check_planner.py -m slow -s

# Every fault on a cluster of real processes, with load on and an account after; the table goes into docs/reliability.md.
# Network and disks are broken in namespaces: that needs root, or a user who may `unshare --net --mount`.
chaos: $(READY)
	rm -rf build/chaos
	CORRAL_CHAOS_OUT=build/chaos $(BIN)/python -m pytest -m slow tests/chaos --durations=0; \
		PYTHONPATH=tests $(BIN)/python -P -m support.chaos.table build/chaos docs/reliability.md

# 2,000 hosts and 50 requests a second on real services; the length is CORRAL_SOAK_SECONDS.
CORRAL_SOAK_SECONDS ?= 3600
soak: $(READY)
	$(BIN)/python bench/soak.py --seconds $(CORRAL_SOAK_SECONDS) --csv docs/images/soak.csv --svg docs/images/soak.svg

# Every reader of what others have written, by coverage-guided fuzzing: a minute for each, or CORRAL_FUZZ_SECONDS.
# What is found is kept in .fuzz, an input that breaks something in .fuzz/crashes.
CORRAL_FUZZ_SECONDS ?= 60
fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -P -m support.fuzz.run all --seconds $(CORRAL_FUZZ_SECONDS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Everything that is generated from the code: message schemas, AsyncAPI, the metric table.
docs: $(READY)
	$(BIN)/python docs/generate.py

# The documentation as a site in build/site; every link is followed.
site: $(READY)
	$(BIN)/python docs/site.py

# The compose file for real, with Docker or Podman: minutes, and a registry of images or debootstrap.
compose-test: $(READY)
	deploy/container/check.sh
	NO_BUILD=1 deploy/container/check-cluster.sh

# Pictures of the real thing on simulated GPUs.
images: $(READY)
	$(BIN)/python docs/images.py

# Each page of the dashboard in light, in dark and on a phone, whole, in build/screens; needs Chromium.
screens: $(READY)
	$(BIN)/python docs/images.py screens

# The lock holds for every supported Python and names no registry: hashes alone say what may be installed.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --group dev --no-emit-index-url \
		--generate-hashes --upgrade --custom-compile-command "make lock" -o requirements.lock
	echo setuptools | $(BIN)/uv pip compile pyproject.toml - --universal --python-version 3.11 --extra all --no-emit-index-url \
		--generate-hashes --constraints requirements.lock --no-annotate --custom-compile-command "make lock" \
		-o deploy/container/requirements.lock

# Known vulnerabilities in what the lock installs. It asks an advisory database, and says so where it can't.
audit: $(READY)
	$(BIN)/python deploy/release/audit.py

# What is in a release, as CycloneDX.
sbom: $(READY)
	$(BIN)/python deploy/release/sbom.py

# Wheel, source archive and their bill of materials, in dist/.
dist: sbom
	$(BIN)/python -m build --no-isolation --outdir dist .

# Debian packages for the distribution whose Python PACKAGES_PYTHON is: 3.11 is Debian 12, 3.12 Ubuntu 24.04, 3.13 Debian 13.
PACKAGES_PYTHON ?= $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Who gives them out, as 'NAME <ADDRESS>'. Default: DEBFULLNAME and DEBEMAIL, else pyproject.toml's authors, else git's user.
PACKAGES_MAINTAINER ?=
packages: $(READY)
	$(BIN)/python deploy/packages/build.py --python $(PACKAGES_PYTHON) --maintainer "$(PACKAGES_MAINTAINER)" --out dist

# What each extra installs, in MB; the table goes into the installation page.
sizes: $(READY)
	$(BIN)/python deploy/release/sizes.py docs/how-to/install.md

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Corral needs Python 3.11 or newer: make PYTHON=python3.12 …") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

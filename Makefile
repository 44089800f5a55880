# Needs only make and a Python of these versions. `make lab PYTHON=/path/to/python3.13` names another than the one found.
OLDEST := 11
NEWEST := 14
VERSIONS := 3.$(OLDEST)–3.$(NEWEST)
CANDIDATES := python3.14 python3.13 python3.12 python3.11 python3
FITS := import sys; sys.exit(not (3, $(OLDEST)) <= sys.version_info[:2] <= (3, $(NEWEST)))
VERSION := import sys; print("%d.%d.%d" % sys.version_info[:3])

# Three at once on two cores, each with a broker of its own; tests/conftest.py keeps three notebooks apart. A file stays in
# one process, with what its tests share and the order of a notebook's cells.
PYTEST := .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=10 --durations-min=5
# The longest files start first, so that no worker ends long after the others.
TESTS := tests/browser tests/notebooks tests/kafka tests/unit
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=280

.PHONY: help lab test test-long bench soak notebooks lint lock environment bundle clean

help:
	@echo 'make lab        open the lab: JupyterLab on notebook 00, with a Kafka behind it'
	@echo 'make test       check all that labkit promises, in minutes; ARGS="-k retries" for a part'
	@echo 'make test-long  the rest: every sabotage, every crash point, cells run twice, load'
	@echo 'make bench      measure labkit against what one would write by hand; ARGS="--json consume" for one'
	@echo 'make soak       minutes of random faults, every record accounted for; ARGS="--seed 7" draws the same again'
	@echo 'make lint       only the checks which take seconds'
	@echo 'make notebooks  run the notebooks and rewrite the outputs they are committed with; ARGS=00_start_here for one'
	@echo 'make lock       resolve the dependencies of pyproject.toml anew into requirements.lock'
	@echo 'make bundle     wheels and jars in the folder bundle, whose install.sh needs no network'
	@echo 'make clean      remove the environment and caches (never your copies in work/)'

lab: environment
	@exec .venv/bin/labkit lab

test: lint
	@exec $(PYTEST) $(NBVAL) notebooks $(TESTS) $(ARGS)

test-long: environment
	@exec $(PYTEST) -m long $(TESTS) $(ARGS)

bench: environment
	@exec .venv/bin/python tests/benchmarks $(ARGS)

soak: environment
	@exec .venv/bin/python tests/soak.py $(ARGS)

lint: environment
	@.venv/bin/python -m ruff check --quiet .
	@.venv/bin/python -m ruff format --check --quiet .
	@.venv/bin/python -m mypy
	@.venv/bin/python -c 'from importlinter.cli import lint_imports_command as lint; lint()'

notebooks: environment
	@exec .venv/bin/python tests/notebooks/outputs.py $(ARGS)

# Makes .venv once; again when the dependencies changed, the folder moved, PYTHON= names another version, or the last
# attempt was cut short: .venv/made-from is written last and says from what it was made. All is compiled at once, by all
# cores: where PYTHONDONTWRITEBYTECODE is set, each pod would compile all that it imports, at each of its starts.
environment:
	@set -eu; \
	wanted='$(PYTHON)'; \
	made_from=$$(cat requirements.lock pyproject.toml | cksum)" $(CURDIR)"; \
	if [ "$$(cat .venv/made-from 2>/dev/null)" = "$$made_from" ] && have=$$(.venv/bin/python -c '$(VERSION)' 2>/dev/null); then \
		if [ -z "$$wanted" ] || [ "$$("$$wanted" -c '$(VERSION)' 2>/dev/null)" = "$$have" ]; then exit 0; fi; \
	fi; \
	python=; seen=; \
	for candidate in $${wanted:-$(CANDIDATES)}; do \
		found=$$("$$candidate" -c '$(VERSION)' 2>/dev/null) || continue; \
		if "$$candidate" -c '$(FITS)'; then python=$$candidate; break; fi; \
		seen="$$seen $$candidate is $$found;"; \
	done; \
	if [ -z "$$python" ]; then \
		echo "labkit needs Python $(VERSIONS).$${seen:- No $${wanted:-python3} runs here;} nothing was changed." >&2; \
		echo "Install one of these versions; if it is not on the PATH, name it: make lab PYTHON=/path/to/python3.13" >&2; \
		exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$$python ($$found) has no complete venv module. On Debian and Ubuntu: apt install python3-venv" >&2; \
		echo "Or name another Python: make lab PYTHON=/path/to/python3.13" >&2; \
		exit 1; \
	fi; \
	echo "Making the environment .venv with Python $$found (once; one to four minutes) …"; \
	rm -rf .venv; \
	"$$python" -m venv .venv; \
	.venv/bin/python -I -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --require-hashes --only-binary :all: -r requirements.lock; \
	.venv/bin/python -I -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	.venv/bin/python -I -m compileall -q -j 0 .venv/lib labkit >/dev/null || true; \
	printf '%s\n' "$$made_from" > .venv/made-from

# uv lives in an environment of its own for this: nothing else needs it.
lock: environment
	@set -eu; \
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	.venv/bin/python -m venv "$$folder"; \
	"$$folder/bin/python" -I -m pip install --quiet --disable-pip-version-check uv; \
	"$$folder/bin/uv" pip compile pyproject.toml --all-extras --universal --python-version 3.$(OLDEST) --upgrade --quiet \
		--only-binary :all: \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header -o requirements.lock

# For this Python on this system, as wheels are. made-for is written last.
bundle: environment
	@set -eu; \
	rm -rf bundle/made-for bundle/wheels; \
	cp requirements.lock bundle/; \
	.venv/bin/python -I -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
		-d bundle/wheels -r requirements.lock; \
	.venv/bin/python -I -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w bundle/wheels .; \
	LABKIT_CACHE=bundle .venv/bin/labkit fetch; \
	.venv/bin/python bundle/made_for.py > bundle/made-for; \
	echo "Copy the folder bundle ($$(du -sh bundle | cut -f1)). There: sh bundle/install.sh"

clean:
	rm -rf bundle/jars bundle/made-for bundle/requirements.lock bundle/wheels
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache notebooks/comparison
	find labkit tests -type d -name __pycache__ -prune -exec rm -rf {} +

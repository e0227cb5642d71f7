# What one can do with a clone of this repository. Python 3.11 or newer and make are all it takes.

PYTHON ?= python3
VENV = .venv
PORT ?= 8000
# One of requirements/*.txt: what the tests run with.
LOCK = requirements/dev.txt
# Processes that run tests side by side, each with databases of its own. JOBS=0: one after the
# other, in this process (for a debugger).
JOBS = logical
# More words for pytest: make test ARGS="-k pool -x"
ARGS =
# The other Pythons the suite is run on by test-pythons.
PYTHONS = 3.12 3.13
# `make test` runs everything. With the lowest dependencies, the lowest drivers among them, it is
# all but the slow tests; on the other Pythons, of these, the tests that need no server.
QUICK = -m "not slow" --hypothesis-profile quick
QUICK_ON_SQLITE = $(QUICK) -k "not postgres and not mysql"

IN_VENV := $(VENV)/bin/python
INSTALL = $(IN_VENV) -m pip --disable-pip-version-check install --quiet
# Installs into further environments: many times as fast, but deaf to pip's configuration.
UV_INSTALL := $(VENV)/bin/uv pip install --quiet --compile-bytecode --python
CODE := src sql_app tests $(wildcard experiment examples benchmarks soak)

.DEFAULT_GOAL := help
.PHONY: help install run test check format experiment soak soak-answers mutants bench coverage test-pythons \
	test-lowest lock audit sbom audit-tools clean

help: ## say what there is (this text)
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## create .venv with everything that development needs

run: $(VENV)/.runnable ## serve sql_app on port 8000 (PORT=…, DATABASE_URL=…; without it, SQLite in test.db)
	@echo "sql_app: http://127.0.0.1:$(PORT)/docs (Ctrl-C ends it)"
	@exec $(IN_VENV) -m uvicorn sql_app.main:app --port $(PORT)

test: $(VENV)/.installed ## run the whole test suite (ARGS="-k pool -x", JOBS=1)
	$(IN_VENV) -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal $(ARGS)

check: $(VENV)/.installed ## check format, lint and types
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m mypy $(CODE)

format: $(VENV)/.installed ## format the code and mend what the linter can mend
	$(IN_VENV) -m ruff check --fix-only --quiet .
	$(IN_VENV) -m ruff format .

experiment: $(VENV)/.installed ## show what goes wrong without this library, and what doesn't with it
	$(IN_VENV) -m experiment

bench: $(VENV)/.installed ## measure sql_app against the same API built in other ways (ARGS="--quick", --help)
	@$(MAKE) --no-print-directory install VENV=.venv-bench LOCK=requirements/bench.txt \
		INSTALL="$(UV_INSTALL) .venv-bench"
	$(IN_VENV) -m benchmarks $(ARGS)

soak: $(VENV)/.installed ## do random faults to a database under load (ARGS="--seed 7 --minutes 10 --database sqlite", "--kills")
	@$(IN_VENV) -m soak $(ARGS)

soak-answers: $(VENV)/.installed ## compare 50,000 answers to random queries with Pydantic's (CASES=… on each database)
	FIDELITY_CASES=$(or $(CASES),12500) $(IN_VENV) -m pytest -s tests/test_fidelity.py -k answer

mutants: $(VENV)/.installed ## plant bugs in a copy of the library, and say which tests catch them (ARGS="-k savepoint")
	@$(IN_VENV) -m tests.mutants $(ARGS)

coverage: ## run the whole test suite and say which lines and branches it never reaches
	@$(MAKE) --no-print-directory test ARGS="--timeout 600 --cov --cov-report=term-missing $(ARGS)"

test-pythons: $(VENV)/.installed ## run the suite on SQLite, less its slow tests, on Python 3.12 and 3.13 where they are installed
	@for version in $(PYTHONS); do \
		if python=$$(scripts/find-python $$version); then \
			echo "test-pythons: Python $$version is $$python"; \
			$(MAKE) --no-print-directory test VENV=.venv-$$version PYTHON="$$python" \
				INSTALL="$(UV_INSTALL) .venv-$$version" ARGS='$(QUICK_ON_SQLITE) $(ARGS)' || exit 1; \
		else \
			echo "test-pythons: no working Python $$version here, so nothing was run on it"; \
		fi; \
	done

test-lowest: $(VENV)/.installed ## run the suite, less its slow tests, on the lowest supported Python and dependencies
	@if python=$$(scripts/find-python 3.11); then \
		$(MAKE) --no-print-directory test VENV=.venv-lowest PYTHON="$$python" LOCK=requirements/lowest.txt \
			INSTALL="$(UV_INSTALL) .venv-lowest" ARGS='$(QUICK) $(ARGS)'; \
	else \
		echo "test-lowest: no working Python 3.11 here, so nothing was run on it"; \
	fi

lock: $(VENV)/.installed ## write requirements/*.txt anew from pyproject.toml (ARGS=--upgrade moves the pins)
	UV=$(VENV)/bin/uv scripts/lock $(ARGS)

audit: audit-tools ## look for known vulnerabilities in the locked requirements
	scripts/audit .venv-audit/bin/pip-audit requirements/dev.txt

sbom: audit-tools ## write sbom.json: what requirements/run.txt installs, in CycloneDX form
	.venv-audit/bin/cyclonedx-py requirements requirements/run.txt --pyproject pyproject.toml \
		--output-reproducible --output-file sbom.json

audit-tools: $(VENV)/.installed
	@$(MAKE) --no-print-directory install VENV=.venv-audit LOCK=requirements/audit.txt \
		INSTALL="$(UV_INSTALL) .venv-audit"

clean: ## remove what the other targets made, the databases of `make run` excepted
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis .schemathesis .coverage .coverage.* dist sbom.json
	find $(CODE) -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamps say that .venv holds what the files to their right ask for. The project itself is
# installed in place, by a build backend out of the lock, so nothing is fetched that has no hash.
$(VENV)/.runnable: requirements/run.txt pyproject.toml | $(IN_VENV)
	$(INSTALL) --require-hashes --requirement requirements/run.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed: $(LOCK) pyproject.toml | $(IN_VENV)
	$(INSTALL) --require-hashes --requirement $(LOCK)
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(IN_VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "fastapi-peewee needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
		exit 1; \
	} >&2
	@$(PYTHON) -m venv --clear $(VENV) || { \
		rm -rf $(VENV); \
		echo "$(PYTHON) cannot create a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; \
		exit 1; \
	} >&2

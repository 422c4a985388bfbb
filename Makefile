# make            what there is to do
# make train      first call: sets up .venv; then trains on the demo data
# make talk       serves a page on which a trained run replies
.POSIX:

PYTHON ?= python3
ARGS =
BENCHMARKS = training_step lora_step memory generation loading features preparing checkpoint startup

BIN = .venv/bin
STAMP = .venv/.installed

help:
	@echo "make train   train on the demo data          ARGS=\"modality=text seed=1\" adds overrides"
	@echo "make talk    serve a page to talk to a run   ARGS=\"speech=kokoro port=8000\" adds overrides"
	@echo "make test    run the tests and doctests      ARGS=\"tests/report -x\" selects, ARGS=-n0 takes one core"
	@echo "                                             ARGS=\"-m slow\" runs those that take longest"
	@echo "make bench   run all benchmarks              ARGS=--quick shows that they run"
	@echo "make docs    build the pages of docs/ in site/"
	@echo "make lint    ruff check, ruff format --check, lint-imports"
	@echo ""
	@echo "Each sets up .venv when it is missing or older than pyproject.toml or constraints.txt."
	@echo "PYTHON=python3.12 makes it with another Python (3.11 or newer)."

train: $(STAMP)
	$(BIN)/python train.py $(ARGS)

# The first command trains what `make train` does, or says that it is trained already. Hibari is as soon heard as eSpeak
# NG, the scripts' default, which needs no model, and better understood (docs/speech.md).
talk: $(STAMP)
	$(BIN)/python train.py resume=auto
	set -- $(ARGS); case " $$*" in *" speech="*) ;; *) set -- speech=hibari "$$@" ;; esac; \
	    $(BIN)/python respond.py page=true "$$@"

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

# Side by side they would measure each other.
bench: $(STAMP)
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# The stamp is written last, so an interrupted installation is taken up again by the next call. pip writes INSTALLER
# when a package is complete: what has none was cut off in the middle, and would count as installed.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -c "" 2>/dev/null || { \
	    $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	        echo "msenc needs Python 3.11 or newer, found: $(PYTHON) = $$($(PYTHON) --version 2>&1)." >&2; \
	        echo "Name another one: make PYTHON=python3.12 ..." >&2; \
	        exit 1; \
	    }; \
	    echo "Creating .venv with $$($(PYTHON) --version)"; \
	    $(PYTHON) -m venv --clear .venv; \
	}
	@for info in .venv/lib/python3*/site-packages/*.dist-info; do \
	    if test -d "$$info" && ! test -f "$$info/INSTALLER"; then rm -rf "$$info"; fi; \
	done
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    rm -rf .venv/lib/python3*/site-packages/pip .venv/lib/python3*/site-packages/pip-*.dist-info; \
	    $(BIN)/python -m ensurepip --upgrade >/dev/null; \
	}
	@echo "Installing into .venv, which may take a few minutes (once)"
	@echo "  1/2 $$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "  2/2 msenc with the extras demo, talk, hibari, raw, parallel, cluster, dev, docs, as pinned in constraints.txt"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,talk,hibari,raw,parallel,cluster,dev,docs]'
	@touch $(STAMP)
	@echo "Installed."

.PHONY: help train talk test bench lint docs

# make book   execute every chapter once and render the book to _build/html
# make test   unit tests, and every chapter (a chapter that `make book` has executed is not executed again)
# All of it runs in .venv, which the first call makes. PYTHON=python3.12 picks another Python (3.11 to 3.13).

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses 2
INSTALLED := .venv/installed
PINNED := torch==2.14.1 torchvision==0.29.1 torchaudio==2.11.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2

.PHONY: book test test-book serve links check tidy lock clean

book: $(INSTALLED)
	@$(BIN)/python tools/book.py build

test: $(INSTALLED)
	@$(BIN)/python tools/book.py execute
	@echo "Running the unit tests"
	@$(PYTEST) --dist loadfile

# Looks at the rendered book in Chromium, which has to be on the machine.
test-book: book
	@echo "Looking at the book's pages in Chromium"
	@$(PYTEST) tests/book

serve: book
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html

# Asks every link of the book whether it still leads somewhere; needs a network.
links: book
	@$(BIN)/jupyter-book build --builder linkcheck --path-output .book/links .book/site

check: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

# Notebooks without outputs, each with the same first cell for Colab; code formatted.
tidy: $(INSTALLED)
	@$(BIN)/python tools/book.py colab
	@$(BIN)/nbstripout --keep-id --extra-keys metadata.language_info.version book/*.ipynb
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# Keeps the versions that the lock has now; `make lock UPGRADE=--upgrade` takes newer ones, except of those pinned.
lock: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet uv
	@printf '%s\n' $(PINNED) > .venv/pinned.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate $(UPGRADE) \
		--constraints .venv/pinned.txt --all-extras --output-file requirements.lock pyproject.toml

$(INSTALLED): requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing the versions of requirements.lock in .venv (the first time, some gigabytes)"
	@# HQQ would compile kernels for CUDA that are not used here.
	@DISABLE_CUDA=1 $(BIN)/python -m pip install --quiet --no-deps --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check || { echo "requirements.lock does not fit pyproject.toml: make lock"; exit 1; }
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv

clean:
	rm -rf .book _build

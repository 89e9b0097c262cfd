# SPDX-License-Identifier: Apache-2.0
# The eight verbs of daily work. Each is one command that can also be typed by hand.
PYTHON ?= python3

.PHONY: dev test emu bench lint format docs clean

dev:     ## editable install with the emulator and everything the tests and benchmarks need
	HEADWORKS_PRESET=emu $(PYTHON) -m pip install -e '.[test,bench,demo]'

test:    ## the whole test suite
	$(PYTHON) -m pytest

emu:     ## C++ and emulator tests under AddressSanitizer and UBSan
	PYTHON=$(PYTHON) ci/native.sh

bench:   ## the table of speed targets; `headworks bench --help` for the rest
	$(PYTHON) -m headworks bench

lint:    ## ruff, mypy, clang-format, boundaries
	PYTHON=$(PYTHON) ci/lint.sh

format:  ## rewrite Python and C++ in the house style
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
	git ls-files -co --exclude-standard 'csrc/*' 'tests/*' \
	  | grep -E '\.(h|cpp|cu|cuh)$$' | xargs clang-format -i

docs:    ## every path and link that Markdown names, every docstring
	$(PYTHON) ci/check_docs.py

clean:   ## build products; sources are never touched
	rm -rf build dist *.egg-info python/*.egg-info python/headworks/*.so

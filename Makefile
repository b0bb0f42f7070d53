# make demo: the small world end to end on a CPU, in an environment of its own (.venv)
# make i2v: the same for image-to-video, which trains its teacher first (stage 0)
# make test: ruff and all tests
# make toy: the 1D analysis, toy1d.png
# make clean: remove .venv, caches, toy1d's files and the runs of make demo and make i2v
# RANKS: processes that make trajectories or run tests; one per core
# PIP_ARGS: more arguments for pip, e.g. --extra-index-url https://download.pytorch.org/whl/cpu
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
RANKS ?= 2

.PHONY: demo i2v test toy clean

# Two students are trained at the same time, of 5 and of 2 steps; each process has one thread.
demo: export OMP_NUM_THREADS = 1
demo: .venv/installed
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) synvid.py configs/tiny.yaml
	mkdir -p runs/tiny-2
	$(BIN)/python distill.py configs/tiny.yaml --run runs/tiny-2 --key 0,25,50 \
	  --synvid runs/tiny/synvid > runs/tiny-2/log.txt 2>&1 & two=$$!; \
	$(BIN)/python distill.py configs/tiny.yaml || { kill $$two; exit 1; }; \
	wait $$two || { tail -3 runs/tiny-2/log.txt; exit 1; }
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) evaluate.py configs/tiny.yaml \
	  students=runs/tiny/student.safetensors,runs/tiny-2/student.safetensors

i2v: .venv/installed
	$(BIN)/python -m small_world.teacher configs/tiny-i2v.yaml
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) synvid.py configs/tiny-i2v.yaml
	$(BIN)/python distill.py configs/tiny-i2v.yaml
	$(BIN)/python evaluate.py configs/tiny-i2v.yaml

test: .venv/installed-test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(RANKS) --dist loadfile --no-loadscope-reorder

toy: .venv/installed
	$(BIN)/python toy1d.py

# Other runs, and tables or videos in the same folders, may hold weeks of work: only what the targets
# above have made is removed.
MADE := synvid distill evaluate student* log.txt
clean:
	rm -rf .venv $(foreach run,tiny tiny-2 tiny-i2v,$(addprefix runs/$(run)/,$(MADE)))
	rm -rf runs/tiny-i2v/teacher toy1d.png toy1d.pdf toy1d.json
	rm -rf .pytest_cache .ruff_cache __pycache__ */__pycache__

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 …')"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python requirements.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements-test.txt
	touch $@

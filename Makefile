# make demo: own environment, then the small world end to end on a CPU
# make i2v: the same with image-to-video, its teacher trained first
# RANKS: processes that make trajectories or run tests, one a core
# PIP_ARGS: more arguments for pip, as --extra-index-url https://download.pytorch.org/whl/cpu
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
RANKS ?= 2

.PHONY: demo i2v test toy clean

# two students side by side, of 5 and of 2 steps: one thread a process, processes for cores
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

clean:
	rm -rf .venv runs toy1d.png toy1d.pdf toy1d.json .pytest_cache .ruff_cache __pycache__ */__pycache__

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 …')"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python requirements.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements-test.txt
	touch $@

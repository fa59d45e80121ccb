# make quickstart   plays games, pre-trains, fine-tunes and prints the IQM table; 10 minutes, no data, no GPU
# make table        does the same for every method of the paper's table, with a few steps of training each
# make test         lints and runs all but the slow tests; 12 to 17 minutes on 2 cores
# make test-slow    runs the slow tests: learning, many kills, many processes
# make bench        measures speed and memory against the plain way of doing the same
# make sync         copies the shared sections of SCRIPT (default: pretrain_atc.py) over those of the other scripts
# make clean        deletes what quickstart and table made
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
RUN := "$(CURDIR)/$(VENV)/bin/python"
SCRIPT ?= pretrain_atc.py
OBJECTIVE ?= atc

help:
	@sed -n 's/^# make/make/p' Makefile

.PHONY: help quickstart table test test-slow bench lint sync clean

# The environment is made anew when the requirements change, else left as it is.
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# A network of a quarter of the width on 1,000 rows of random play a game: this shows that everything runs, no more.
SMALL := --width-multiplier 0.25 --blocks 1 1 1 1
PRETRAIN := --games ms_pacman breakout freeway road_runner --total-steps 150 --batch-size 32 --save-every 50
EVALUATE := --eval-episodes 4 --max-episode-steps 500
CLONE := --epochs 4 --batch-size 64 $(EVALUATE)
RAINBOW := --total-steps 400 --learning-starts 200 --updates-per-step 0.25 $(EVALUATE)
CHECKPOINT := runs/pretrain_$(OBJECTIVE)__0/checkpoint.pt

# glibc's allocator uses freed memory again instead of giving it back: training steps on a CPU get faster.
quickstart table: export MALLOC_MMAP_MAX_ := 0
quickstart table: export MALLOC_TRIM_THRESHOLD_ := 17179869184

quickstart: $(VENV)/installed
	mkdir -p quickstart
	cd quickstart && $(RUN) ../pretrain_$(OBJECTIVE).py $(PRETRAIN) $(SMALL) --resume
	cd quickstart && for game in ms_pacman pong; do for seed in 0 1; do \
	  $(RUN) ../finetune_bc.py --game $$game --seed $$seed $(CLONE) $(SMALL); \
	  $(RUN) ../finetune_bc.py --game $$game --seed $$seed $(CLONE) $(SMALL) --checkpoint $(CHECKPOINT); \
	  $(RUN) ../finetune_rainbow.py --game $$game --seed $$seed $(RAINBOW) $(SMALL); \
	  $(RUN) ../finetune_rainbow.py --game $$game --seed $$seed $(RAINBOW) $(SMALL) --checkpoint $(CHECKPOINT); \
	done; done
	cd quickstart && $(RUN) ../eval_iqm.py --resamples 2000
	@echo
	@echo "Made in quickstart/: cache/ (games played at random), runs/ (checkpoint, TensorBoard logs), results/ (a score"
	@echo "for each method, game and seed), reports/ (iqm.md, iqm.json and figures)."
	@echo "The scores are a smoke test: a small network, a minute of training, 4 short episodes."

# Every method: 20 steps of pre-training, then both fine-tunings, zero-shot play, IQM and probes on one game, one seed.
# `eval_iqm.py --methods` fails if a method has no score.
FEW := --games ms_pacman breakout --play-rows 1000 --batch-size 16 $(SMALL)
METHODS := curl mae atc siammae r3m bc spr idm spr_idm dt cql_mse cql
SCORE := --eval-episodes 2 --max-episode-steps 200

table: $(VENV)/installed
	mkdir -p table
	cd table && for method in $(METHODS); do \
	  loss=$$(test $$method != cql_mse || echo --loss mse); \
	  $(RUN) ../pretrain_$${method%_mse}.py --run-name $$method $$loss --total-steps 20 $(FEW) --resume; \
	done
	cd table && for from in "" --no-freeze-backbone $(METHODS:%=--checkpoint=runs/%/checkpoint.pt); do \
	  $(RUN) ../finetune_bc.py --game ms_pacman $$from --epochs 1 --batch-size 64 $(SCORE) $(SMALL); \
	  $(RUN) ../finetune_rainbow.py --game ms_pacman $$from --total-steps 120 --learning-starts 100 $(SCORE) $(SMALL); \
	done
	cd table && for method in bc dt cql_mse cql; do \
	  $(RUN) ../eval_zeroshot.py --checkpoint runs/$$method/checkpoint.pt --games ms_pacman $(SCORE); \
	done
	cd table && for suite in bc rainbow; do \
	  $(RUN) ../eval_iqm.py --suites $$suite --methods random e2e $(METHODS) --output-dir reports/$$suite; \
	done
	cd table && $(RUN) ../eval_iqm.py
	cd table && $(RUN) ../eval_probe.py --models $(METHODS:%=runs/%/checkpoint.pt) --epochs 10 --rank-resamples 10 $(FEW)

PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

test: $(VENV)/installed-dev lint
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow

bench: $(VENV)/installed-dev
	for part in prepare load step rainbow evaluate iqm scale download; do \
	  $(RUN) benchmarks/$$part.py 2> benchmarks/$$part.log || { tail benchmarks/$$part.log; exit 1; }; \
	done

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) tests/sync.py --check

sync:
	$(PYTHON) tests/sync.py $(SCRIPT)

clean:
	rm -rf quickstart table

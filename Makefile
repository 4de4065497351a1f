# make demo: a real pruned and a 4-bit classifier and their report, from nothing.   make test: the tests.   make lint: ruff.
# Both work in the active virtual environment, or else make one in .venv and install the pinned requirements there.
.PHONY: demo test lint environment results
.DEFAULT_GOAL := demo

ifdef VIRTUAL_ENV
PYTHON := python
else
PYTHON := .venv/bin/python
endif

environment:
ifndef VIRTUAL_ENV
	@test -x .venv/bin/python || python3 -m venv .venv
endif
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt

demo: environment
	$(PYTHON) 1_prepare_data.py
	$(PYTHON) 8_pruning_with_finetuning.py --fast
	$(PYTHON) 10_qat_kd_4bit.py --fast
	$(PYTHON) 7_evaluate_and_generate_report.py

test: environment
	$(PYTHON) -m pytest -n 2

lint: environment
	$(PYTHON) -m ruff check .

# Everything that the README shows: hours on two cores.
results: environment
	$(PYTHON) benchmarks/pruning_overhead.py
	$(PYTHON) benchmarks/pruning_frontier.py
	$(PYTHON) benchmarks/qat_overhead.py
	$(PYTHON) benchmarks/qat_accuracy.py
	$(PYTHON) benchmarks/perplexity.py
	$(PYTHON) benchmarks/one_shot.py
	$(PYTHON) benchmarks/streaming_memory.py
	$(PYTHON) benchmarks/sparse_trainer.py
	$(PYTHON) benchmarks/recovery.py
	$(PYTHON) benchmarks/structured_llm.py
	$(PYTHON) benchmarks/extreme.py
	$(PYTHON) benchmarks/memory_table.py
	$(PYTHON) benchmarks/train_optimized.py
	$(PYTHON) benchmarks/update_readme.py

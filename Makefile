# The two commands a newcomer needs: `make demo` and `make test`. Both make the environment they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
LOCK_VENV ?= .venv-lock
# The oldest release that pyproject.toml claims.
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
BIN := $(VENV)/bin
# On two processes; tests that share what their module makes stay together (tests/conftest.py).
PARALLEL := -q -n 2 --dist loadgroup
OLDEST_PYTEST := $(PARALLEL) -W default -p no:cacheprovider -m "not slow"
# What runs the tests beside a wheel.
TEST_TOOLS := hypothesis pytest pytest-xdist
PIP_COMPILE := $(LOCK_VENV)/bin/pip-compile --quiet --upgrade --no-annotate --no-emit-options --strip-extras --allow-unsafe \
	--constraint constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all test-fast test-slow test-oldest test-newest quality families wheel lock clean

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py

test: quality test-all test-oldest

$(VENV)/ready: pyproject.toml $(VENV)/locked
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# An environment of exactly what its lock says (docs/adr/0010-locked-environment.md). Installer and builder come first:
# what the index has no wheel of is built by the locked setuptools.
$(VENV)/locked: requirements.lock
$(OLDEST_VENV)/locked: requirements-oldest.lock
$(VENV)/locked $(OLDEST_VENV)/locked:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $< pip setuptools
	$(@D)/bin/python -m pip install --quiet --no-build-isolation --requirement $<
	cp $< $@

# Both locks anew, of the newest releases that pyproject.toml and constraints.txt allow; then `make test`. What only one
# build of torch needs is left out, so that the locks are the same wherever they are made.
lock: export CUSTOM_COMPILE_COMMAND := make lock
lock:
	$(PYTHON) -m venv --clear $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet pip-tools
	printf '%s\n' pip setuptools | \
		$(PIP_COMPILE) --all-extras --output-file requirements.lock pyproject.toml -
	printf '%s\n' pip setuptools $(TEST_TOOLS) transformers==$(OLDEST_TRANSFORMERS) | \
		$(PIP_COMPILE) --output-file requirements-oldest.lock pyproject.toml -
	sed -i -E -e 's/^(torch==[^+]*)\+.*/\1/' -e '/^((cuda|nvidia)-.*|triton)==/d' requirements.lock requirements-oldest.lock

quality: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Two processes with a thread each: threads of tiny models would wait for each other.
test-all test-fast test-slow test-oldest test-newest: export OMP_NUM_THREADS := 1
# Whoever collects, and every process that a test starts, would compile the same modules again.
test-all test-fast test-slow test-oldest test-newest: export PYTHONDONTWRITEBYTECODE :=

test-all: $(VENV)/ready
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/ready
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not another"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest $(PARALLEL) -m slow

# The tables of families in docs/ and README, from the code; a test fails while they differ.
families: $(VENV)/ready
	$(BIN)/python -m hf_gqa.export.support_table

wheel: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	ls dist

# The wheel beside the oldest transformers we claim. Attention on tensors alone needs torch alone, which is the same here.
test-oldest: wheel $(OLDEST_VENV)/locked
	$(OLDEST_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	mkdir -p $(OLDEST_VENV)/run && rm -rf $(OLDEST_VENV)/run/* && cp -r tests examples $(OLDEST_VENV)/run/
	cd $(OLDEST_VENV)/run && ../bin/python -m pytest $(OLDEST_PYTEST) \
		tests/test_lock.py::test_installed_is_what_the_lock_says \
		tests/test_conformance.py tests/test_conformance_oracle.py tests/test_seq2seq.py
	cd $(OLDEST_VENV)/run && ONE_OF_EACH_STORAGE=1 ../bin/python -m pytest $(OLDEST_PYTEST) \
		tests/test_conformance_decoding.py tests/test_conformance_gradients.py tests/test_conformance_heads.py \
		tests/test_bundle.py tests/test_native_call.py tests/test_runtime.py tests/test_verify.py tests/test_sharing*.py \
		tests/test_grouped_attention.py::test_what_does_not_fit_is_refused tests/test_grouped_attention_models.py \
		tests/test_uptrain_teacher.py tests/test_uptrain_layer_matching.py tests/test_uptrain_callback.py \
		tests/test_uptrain_trainer.py tests/test_uptrain_checkpoints.py tests/test_uptrain_any_trainer.py \
		tests/test_evaluate_quality.py tests/test_evaluate_evaluation.py tests/test_evaluate_recall.py

# What a user gets today: the wheel without a lock, and without extras, which could hold back transformers. A few tests:
# a decoder, layers that share, encoder-decoders, an encoder, bundles, `verify`, the demo.
test-newest: wheel
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(TEST_TOOLS) dist/*.whl
	$(NEWEST_VENV)/bin/python .ci/beside_the_lock.py
	mkdir $(NEWEST_VENV)/run && cp -r tests examples pyproject.toml $(NEWEST_VENV)/run/
	cd $(NEWEST_VENV)/run && ../bin/python -m pytest $(PARALLEL) --tb=short -p no:cacheprovider \
		-k "(llama or t5 or electra or process_of_its_own or demo) and not (mt5 or compiles)" \
		tests/test_conformance_decoding.py tests/test_sharing_decoding.py tests/test_seq2seq_decoding.py \
		tests/test_bundle.py tests/test_encoders.py tests/test_verify.py tests/test_examples.py

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(NEWEST_VENV) $(LOCK_VENV) build dist *.egg-info students

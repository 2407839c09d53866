#!/usr/bin/env bash
# hydra-optuna-sweeper 1.3.0 asks for optuna <3 and gets 2.10.1, which asks for SQLAlchemy >=1.1 without an upper bound:
# pip takes SQLAlchemy 2. With that, a study in a file (hydra.sweeper.storage=sqlite:///FILE, the documented way to keep a
# search) ends in an AssertionError without a message, before the first trial. The version of the schema has been written
# in a session that SQLAlchemy 2 no longer commits by itself. With SQLAlchemy 1.4 the same search runs.
#
# Seen: "SQLAlchemy 2: AssertionError ''", "SQLAlchemy 1: 2 trials".
# What to do: pin sqlalchemy<2 beside hydra-optuna-sweeper.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/search.py" <<'PYTHON'
import sys

import optuna
import sqlalchemy

optuna.logging.set_verbosity(optuna.logging.ERROR)
major = sqlalchemy.__version__.partition(".")[0]
try:
    study = optuna.create_study(storage=f"sqlite:///{sys.argv[1]}", study_name="search")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    print(f"SQLAlchemy {major}: {len(study.trials)} trials")
except AssertionError as error:
    print(f"SQLAlchemy {major}: AssertionError {str(error)!r}")
PYTHON
for pinned in "sqlalchemy==2.1.9 alembic==1.20.1" "sqlalchemy==1.4.54 alembic==1.16.5"; do
  rm -rf "$folder/venv"
  python3 -m venv "$folder/venv"
  # shellcheck disable=SC2086
  "$folder/venv/bin/python" -m pip install --quiet --no-compile hydra-optuna-sweeper==1.3.0 optuna==2.10.1 $pinned
  "$folder/venv/bin/python" "$folder/search.py" "$folder/${pinned%% *}.db" 2>>"$folder/err" | tee -a "$folder/out"
done
diff <(printf "SQLAlchemy 2: AssertionError ''\nSQLAlchemy 1: 2 trials\n") "$folder/out" || { cat "$folder/err"; exit 1; }

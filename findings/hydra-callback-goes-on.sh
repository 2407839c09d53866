#!/usr/bin/env bash
# hydra-core 1.3.8: an exception in a callback's on_run_start becomes a warning, and the job runs as if there were no
# callback; exit code 0. Whoever puts a guard there (a folder that is in use, a key that must not be set) guards nothing.
# SystemExit is not an Exception, and does end the program.
#
# Seen: "the job ran" and exit code 0 after a RuntimeError; nothing and exit code 3 after SystemExit(3).
# What to do: end the program in a guard, with sys.exit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile hydra-core==1.3.8 omegaconf==2.3.1
cat > "$folder/config.yaml" <<'YAML'
how: raise
hydra: {output_subdir: null, run: {dir: .}, callbacks: {guard: {_target_: app.Guard}}}
YAML
cat > "$folder/app.py" <<'PYTHON'
import sys

import hydra
from hydra.experimental.callback import Callback


class Guard(Callback):
    def on_run_start(self, config, **_):
        if config.how == "exit":
            sys.exit(3)
        raise RuntimeError("this must not run")


@hydra.main(config_path=".", config_name="config", version_base="1.3")
def main(config):
    print("the job ran")


if __name__ == "__main__":
    main()
PYTHON
cd "$folder"
for how in raise exit; do
  code=0
  PYTHONPATH=. venv/bin/python app.py how=$how 2>>err | tee -a out || code=$?
  echo "exit code $code" | tee -a out
done
diff <(printf 'the job ran\nexit code 0\nexit code 3\n') out || { cat err; exit 1; }

#!/usr/bin/env bash
# hydra-core 1.3.8, omegaconf 2.3.1: hydra.overrides.task holds what was typed, as text. Text with ${...} in it is an
# interpolation to OmegaConf, so whoever only reads the list resolves what the user typed: a typing mistake in a value
# (model.x=${typo}) is then raised from the place that reads the list, under another key than the one it was made in, and a
# right one comes back as its value, not as what was typed.
#
# Seen: "typed x=2" for x=${y} with y=2, and InterpolationKeyError for x=${typo}.
# What to do: OmegaConf.to_container(hydra.overrides.task, resolve=False).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile hydra-core==1.3.8 omegaconf==2.3.1
printf 'x: 1\ny: 2\n' > "$folder/config.yaml"
cat > "$folder/app.py" <<'PYTHON'
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf.errors import InterpolationKeyError


@hydra.main(config_path=".", config_name="config", version_base="1.3")
def main(config):
    try:
        print("typed", *HydraConfig.get().overrides.task)
    except InterpolationKeyError as error:
        print("InterpolationKeyError", str(error).splitlines()[0])


main()
PYTHON
cd "$folder"
for override in 'x=${y}' 'x=${typo}'; do
  venv/bin/python app.py "$override" hydra.output_subdir=null hydra.run.dir=. 2>>err | tee -a out
done
diff <(printf "typed x=2\nInterpolationKeyError Interpolation key 'typo' not found\n") out || { cat err; exit 1; }

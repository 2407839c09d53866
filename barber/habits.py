"""What people type out of habit, from other tools and other programs: understood, or answered with what works here."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from barber.errors import UserError

FORM = "an override is KEY=VALUE or GROUP=CHOICE, without blanks around ="
QUOTES = "a value with special characters needs quotes: \"KEY='VALUE'\""
_ALONE = {"--help", "-h", "--hydra-help", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc"}
_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
_WITH_VALUE |= {"--info", "-i"}

# Keys of this field's scripts and of trainers, and what they are here.
_SYNONYMS = {
    **dict.fromkeys(("nsamples", "n_samples", "num_samples", "num_calibration_samples"), "calibration.nsamples"),
    **dict.fromkeys(("seqlen", "seq_len", "max_seq_length", "sequence_length"), "calibration.seqlen"),
    **dict.fromkeys(("dataset", "calib_dataset", "calibration_dataset"), "calibration"),
    **dict.fromkeys(("sparsity", "sparsity_ratio", "sparsity_rate"), "pattern.sparsity"),
    **dict.fromkeys(("sparsity_type", "structure_pattern", "prunen_prunem"), "pattern"),
    **dict.fromkeys(("prune_method", "pruning_method", "algorithm"), "method"),
    **dict.fromkeys(("dtype", "torch_dtype", "model_dtype"), "model.dtype"),
    **dict.fromkeys(("output_dir", "save_dir", "output", "out", "out_dir", "save", "save_model"), "hydra.run.dir"),
    **dict.fromkeys(("percdamp", "dampening_frac"), "pruner.damping"),
    **dict.fromkeys(("lr", "learning_rate"), "update.reconstruct.learning_rate"),
    **dict.fromkeys(("gpu", "cuda", "gpus"), "device"),
    **dict.fromkeys(("bs", "bsz", "per_device_batch_size"), "batch_size"),
    "alpha": "rebuild.barber.alpha",
    "granularity": "rebuild.barber.granularity",
    "blocksize": "pruner.block_size",
    "tasks": "evals.zero_shot.tasks",
    "num_fewshot": "evals.zero_shot.num_fewshot",
    "num_threads": "threads",
    "verbose": "hydra.verbose",
}
_REPOSITORY = r"[\w.-]+/[\w.-]+"
_MODELS = ("model_path", "model_name", "model_name_or_path", "pretrained", "model_id", "base_model")
_WORDS = {
    "help": "barber --help",
    "version": "barber --version",
    "list": "barber ls",
    "models": "barber ls models",
    "methods": "barber ls methods",
    **dict.fromkeys(("prune", "run", "train", "sparsify"), "barber model=tiny method=wanda"),
    **dict.fromkeys(("eval", "evaluate"), "barber method=dense"),
    **dict.fromkeys(("sweep", "multirun"), "barber -m pattern.sparsity=0.5,0.6"),
}
_FLAGS = {
    **dict.fromkeys(("-v", "--verbose"), "barber hydra.verbose=true"),
    **dict.fromkeys(("--list", "-l", "--ls"), "barber ls"),
    **dict.fromkeys(
        ("--config", "--config-file"), "barber --config-dir FOLDER experiment=NAME, for FOLDER/experiment/NAME.yaml"
    ),
    **dict.fromkeys(("--dry-run", "--dryrun"), "barber --cfg job"),
    **dict.fromkeys(("--resume",), "barber, the same command again: it goes on where it was"),
}


def understood(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra reads it: flags first, in whatever order they came, and `pattern=2:4` as `2of4`.

    Raises:
        UserError: it is of another program; the sentence has the command that works.
    """
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, has_value, _ = word.partition("=")
        if word in _ALONE or name in _WITH_VALUE:
            flags += [word] + ([rest.pop(0)] if name in _WITH_VALUE and not has_value and rest else [])
        elif word.startswith("-"):
            raise UserError(f"{word}: {_instead_of_flag(word, rest)}")
        else:
            overrides.append(_as_override(word))
    return [*flags, *overrides]


def _as_override(word: str) -> str:
    key, has_value, value = word.partition("=")
    if not has_value and not word.startswith(("~", "+")):
        raise UserError(f"cannot read {word!r}: {_instead_of_word(word)}")
    if key == "pattern":
        return "pattern=" + re.sub(r"\b(\d+):(\d+)\b", r"\1of\2", value)
    if key == "model" and (Path(value).is_dir() or re.fullmatch(rf"{_REPOSITORY}|[./~].*", value)):
        raise UserError(f"{word}: no such choice; say {_model_at(value)}, or a choice of barber ls models")
    if meant := _meant(key, value):
        raise UserError(f"{key}: no such key; say {meant}")
    return word


def _meant(key: str, value: str) -> str | None:
    """What a key of other tools is here, with its value."""
    if key in _MODELS:
        return _model_at(value)
    if key not in _SYNONYMS:
        return None
    meant = _as_override(f"{_SYNONYMS[key]}={value}")
    return f"export=hf {meant}" if meant.startswith("hydra.run.dir") else meant


def _model_at(place: str) -> str:
    kind = "hub" if re.fullmatch(_REPOSITORY, place) and not (place[0] == "." or Path(place).exists()) else "local"
    return f"model={kind} model.path={place or 'FOLDER'}"


def _instead_of_flag(word: str, rest: Sequence[str]) -> str:
    name, has_value, value = word.partition("=")
    if name in _FLAGS:
        return f"no such flag; say {_FLAGS[name]}"
    if near := get_close_matches(name, [flag for flag in _ALONE | _WITH_VALUE if "--" in flag], n=1, cutoff=0.8):
        return f"no such flag, did you mean {near[0]}?"
    if not has_value:
        value = rest[0] if rest and not rest[0].startswith("-") else "VALUE"
    key = name.lstrip("-").replace("-", "_")
    return f"no such flag; settings have no dashes: barber {_meant(key, value) or _as_override(f'{key}={value}')}"


def _instead_of_word(word: str) -> str:
    if word.lower() in _WORDS:
        return f"{FORM}; say {_WORDS[word.lower()]}"
    if Path(word).is_dir():
        return f"{FORM}; a model's folder is {_model_at(word)}"
    for group in ("method", "pruner", "rebuild", "update", "model", "experiment"):
        if word.lower() in choices(group):
            return f"{FORM}, did you mean {group}={word.lower()}?"
    return f"{FORM}; {QUOTES}"


def choices(group: str) -> list[str]:
    """The choices of a config group; none of what is no group."""
    folder = files("barber.conf").joinpath(group)
    if not group or not folder.is_dir():
        return []
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))

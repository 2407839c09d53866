"""lm-eval's tasks, with their data from the hub or from a local folder.

From a folder they run on configs that include lm-eval's own and change where the data come from: prompts and metrics
stay the harness's.
"""

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from barber.data.datasets import DEFAULT_FOLDER, find, read_rows
from barber.errors import UserError, within
from barber.runtime.files import writing
from barber.runtime.hub import offline_if_unreachable

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Tasks:
    """Tasks ready to run: their data are read, their first documents fit their prompts.

    Args:
        loaded: lm-eval's own tasks and groups.
        names: the single tasks of every task or group that was asked for.
        sources: where the data of every one that was asked for come from.
        digests: SHA-256 of every single task's documents and of how they are asked.
    """

    loaded: dict[str, Any]
    names: dict[str, list[str]]
    sources: dict[str, str]
    digests: dict[str, str]


@dataclass(frozen=True)
class TaskFolder:
    """A local folder with the data of tasks.

    Args:
        path: the folder.
        files: by task and split, glob patterns, the first that matches counts.
        config: by task, entries of its lm-eval config that the form of the files needs otherwise.
        out: where the including configs are written, for lm-eval's `--include_path`.
    """

    path: Path
    files: Mapping[str, Mapping[str, Sequence[str] | str]]
    config: Mapping[str, Mapping[str, Any]]
    out: Path

    def write_config(self, name: str, own: dict[str, Any], own_path: Path, shots: int) -> tuple[Path, Path]:
        """Write the config of a task whose `own` config lies at `own_path`.

        Returns its path, and that of the file that is measured on.

        Raises:
            UserError: a split that is needed is not there, or a file is broken.
        """
        measured = str(own.get("test_split") or own.get("validation_split") or own.get("training_split"))
        shown = own.get("fewshot_split") or own.get("training_split") or own.get("validation_split")
        found = self._find(name, [measured, str(shown)] if shots else [measured], own)
        kinds = {"parquet" if path.suffix == ".parquet" else "json" for path in found.values()}
        if len(kinds) > 1:
            raise UserError(f"must hold all splits of {name} in one kind of file, not parquet and jsonl", "data_dir")
        with within("data_dir"):
            for path in found.values():
                for _ in read_rows(path):  # lm-eval's own reader says little about a broken file
                    pass
        config = {
            "include": str(own_path),
            "task": name,
            "dataset_path": kinds.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in found.items()}},
            **{key: None for key in _SPLITS if own.get(key) is not None and own[key] not in found},
            **self.config.get(name, {}),
        }
        path = self.out / f"{name}.yaml"
        with writing(path):
            self.out.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path, found[measured]

    def _find(self, name: str, wanted: list[str], own: dict[str, Any]) -> dict[str, Path]:
        """The files that are there, by split; those of the wanted splits have to be."""
        asked = {split: [p] if isinstance(p, str) else p for split, p in self.files.get(name, {}).items()}
        found = {split: path for split, patterns in asked.items() if (path := find(self.path, patterns)) is not None}
        for split in wanted:
            if split not in found:
                key = f"+evals.zero_shot.files.{name}.{split}=PATTERN"
                missing = f"{self.path} has no {' or '.join(asked[split])}" if split in asked else f"{key} is not given"
                raise UserError(
                    f"must hold the {split} split of {name}, but {missing}; download it from {own.get('dataset_path')} "
                    "at the Hugging Face hub",
                    field="data_dir",
                )
        return found


def load_tasks(names: Sequence[str], num_fewshot: int | None, limit: int | None, folder: TaskFolder | None) -> Tasks:
    """Load tasks by their names, with their data.

    Args:
        names: tasks, groups or tags of lm-eval.
        num_fewshot: examples before every question; None: what the task's config says, else 0.
        limit: only the first so many documents; None: all.
        folder: where the data are; None: the hub.

    Raises:
        UserError: no lm-eval, no such task, or its data are not to be had or do not fit it.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError('needs lm-eval, install it with: pip install "llm-barber[zero-shot]"') from error
    # its advice on its own arguments is of no use here; what goes wrong comes as an exception
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"must be lm-eval tasks, and {unknown[0]!r} is none; `lm-eval ls tasks` lists them", "tasks")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    members: dict[str, list[str]] = {}
    sources: dict[str, str] = {}
    for name in names:
        if folder is None:
            found, sources[name] = _load(manager, name, name), "the Hugging Face hub"
        else:
            found, sources[name] = _load_local(manager, name, num_fewshot, limit, folder)
        members[name] = list(found["tasks"])
        for part in loaded:
            loaded[part].update(found.get(part, {}))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # lm-eval's rule: a task's own 0 stays
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    digests = {name: _digest(task, limit) for name, task in loaded["tasks"].items()}
    return Tasks(loaded, members, sources, digests)


def _load_local(
    manager: Any, name: str, num_fewshot: int | None, limit: int | None, folder: TaskFolder
) -> tuple[Any, str]:
    from lm_eval.tasks._yaml_loader import load_yaml

    own_path = manager.task_index[name].yaml_path
    if own_path is None or "group" in (own := load_yaml(own_path, resolve_func=False)):
        raise UserError(f"must be single tasks where the data come from a folder, and {name} is a group", "tasks")
    shots = own.get("num_fewshot", 0) if num_fewshot is None else num_fewshot
    spec, measured = folder.write_config(name, own, own_path, shots or 0)
    found = _load(manager, name, str(spec))
    for task in found["tasks"].values():
        try:
            _check_answers(task, limit)
        except Exception as error:
            raise _unfit(name, error) from error
    return found, str(measured)


def _load(manager: Any, name: str, spec: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        with offline_if_unreachable():
            return manager.load([spec])
    except ConnectionError as error:
        raise UserError(
            f"must be a folder with the data of {name}: the Hugging Face hub cannot be reached and there is no "
            f"folder {DEFAULT_FOLDER}; download the data where there is a network and say data_dir=FOLDER",
            field="data_dir",
        ) from error
    except Exception as error:  # jinja, datasets, KeyError: whatever a document that does not fit brings about
        raise _unfit(name, error) from error


def _check_answers(task: Any, limit: int | None) -> None:
    """Refuse documents whose right answer is none of their choices: lm-eval takes all answers to them for wrong."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, doc in enumerate(islice(task.eval_docs, limit), start=1):
        choices = task.doc_to_choice(doc)
        right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        for answer in right if isinstance(right, list) else [right]:
            if answer not in choices and answer not in range(len(choices)):
                raise ValueError(f"the right answer of document {number} is {answer!r}, which is none of its choices")


def _digest(task: Any, limit: int | None) -> str:
    """SHA-256 of the documents that are measured, of the examples, and of how they are asked."""
    content = list(islice(task.eval_docs, limit))
    shown = list(task.fewshot_docs()) if task.get_config("num_fewshot") else []
    config = {key: value for key, value in task.dump_config().items() if key not in ("dataset_kwargs", "metadata")}
    return digest([content, shown, config])


def digest(content: Any) -> str:
    """SHA-256 of nested lists and dicts, the same in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_source).encode()).hexdigest()


def _source(value: Any) -> str:
    """What a value that JSON does not have is known by; an address in memory would be another in every process."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _unfit(name: str, error: Exception) -> UserError:
    return UserError(f"must be tasks that fit their data, and {name} does not: {reason(error)}", "tasks")


def reason(error: BaseException) -> str:
    """What went wrong at the bottom of it, on one line: datasets wraps errors in errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

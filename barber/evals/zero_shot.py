"""Accuracy on multiple-choice and other tasks, by EleutherAI's lm-eval harness on the model in memory."""

import copy
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.errors import BarberError, UserError, within
from barber.evals.watch import Watch
from barber.hub import offline_if_unreachable, reachable
from barber.sources import DEFAULT_FOLDER, find, read_rows

log = logging.getLogger("barber")

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
class ZeroShot:
    """lm-eval tasks; by default the seven of the pruning papers.

    Args:
        tasks: names of lm-eval tasks, groups or tags.
        num_fewshot: examples before every question; None: what the task's config says, else 0.
        batch_size: requests that go through the model together.
        limit: only the first so many documents of every task; None: all. A limit makes figures incomparable.
        data_dir: a local folder with the data; None: the hub.
        files: where the data lie in a local folder: by task and split, glob patterns, the first that matches counts.
        file_config: by task, entries of its lm-eval config that the form of the files needs otherwise; prompts and
            metrics are not to be touched.
    """

    tasks: Sequence[str] = (
        "boolq",
        "rte",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    )
    num_fewshot: int | None = 0
    batch_size: int = 8
    limit: int | None = None
    data_dir: str | None = None
    files: Mapping[str, Mapping[str, Sequence[str] | str]] = field(default_factory=dict)
    file_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("must name a task at least", field="tasks")
        for name, least in (("num_fewshot", 0), ("batch_size", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"must be at least {least}, not {value}", field=name)

    def prepare(self, out: Path) -> Tasks:
        """Read the tasks and their data.

        For tasks with local data, configs that include lm-eval's own and change where the data come from are written to
        `out`; lm-eval's command line runs the same with `--include_path`.

        Raises:
            UserError: no lm-eval, no such task, or its data are not to be had or do not fit it.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError('needs lm-eval, install it with: pip install "llm-barber[zero-shot]"') from error
        _hush()
        manager = TaskManager()
        if unknown := [name for name in self.tasks if name not in manager.all_tasks]:
            raise UserError(
                f"must be lm-eval tasks, and {unknown[0]!r} is none; `lm-eval ls tasks` lists them", "tasks"
            )
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        sources: dict[str, str] = {}
        names: dict[str, list[str]] = {}
        folder = self._folder()
        for name in self.tasks:
            spec, sources[name] = name, "the Hugging Face hub"
            if folder is not None:
                spec, sources[name] = self._local_config(manager, name, folder, out)
            found = self._load(manager, name, spec)
            names[name] = list(found["tasks"])
            for part in loaded:
                loaded[part].update(found.get(part, {}))
        for task in loaded["tasks"].values():
            if self.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        digests = {name: _digest(task, self.limit) for name, task in loaded["tasks"].items()}
        return Tasks(loaded, names, sources, digests)

    def facts(self, tasks: Tasks, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the results depend on beside the model."""
        return {
            "tokenizer": _digest_of([tokenizer.get_vocab(), tokenizer.special_tokens_map, _rules(tokenizer)]),
            "lm_eval": version("lm-eval"),
            "num_fewshot": self.num_fewshot,
            "batch_size": self.batch_size,
            "limit": self.limit,
            "tasks": tasks.digests,
        }

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, watch: Watch
    ) -> dict[str, Any]:
        """Run the tasks on a model that has been placed.

        Raises:
            BarberError: lm-eval failed.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        # a copy: lm-eval gives the tokenizer a padding token, which is not to be exported
        own = copy.deepcopy(tokenizer)
        # lm-eval does not do without such a token, though only a question without a context would begin with it
        prefix = 0 if own.bos_token_id is None and own.eos_token_id is None else None
        harness = HFLM(pretrained=model, tokenizer=own, batch_size=self.batch_size, prefix_token_id=prefix)
        try:
            for task in tasks.loaded["tasks"].values():
                # that of lm-eval's own command line; anew, for every stage to be shown the same examples
                task.set_fewshot_seed(seed=1234)
            with _bars(watch):
                found = evaluate(lm=harness, task_dict=tasks.loaded, limit=self.limit, log_samples=False)
        except Exception as error:
            raise BarberError(f"lm-eval failed on {', '.join(self.tasks)}: {_reason(error)}") from error
        assert found is not None
        results = {
            name: self._result(name, found["results"][name], found, tasks)
            for name in dict.fromkeys([*self.tasks, *tasks.loaded["tasks"]])
            if name in found["results"]
        }
        accuracies = [results[name]["acc"] for name in self.tasks if "acc" in results.get(name, {})]
        whole = len(accuracies) == len(self.tasks)
        return {
            "tasks": results,
            "mean_acc": sum(accuracies) / len(accuracies) if whole else None,
            "mean_of": list(self.tasks) if whole else None,
            "limit": self.limit,
            "lm_eval": version("lm-eval"),
        }

    def _result(self, name: str, measured: dict[str, Any], found: Any, tasks: Tasks) -> dict[str, Any]:
        """A task's or group's metrics under their plain names, and how they were come by."""
        result: dict[str, Any] = {}
        for key, value in measured.items():
            metric, _, kind = key.partition(",")
            if kind and isinstance(value, int | float):
                plain = metric.removesuffix("_stderr") + "_stderr" if metric.endswith("_stderr") else metric
                result[plain if kind == "none" else f"{plain},{kind}"] = value
        result["version"] = found["versions"].get(name)
        result["num_fewshot"] = found["n-shot"].get(name)
        if counts := found["n-samples"].get(name):
            result["documents"] = counts["effective"]
            result["documents_in_all"] = counts["original"]
        if name in tasks.digests:
            result["digest"] = tasks.digests[name]
        result["data"] = next((tasks.sources[asked] for asked, names in tasks.names.items() if name in names), None)
        return result

    def _folder(self) -> Path | None:
        """The local folder to read from; None: the hub, or what is cached of it."""
        if self.data_dir is not None:
            if not Path(self.data_dir).is_dir():
                raise UserError(
                    f"must be a folder with the tasks' data; there is no folder {self.data_dir}", "data_dir"
                )
            return Path(self.data_dir)
        if not reachable() and Path(DEFAULT_FOLDER).is_dir():
            return Path(DEFAULT_FOLDER)
        return None

    def _local_config(self, manager: Any, name: str, folder: Path, out: Path) -> tuple[str, str]:
        """Write a config that includes the task's own one and reads its data from files.

        Returns its path, and that of the file that is measured on.
        """
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = manager.task_index[name]
        if entry.yaml_path is None or "group" in (own := load_yaml(entry.yaml_path, resolve_func=False)):
            raise UserError(f"must be single tasks where the data come from a folder, and {name} is a group", "tasks")
        asked = {split: [p] if isinstance(p, str) else p for split, p in self.files.get(name, {}).items()}
        files = {split: find(folder, patterns) for split, patterns in asked.items()}
        wanted = [_measured_split(own)]
        shots = self.num_fewshot if self.num_fewshot is not None else own.get("num_fewshot", 0)
        if shots:
            wanted.append(own.get("fewshot_split") or own.get("training_split") or own.get("validation_split"))
        for split in wanted:
            if files.get(split) is None:
                key = f"+evals.zero_shot.files.{name}.{split}=PATTERN"
                missing = f"{folder} has no {' or '.join(asked[split])}" if split in asked else f"{key} is not given"
                raise UserError(
                    f"must hold the {split} split of {name}, but {missing}; download it from {own.get('dataset_path')} "
                    "at the Hugging Face hub",
                    field="data_dir",
                )
        present = {split: path.resolve() for split, path in files.items() if path is not None}
        with within("data_dir"):
            for path in present.values():
                for _ in read_rows(path):  # lm-eval's own reader says little about a broken file
                    pass
        kinds = {"parquet" if path.suffix == ".parquet" else "json" for path in present.values()}
        if len(kinds) > 1:
            raise UserError(f"must hold all splits of {name} in one kind of file, not parquet and jsonl", "data_dir")
        config = {
            "include": str(entry.yaml_path),
            "task": name,
            "dataset_path": kinds.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in present.items()}},
            **{key: None for key in _SPLITS if own.get(key) is not None and own[key] not in present},
            **self.file_config.get(name, {}),
        }
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return str(path), str(files[wanted[0]])

    def _load(self, manager: Any, name: str, spec: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        try:
            with offline_if_unreachable():
                found = manager.load([spec])
            for task in found["tasks"].values() if spec != name else ():
                _check_answers(task, self.limit)
            return found
        except ConnectionError as error:
            raise UserError(
                f"must be a folder with the data of {name}: the Hugging Face hub cannot be reached and there is no "
                f"folder {DEFAULT_FOLDER}; download the data where there is a network and say data_dir=FOLDER",
                field="data_dir",
            ) from error
        except Exception as error:  # jinja, datasets, KeyError: whatever a document that does not fit brings about
            raise UserError(
                f"must be tasks that fit their data, and {name} does not: {_reason(error)}", "tasks"
            ) from error


@contextmanager
def _bars(watch: Watch) -> Iterator[None]:
    """lm-eval's progress bars, drawn like all others."""
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    class Bar:
        def __init__(self, iterable: Any = None, total: int | None = None, desc: str = "prompts", **_: Any) -> None:
            self.iterable = iterable
            self.update = watch(f"lm-eval: {desc.lower()}", total if total is not None else len(iterable))

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable:
                yield item
                self.update(1)

        def close(self) -> None:
            pass

    modules = (model, task, huggingface)
    before = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = Bar
    try:
        yield
    finally:
        for module, tqdm in zip(modules, before, strict=True):
            module.tqdm = tqdm


def _measured_split(own: dict[str, Any]) -> str:
    """The split that lm-eval measures a task on."""
    return str(own.get("test_split") or own.get("validation_split") or own.get("training_split"))


def _digest(task: Any, limit: int | None) -> str:
    """SHA-256 of the documents that are measured, and of how they are asked."""
    docs = task.eval_docs
    content = [docs[i] for i in range(min(len(docs), limit or len(docs)))]
    shown = list(task.fewshot_docs()) if task.get_config("num_fewshot") else []
    config = {key: value for key, value in task.dump_config().items() if key not in ("dataset_kwargs", "metadata")}
    return _digest_of([content, shown, config])


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


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_source).encode()).hexdigest()


def _source(value: Any) -> str:
    """What a value that JSON does not have is known by; an address in memory would be another in every process."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does beside its vocabulary: merges, normalisation, special tokens that it adds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else ""


def _reason(error: Exception) -> str:
    cause = error
    while cause.__cause__ is not None:  # datasets wraps what went wrong
        cause = cause.__cause__  # type: ignore[assignment]
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _hush() -> None:
    """lm-eval's advice on its own arguments is of no use here; what goes wrong comes as an exception."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

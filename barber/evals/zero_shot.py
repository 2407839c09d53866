"""Accuracy on multiple-choice and other tasks, by EleutherAI's lm-eval harness on the model in memory."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.data.datasets import DEFAULT_FOLDER
from barber.errors import BarberError, UserError, require_counts
from barber.evals.harness import harness
from barber.evals.results import TaskResult, ZeroShotResult
from barber.evals.tasks import TaskFolder, Tasks, digest, load_tasks, reason
from barber.evals.watch import Watch
from barber.runtime.hub import reachable

log = logging.getLogger("barber")

SEVEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


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

    tasks: Sequence[str] = SEVEN
    num_fewshot: int | None = 0
    batch_size: int = 8
    limit: int | None = None
    data_dir: str | None = None
    files: Mapping[str, Mapping[str, Sequence[str] | str]] = field(default_factory=dict)
    file_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("must name a task at least", field="tasks")
        require_counts(self, "batch_size", "limit")
        require_counts(self, "num_fewshot", least=0)

    def prepare(self, out: Path) -> Tasks:
        """Read the tasks and their data.

        For tasks with local data, configs that include lm-eval's own and change where the data come from are written to
        `out`; lm-eval's command line runs the same with `--include_path`.

        Raises:
            UserError: no lm-eval, no such task, or its data are not to be had or do not fit it.
        """
        folder = self._folder()
        local = None if folder is None else TaskFolder(folder, self.files, self.file_config, out)
        return load_tasks(self.tasks, self.num_fewshot, self.limit, local)

    def facts(self, tasks: Tasks, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the results depend on beside the model."""
        return {
            "tokenizer": digest([tokenizer.get_vocab(), tokenizer.special_tokens_map, _rules(tokenizer)]),
            "lm_eval": version("lm-eval"),
            "logits": "finite",
            "num_fewshot": self.num_fewshot,
            "batch_size": self.batch_size,
            "limit": self.limit,
            "tasks": tasks.digests,
        }

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, watch: Watch
    ) -> ZeroShotResult:
        """Run the tasks on a model that has been placed.

        Raises:
            NumericsError: the model's logits are NaN or infinite.
            BarberError: lm-eval failed.
        """
        from lm_eval.evaluator import evaluate

        # a copy: lm-eval gives the tokenizer a padding token, which is not to be exported
        own = copy.deepcopy(tokenizer)
        try:
            for task in tasks.loaded["tasks"].values():
                # that of lm-eval's own command line; anew, for every stage to be shown the same examples
                task.set_fewshot_seed(seed=1234)
            with _bars(watch), harness(model, own, self.batch_size) as (lm, prompts):
                found = evaluate(lm=lm, task_dict=tasks.loaded, limit=self.limit, log_samples=False)
        except BarberError:
            raise
        except Exception as error:
            raise BarberError(f"lm-eval failed on {', '.join(self.tasks)}: {reason(error)}") from error
        if prompts.cut:
            log.warning(
                "%d of %d prompts are longer than the %d tokens of the model: lm-eval has cut off their beginnings.",
                *(prompts.cut, prompts.asked, prompts.longest),
            )
        assert found is not None
        results = {
            name: self._result(name, found["results"][name], found, tasks)
            for name in dict.fromkeys([*self.tasks, *tasks.loaded["tasks"]])
            if name in found["results"]
        }
        accuracies = [results[name].acc if name in results else None for name in self.tasks]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        whole = len(known) == len(accuracies)
        return ZeroShotResult(
            tasks=results,
            mean_acc=sum(known) / len(known) if whole else None,
            mean_of=tuple(self.tasks) if whole else None,
            limit=self.limit,
            lm_eval=version("lm-eval"),
            prompts=prompts.asked,
            prompts_cut=prompts.cut,
        )

    def _result(self, name: str, measured: dict[str, Any], found: Any, tasks: Tasks) -> TaskResult:
        """A task's or group's metrics under their plain names, and how they were come by."""
        metrics: dict[str, float] = {}
        for key, value in measured.items():
            metric, _, kind = key.partition(",")
            if kind and isinstance(value, int | float):
                metrics[metric if kind == "none" else key] = value
        documents = found["n-samples"].get(name) or {}
        return TaskResult(
            metrics=metrics,
            version=found["versions"].get(name),
            num_fewshot=found["n-shot"].get(name),
            documents=documents.get("effective"),
            documents_in_all=documents.get("original"),
            digest=tasks.digests.get(name),
            data=next((tasks.sources[asked] for asked, names in tasks.names.items() if name in names), None),
        )

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


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does beside its vocabulary: merges, normalisation, special tokens that it adds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else ""

"""lm-eval's tasks on the model in memory: its own figures, data from a folder, a sentence for what is missing."""

import copy
import gzip
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from barber.config import build
from barber.errors import BarberError, NumericsError, UserError
from barber.evals.agreement import Agreement
from barber.evals.evaluation import Evaluation
from barber.evals.evaluation import evaluation as evaluation_of
from barber.evals.results import StageResults, ZeroShotResult
from barber.evals.sample import Sample
from barber.evals.tasks import Tasks
from barber.evals.windows import WindowProtocol
from barber.evals.zero_shot import ZeroShot
from barber.runtime.cache import Cache
from barber.runtime.plain import plain
from tests import tiny
from tests.evals.hub_rows import DOCUMENTS, ROWS, Row, rows, words, write
from tests.evals.measuring import Ids, quiet

SHIPPED = Path(__file__).parents[2] / "conf" / "evals" / "zero_shot.yaml"
SEVEN = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
CPU = torch.device("cpu")

Results = dict[str, Any]


def shipped(folder: Path | None, **changes: Any) -> ZeroShot:
    """The component of the YAML that users get, with a few values of their own."""
    node = OmegaConf.merge({"data_dir": None if folder is None else str(folder)}, OmegaConf.load(SHIPPED))
    OmegaConf.update(node, "zero_shot", changes, merge=True)
    resolved = OmegaConf.to_container(node, resolve=True)
    assert isinstance(resolved, dict)
    made = build(resolved["zero_shot"], "zero_shot")
    assert isinstance(made, ZeroShot)
    return made


def model() -> PreTrainedModel:
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return tiny.model("llama", vocab_size=256, max_position_embeddings=256, **ids)


def tokenizer() -> PreTrainedTokenizerBase:
    """One that maps every byte to an id; it has an end token and, like those of many models, no padding token."""
    made = tiny.tokenizer()
    made.eos_token = "~"
    return made


def evaluate(spec: ZeroShot, tasks: Tasks) -> ZeroShotResult:
    with torch.no_grad():
        return spec.evaluate(model(), tokenizer(), tasks, quiet)


def lm_eval_itself(names: list[str], configs: Path, **options: Any) -> Results:
    """What lm-eval's own command gives with `--include_path CONFIGS`."""
    manager = SHARED["TaskManager"](include_path=str(configs), include_defaults=False)
    harness = HFLM(pretrained=model(), tokenizer=tokenizer(), batch_size=8)
    found = lm_eval.simple_evaluate(
        harness, tasks=names, task_manager=manager, fewshot_random_seed=1234, log_samples=False, **options
    )
    assert found is not None
    return dict(found)


def check_equal(results: ZeroShotResult, expected: Results, names: list[str]) -> None:
    """Every figure that lm-eval has of these tasks, and no other."""
    for name in names:
        figures = {key.removesuffix(",none"): value for key, value in expected["results"][name].items()}
        figures = {key: value for key, value in figures.items() if isinstance(value, float) and key != "alias"}
        mine = plain(results.tasks[name])
        assert {key: mine[key] for key in figures} == pytest.approx(figures, abs=1e-12), name
        assert mine.keys() - figures.keys() == {
            "version",
            "num_fewshot",
            "documents",
            "documents_in_all",
            "digest",
            "data",
        }
        assert "acc" in figures and "acc_stderr" in figures
        assert mine["version"] == expected["versions"][name]
        assert mine["num_fewshot"] == expected["n-shot"][name]
        counts = {"effective": mine["documents"], "original": mine["documents_in_all"]}
        assert counts == expected["n-samples"][name]


SHARED: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def one_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lm-eval reads thousands of files to know its tasks: once is enough. What datasets keeps goes to a folder of the
    tests' own.
    """
    with pytest.MonkeyPatch.context() as patch:
        SHARED["TaskManager"] = lm_eval.tasks.TaskManager
        known = lm_eval.tasks.TaskManager()
        patch.setattr(lm_eval.tasks, "TaskManager", lambda: known)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of the seven tasks; only RTE has examples to show before a question."""
    folder = tmp_path_factory.mktemp("data")
    for name in ROWS:
        write(folder / f"{name}.jsonl", rows(name))
    write(folder / "glue_rte/train.jsonl", rows("glue_rte/validation", count=6, seed=1))
    return folder


@pytest.fixture(scope="module")
def seven(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ZeroShot, Tasks, Path]:
    """The seven tasks, prepared once, and the folder of their configs."""
    spec, out = shipped(data), tmp_path_factory.mktemp("run") / "tasks"
    return spec, spec.prepare(out), out


@pytest.fixture(scope="module")
def of_seven(seven: tuple[ZeroShot, Tasks, Path]) -> ZeroShotResult:
    spec, tasks, _ = seven
    return evaluate(spec, tasks)


def test_the_figures_are_lm_evals_own_and_every_stage_is_asked_the_same(
    seven: tuple[ZeroShot, Tasks, Path], of_seven: ZeroShotResult, data: Path
) -> None:
    spec, tasks, configs = seven
    assert sorted(path.stem for path in configs.iterdir()) == sorted(SEVEN)
    check_equal(of_seven, lm_eval_itself(SEVEN, configs, num_fewshot=0), SEVEN)
    assert list(of_seven.tasks) == SEVEN
    assert of_seven.lm_eval == lm_eval.__version__
    assert {name: str(Path(of_seven.tasks[name].data)) for name in SEVEN} == {
        name: str(data / f"{file}.jsonl") for name, file in zip(SEVEN, ROWS, strict=True)
    }
    for result in of_seven.tasks.values():
        assert (result.documents, result.documents_in_all) == (DOCUMENTS, DOCUMENTS)
    assert of_seven.limit is None
    accuracies = [of_seven.tasks[name].acc for name in SEVEN]
    assert of_seven.mean_acc == pytest.approx(sum(accuracies) / 7, abs=1e-12)
    assert of_seven.mean_of == tuple(SEVEN)
    assert len(set(accuracies)) > 2  # otherwise these tests see little
    assert evaluate(spec, tasks) == of_seven
    changed = model()
    changed.model.layers[1].mlp.down_proj.weight.data.mul_(-3)
    assert spec.evaluate(changed, tokenizer(), tasks, quiet).tasks != of_seven.tasks


def test_a_limit_takes_the_first_documents_and_is_recorded(data: Path, tmp_path: Path) -> None:
    names = ["rte", "hellaswag"]
    spec = shipped(data, tasks=names, limit=4)
    results = evaluate(spec, spec.prepare(tmp_path))
    check_equal(results, lm_eval_itself(names, tmp_path, num_fewshot=0, limit=4), names)
    assert results.limit == 4
    for name in names:
        assert (results.tasks[name].documents, results.tasks[name].documents_in_all) == (4, DOCUMENTS)
    beyond = shipped(data, tasks=["rte"], limit=1000)
    assert evaluate(beyond, beyond.prepare(tmp_path)).tasks["rte"].documents == DOCUMENTS


def test_boolq_is_the_same_in_both_forms_of_the_hub(data: Path, tmp_path: Path, of_seven: ZeroShotResult) -> None:
    labelled = [
        {"idx": 0, "label": int(row.pop("answer")), **row} for row in copy.deepcopy(rows("boolq/boolq_validation"))
    ]
    write(tmp_path / "boolq/val.jsonl", labelled)
    spec = shipped(tmp_path, tasks=["boolq"])
    results = evaluate(spec, spec.prepare(tmp_path / "out")).tasks["boolq"]
    expected = of_seven.tasks["boolq"]
    assert (results.acc, results.metrics["acc_stderr"]) == (expected.acc, expected.metrics["acc_stderr"])


def as_gzip(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def as_parquet(path: Path) -> Path:
    table = pyarrow.Table.from_pylist([json.loads(line) for line in path.read_text().splitlines()])
    packed = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(table, packed)
    return packed


@pytest.mark.parametrize("convert", [as_gzip, as_parquet], ids=["gzip", "parquet"])
def test_other_kinds_of_files_hold_the_same(
    data: Path, tmp_path: Path, convert: Callable[[Path], Path], of_seven: ZeroShotResult
) -> None:
    shutil.copytree(data / "ai2_arc", tmp_path / "ai2_arc")
    original = tmp_path / "ai2_arc/ARC-Easy-test.jsonl"
    file = convert(original)
    original.unlink()
    spec = shipped(tmp_path, tasks=["arc_easy"])
    result = evaluate(spec, spec.prepare(tmp_path / "out")).tasks["arc_easy"]
    assert result.data == str(file)
    assert result == replace(of_seven.tasks["arc_easy"], data=result.data, digest=result.digest)


def test_any_other_task_needs_but_a_pattern(tmp_path: Path) -> None:
    chance = random.Random(0)
    questions = [
        {"goal": words(chance, 6), "sol1": words(chance, 4), "sol2": words(chance, 2), "label": chance.randrange(2)}
        for _ in range(DOCUMENTS)
    ]
    write(tmp_path / "piqa/valid.jsonl", questions)
    spec = shipped(tmp_path, tasks=["piqa"], files={"piqa": {"validation": "piqa/*valid*"}})
    results = evaluate(spec, spec.prepare(tmp_path / "out"))
    check_equal(results, lm_eval_itself(["piqa"], tmp_path / "out", num_fewshot=0), ["piqa"])
    assert results.mean_acc == results.tasks["piqa"].acc


@pytest.mark.parametrize("shots", [1, 3])
def test_examples_before_a_question_come_from_the_train_file_the_same_for_every_stage(
    data: Path, tmp_path: Path, shots: int
) -> None:
    spec = shipped(data, tasks=["rte"], num_fewshot=shots)
    tasks = spec.prepare(tmp_path)
    results, prompts = [], []
    for _ in ("dense", "pruned"):
        results.append(evaluate(spec, tasks))
        prompts.append([request.args for request in tasks.loaded["tasks"]["rte"].instances])
    assert prompts[1] == prompts[0]
    check_equal(results[0], lm_eval_itself(["rte"], tmp_path, num_fewshot=shots), ["rte"])
    assert results[0].tasks["rte"].num_fewshot == shots


def test_a_digest_is_that_of_the_documents_and_of_how_they_are_asked(data: Path, tmp_path: Path) -> None:
    def digest(folder: Path, **changes: Any) -> str:
        return shipped(folder, tasks=["rte"], **changes).prepare(tmp_path / "out").digests["rte"]

    shutil.copytree(data / "glue_rte", tmp_path / "glue_rte")
    same = digest(data)
    assert digest(tmp_path) == same
    assert digest(data, limit=4) != same
    assert digest(data, num_fewshot=2) != same
    changed = rows("glue_rte/validation")
    changed[-1]["label"] = 1 - changed[-1]["label"]
    write(tmp_path / "glue_rte/validation.jsonl", changed)
    assert digest(tmp_path) != same
    assert digest(tmp_path, limit=4) == digest(data, limit=4)


def test_a_digest_is_the_same_in_every_process(
    seven: tuple[ZeroShot, Tasks, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tasks have functions, which lie elsewhere in memory the next time; results that were kept must be found."""
    for name in [name for name in sys.modules if name.startswith(("lm_eval.tasks.hellaswag", "lm_eval.tasks.winogr"))]:
        monkeypatch.delitem(sys.modules, name)
    spec, tasks, _ = seven
    assert spec.prepare(tmp_path).digests == tasks.digests


def test_the_tokenizer_and_the_weights_are_left_as_they_are(data: Path, tmp_path: Path) -> None:
    def contents(own: PreTrainedTokenizerBase) -> list[Any]:
        return [own.backend_tokenizer.to_str(), dict(own.special_tokens_map), len(own), own.padding_side]

    def places(used: PreTrainedModel) -> dict[str, tuple[int, int]]:
        return {name: (id(tensor), tensor.data_ptr()) for name, tensor in used.named_parameters()}

    spec, used, passed = shipped(data, tasks=["rte"]), model(), tokenizer()
    before = contents(passed), places(used)
    spec.evaluate(used, passed, spec.prepare(tmp_path), quiet)
    assert (contents(passed), places(used)) == before
    assert passed.pad_token is None
    assert all(torch.equal(mine, its) for mine, its in zip(used.parameters(), model().parameters(), strict=True))


def test_progress_is_told_and_lm_eval_gets_its_own_bars_back(seven: tuple[ZeroShot, Tasks, Path]) -> None:
    from lm_eval.models import huggingface

    spec, tasks, _ = seven
    bars, announced, done = huggingface.tqdm, [], []

    def watch(what: str, steps: int) -> Callable[[int], None]:
        announced.append((what, steps))
        return done.append

    spec.evaluate(model(), tokenizer(), tasks, watch)
    assert sum(done) == sum(steps for _, steps in announced)
    assert all(what.startswith("lm-eval: ") for what, _ in announced)
    requests = DOCUMENTS * (2 + 2 + 4 + 2 + 4 + 4 + 4)
    assert requests in [steps for _, steps in announced]
    assert huggingface.tqdm is bars


def test_what_goes_wrong_in_lm_eval_is_a_sentence(data: Path, tmp_path: Path) -> None:
    from lm_eval.models import huggingface

    spec, bars = shipped(data, tasks=["rte"]), huggingface.tqdm
    broken = model()
    broken.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(BarberError, match=r"^lm-eval failed on rte: ZeroDivisionError: division by zero$"):
        spec.evaluate(broken, tokenizer(), spec.prepare(tmp_path), quiet)
    assert huggingface.tqdm is bars


def test_logits_that_are_no_numbers_are_no_answers(data: Path, tmp_path: Path) -> None:
    """lm-eval takes the first choice of NaN and counts how often it is right."""
    spec, broken = shipped(data, tasks=["rte"]), model()
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NumericsError, match=r"^the evaluated model's logits are NaN or infinite$"):
        spec.evaluate(broken, tokenizer(), spec.prepare(tmp_path), quiet)


def test_prompts_that_lose_their_beginning_are_counted(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = shipped(data, tasks=["rte"])
    tasks = spec.prepare(tmp_path)
    whole = spec.evaluate(model(), tokenizer(), tasks, quiet)
    assert (whole.prompts, whole.prompts_cut) == (2 * DOCUMENTS, 0) and not caplog.records
    lengths = [len(tokenizer().encode("".join(one.args))) for one in tasks.loaded["tasks"]["rte"].instances]
    short = model()
    short.config.max_position_embeddings = sorted(lengths)[3]  # and one more, for the last token is only looked for
    found = spec.evaluate(short, tokenizer(), tasks, quiet)
    assert found.prompts_cut == sum(length > sorted(lengths)[3] + 1 for length in lengths) > 0
    assert f"{found.prompts_cut} of {found.prompts} prompts are longer than the" in caplog.text


def test_every_evaluation_leaves_the_model_as_it_was(data: Path, tmp_path: Path) -> None:
    """lm-eval ties a head again that the model has of its own, whatever its config says."""
    used = model()
    used.config.tie_word_embeddings = True
    used.lm_head.weight = torch.nn.Parameter(used.lm_head.weight.detach().clone() * 3)
    options: dict[str, Any] = {"perplexity": True, "agreement": Agreement(), "sample": Sample("It", tokens=2)}
    spec = evaluation_of(["dense"], {"text": Ids(96)}, 32, zero_shot=shipped(data, tasks=["rte"]), **options)

    def state() -> dict[str, Any]:
        return {name: (id(one), one.data_ptr(), one.detach().clone()) for name, one in used.named_parameters()}

    before = state()
    assert spec.prepare(tokenizer(), tmp_path).measure("dense", used, CPU, quiet)
    after = state()
    assert after.keys() == before.keys() and "tie_weights" not in vars(used)
    for name, (*place, weight) in before.items():
        assert after[name][:2] == tuple(place) and torch.equal(after[name][2], weight), name


def test_the_tiny_model_of_the_configs_can_be_tried(data: Path, tmp_path: Path) -> None:
    """Its tokenizer has neither a BOS nor an end token."""
    spec = shipped(data, tasks=["rte"])
    assert spec.evaluate(model(), tiny.tokenizer(), spec.prepare(tmp_path), quiet).mean_acc is not None


def evaluation(spec: ZeroShot, placement: Any = "whole") -> Evaluation:
    return Evaluation(["dense"], {}, [WindowProtocol()], perplexity=False, zero_shot=spec, placement=placement)


def test_layer_by_layer_the_figures_are_the_same(data: Path, tmp_path: Path, of_seven: ZeroShotResult) -> None:
    prepared = evaluation(shipped(data), "layers").prepare(tokenizer(), tmp_path)
    assert prepared.measure("dense", model(), CPU, quiet) == StageResults(zero_shot=of_seven)


@pytest.fixture
def dense(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ZeroShotResult]:
    """Measures RTE of a dense model, with what is kept of earlier times at hand."""
    monkeypatch.setenv("BARBER_CACHE", str(tmp_path / "cache"))

    def measure(
        used: PreTrainedModel | None = None,
        own: PreTrainedTokenizerBase | None = None,
        folder: Path = data,
        **changes: Any,
    ) -> ZeroShotResult:
        spec = shipped(folder, **{"tasks": ["rte"]} | changes)
        prepared = evaluation(spec).prepare(own or tokenizer(), tmp_path / "tasks", Cache())
        results = prepared.measure("dense", used or model(), CPU, quiet)
        assert results is not None and results.zero_shot is not None
        return results.zero_shot

    return measure


def test_the_dense_models_figures_are_kept_for_the_same_measurement_of_the_same_model(
    dense: Callable[..., ZeroShotResult],
) -> None:
    """With another tokenizer the same weights are asked other questions: say, a token goes before them."""
    first = dense()
    resting = model()
    resting.forward = None
    again = dense(resting)
    assert again.cached
    assert replace(again, cached=None) == first
    for change in ({"limit": 4}, {"num_fewshot": 2}, {"batch_size": 3}, {"tasks": ["arc_easy"]}):
        assert dense(**change).cached is None, change
    changed = model()
    changed.lm_head.weight.data[3] *= 2
    assert dense(changed).cached is None
    begun = tokenizer()
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    assert begun("a")["input_ids"] != tokenizer()("a")["input_ids"]
    assert dense(own=begun).cached is None


def test_other_examples_are_measured_anew(dense: Callable[..., ZeroShotResult], data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "glue_rte", tmp_path / "glue_rte")
    dense(num_fewshot=2)
    assert dense(folder=tmp_path, num_fewshot=2).cached is not None
    write(tmp_path / "glue_rte/train.jsonl", rows("glue_rte/validation", count=6, seed=2))
    assert dense(folder=tmp_path, num_fewshot=2).cached is None


def check_sentence(error: BarberError, *parts: str) -> None:
    """One sentence that names all of these."""
    assert "\n" not in str(error)
    assert len(str(error)) < 600
    for part in parts:
        assert part in str(error)


def test_a_tokenizer_is_needed(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^zero_shot needs a tokenizer and the model has none$"):
        evaluation(shipped(data)).prepare(None, tmp_path)
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    with pytest.raises(UserError, match=r"^zero_shot needs a tokenizer that knows words; "):
        evaluation(shipped(data)).prepare(empty, tmp_path)


MISSING: list[tuple[Row, list[str]]] = [
    ({"tasks": ["piqa"]}, ["piqa", "validation", "zero_shot.files.piqa.validation=", "baber/piqa"]),
    (
        {"tasks": ["winogrande"], "num_fewshot": 1},
        ["data_dir must hold the train split of winogrande", "winogrande_xl/*train*"],
    ),
    ({"tasks": ["sciq"], "data_dir": "nowhere"}, ["data_dir must be a folder", "nowhere"]),
    (
        {"tasks": ["openbookqa"], "data_dir": "."},
        ["data_dir must hold the test split of openbookqa", "openbookqa/*test*", "allenai/openbookqa"],
    ),
]


@pytest.mark.parametrize(
    ("settings", "parts"), MISSING, ids=lambda value: value["tasks"][0] if "tasks" in value else ""
)
def test_what_is_missing_is_named_with_what_to_do(
    settings: Row, parts: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        shipped(data, **settings).prepare(tmp_path / "out")
    check_sentence(caught.value, *parts)
    assert caught.value.field == "data_dir"


@pytest.mark.parametrize("name", ["bolq", "nothing", "BoolQ"])
def test_an_unknown_task_is_named(data: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"^tasks must be lm-eval tasks, and '{name}' is none"):
        shipped(data, tasks=["rte", name]).prepare(tmp_path)


@pytest.mark.parametrize("name", ["mmlu", "ai2_arc"], ids=["a group", "a tag"])
def test_a_folder_holds_single_tasks_only(data: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"^tasks must be single tasks .*, and {name} is a group$"):
        shipped(data, tasks=[name]).prepare(tmp_path)


def relabelled(label: Callable[[int, Any], Any]) -> Callable[[Path], object]:
    changed = [row | {"label": label(i, row["label"])} for i, row in enumerate(rows("glue_rte/validation"))]
    return lambda path: write(path, changed)


WORDED = ["entailment", "not_entailment"]
UNLABELLED = [{key: value for key, value in row.items() if key != "label"} for row in rows("glue_rte/validation")]
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a line cut off": (lambda path: path.write_bytes(path.read_bytes()[:-30]), f"line {DOCUMENTS}"),
    "no line": (lambda path: path.write_bytes(b""), "is empty"),
    "no JSON": (lambda path: path.write_text("sentence1\tsentence2\tlabel\nA dog.\tA cat.\t1\n"), "line 1"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00\x01\n"), "UTF-8"),
    "other columns": (lambda path: write(path, [{"text": "A text.", "number": 3}] * 5), "rte"),
    "no labels": (lambda path: write(path, UNLABELLED), "rte"),
    "labels withheld, as in the test splits of GLUE": (relabelled(lambda i, label: -1), "rte"),
    "one label withheld": (relabelled(lambda i, label: -1 if i == DOCUMENTS - 1 else label), "rte"),
    "labels in words": (relabelled(lambda i, label: WORDED[label]), "rte"),
    "labels beyond the choices": (relabelled(lambda i, label: label + 1), "rte"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_does_not_fit_is_refused_in_a_sentence(
    tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    """Where a label is none of the choices, lm-eval would count every answer as wrong and go on."""
    file = write(tmp_path / "glue_rte/validation.jsonl", rows("glue_rte/validation"))
    damage(file)
    with pytest.raises(UserError) as caught:
        shipped(tmp_path, tasks=["rte"]).prepare(tmp_path / "out")
    check_sentence(caught.value, says)
    if says != "rte":
        check_sentence(caught.value, str(file))


def test_a_gzip_file_that_was_cut_off_is_named(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "glue_rte", tmp_path / "glue_rte")
    packed = as_gzip(tmp_path / "glue_rte/validation.jsonl")
    packed.with_suffix("").unlink()
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(UserError) as caught:
        shipped(tmp_path, tasks=["rte"]).prepare(tmp_path / "out")
    check_sentence(caught.value, str(packed), "download it again")


def test_the_splits_of_a_task_are_files_of_one_kind(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "glue_rte", tmp_path / "glue_rte")
    as_parquet(tmp_path / "glue_rte/train.jsonl")
    (tmp_path / "glue_rte/train.jsonl").unlink()
    with pytest.raises(UserError) as caught:
        shipped(tmp_path, tasks=["rte"]).prepare(tmp_path / "out")
    check_sentence(caught.value, "data_dir must hold all splits of rte in one kind of file")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("barber.evals.zero_shot", "barber.runtime.hub"):
        monkeypatch.setattr(f"{module}.reachable", lambda: False)


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_and_a_folder_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        shipped(None).prepare(tmp_path / "out")
    check_sentence(caught.value, "boolq", "the Hugging Face hub cannot be reached and there is no folder data")
    assert caught.value.field == "data_dir"


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_the_folder_named_data_is_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    tasks = shipped(None, tasks=["rte"]).prepare(tmp_path / "out")
    assert Path(tasks.sources["rte"]).resolve() == (tmp_path / "data/glue_rte/validation.jsonl").resolve()


def test_without_lm_eval_there_is_the_command_that_installs_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError) as caught:
        evaluation(shipped(data)).prepare(tokenizer(), tmp_path)
    message = 'zero_shot: needs lm-eval, install it with: pip install "llm-barber[zero-shot]"'
    assert str(caught.value) == message

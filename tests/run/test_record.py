"""What a record holds is what was read of it; what is damaged is told in one sentence, and never taken for a run."""

import copy
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from barber.errors import UserError
from barber.evals.results import StageResults
from barber.run.reading import NewerRecordError, folder_of_job, from_json, read, successful
from barber.run.record import VERSION, Initial, Machine, RunRecord
from barber.runtime.plain import plain
from tests import records

ROOT = Path(__file__).parents[2]
QUICK = settings(deadline=None, derandomize=True, max_examples=100)

finite = st.floats(allow_nan=False, allow_infinity=False)
keys = st.text(min_size=1, max_size=8)
scalars = st.none() | st.booleans() | st.integers() | finite | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def written(record: RunRecord, folder: Path) -> dict[str, Any]:
    record.write(folder)
    content: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a record with everything in it, but for its digest."""
    content = written(records.record(), tmp_path_factory.mktemp("whole"))
    del content["sha256"]
    return content


# ---------------------------------------------------------------------------------------------------------------------
# There and back


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    for record in (records.record(), RunRecord.begin({"seed": 0}, ["seed=0"])):
        record.write(tmp_path)
        assert read(tmp_path) == read(tmp_path / "record.json") == record


@given(st.data())
@QUICK
def test_so_is_any_other(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    number, text = st.integers(), st.text(max_size=8)
    maybe = data.draw(st.none() | finite)
    perplexity = records.perplexity(
        data.draw(st.floats(1, 1e300)),
        perplexity_standard_error=maybe,
        digest=data.draw(text),
        cached=data.draw(st.none() | text),
        protocol=replace(records.PROTOCOL, separator=data.draw(st.none() | text), text_tokens=data.draw(number)),
    )
    agreement = replace(
        records.AGREEMENT, block_errors=data.draw(st.dictionaries(keys, st.none() | finite, max_size=3))
    )
    known = {field.name for task in records.ZERO_SHOT.tasks.values() for field in fields(task)}
    task = replace(
        records.ZERO_SHOT.tasks["boolq"],
        metrics=data.draw(st.dictionaries(keys.filter(lambda key: key not in known), finite | number, max_size=3)),
        version=data.draw(scalars.filter(lambda value: not isinstance(value, bool))),
        documents=data.draw(st.none() | number),
    )
    stage = StageResults(
        data.draw(st.dictionaries(keys, st.just(perplexity), max_size=2)),
        data.draw(st.dictionaries(keys, st.just(agreement), max_size=2)),
        data.draw(st.none() | st.just(replace(records.ZERO_SHOT, tasks={data.draw(keys): task}, mean_of=None))),
    )
    record = records.record(
        config=data.draw(st.dictionaries(keys, anything, max_size=3)),
        choices=data.draw(st.dictionaries(keys, st.none() | text, max_size=3)),
        machine=Machine(device=data.draw(st.none() | text), precision=data.draw(st.none() | st.just(("a", "b")))),
        initial=data.draw(st.none() | st.builds(Initial, st.booleans(), st.none() | finite)),
        results=data.draw(st.dictionaries(keys, st.just(stage), max_size=2)),
        seconds=data.draw(st.dictionaries(keys, finite | number, max_size=3)),
        error=data.draw(st.none() | text),
    )
    folder = tmp_path_factory.mktemp("record")
    record.write(folder)
    assert read(folder) == record


def test_the_file_has_the_keys_that_reports_and_searches_name(whole: dict[str, Any]) -> None:
    assert list(whole) == [
        *("version", "config", "overrides", "choices", "digest", "tracking", "status", "started", "finished"),
        *("versions", "git", "machine", "seeds", "calibration", "resumed", "initial", "sparsity", "linears"),
        *("zeros", "results", "seconds", "walk_seconds", "files", "digests", "error", "traceback"),
    ]
    assert whole["version"] == VERSION == 3
    assert whole["machine"] == {
        "device": "cpu",
        "threads": 2,
        "platform": "Linux",
        "batch_size": 8,
        "processes": 1,
        "precision": ["float32", "float32"],
        "peak_memory_bytes": 1000,
    }
    assert whole["seeds"] == {"run": 0, "calibration": 1}
    assert whole["resumed"] == {"from": "outputs/before", "layers": 1}
    assert whole["linears"] == {"layers.0.q": {"weights": 100, "zeros": 50, "exchanges": 7}}
    assert list(whole["results"]["dense"]) == ["perplexity"]  # what was not measured is not there
    rebuilt = whole["results"]["rebuilt"]
    assert list(rebuilt) == ["perplexity", "agreement", "zero_shot", "sample"]
    protocol = ["text", "text_tokens", "seqlen", "stride", "bos", "max_windows", "separator"]
    assert list(rebuilt["perplexity"]["text"]) == [
        *("perplexity", "perplexity_standard_error", "nll_per_token", "nll_standard_error", "windows", "tokens"),
        *(*protocol, "digest"),
    ]
    assert list(rebuilt["agreement"]["text"]) == [
        *("kl_divergence", "kl_standard_error", "top1_agreement", "top1_standard_error", "block_errors"),
        *("block_positions", "windows", "tokens", *protocol, "digest"),
    ]
    assert rebuilt["zero_shot"]["tasks"]["boolq"] == {
        "acc": 0.5,
        "acc_stderr": 0.1,
        "version": 2.0,
        "num_fewshot": 0,
        "documents": 10,
        "documents_in_all": 20,
        "digest": "4e",
        "data": "a file",
    }
    assert list(rebuilt["zero_shot"]["tasks"]["wsc"]) == ["em", "em_stderr", "version", "num_fewshot"]


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    records.record().write(tmp_path)
    code = (
        "import sys; from pathlib import Path; from barber.run.reading import read; "
        f"print(read(Path({str(tmp_path)!r})).results['rebuilt'].perplexity['text'].perplexity, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "20.0 False\n"


# ---------------------------------------------------------------------------------------------------------------------
# Versions


def first_version(whole: dict[str, Any]) -> dict[str, Any]:
    """As version 1 had it, which did not say so."""
    return {key: value for key, value in copy.deepcopy(whole).items() if key != "version"}


def published() -> Iterator[tuple[str, str]]:
    """The records in experiments/results, of folders and of tables, by where they are."""
    folder = ROOT / "experiments" / "results"
    for file in folder.rglob("record*.json"):
        yield str(file), file.read_text(encoding="utf-8")
    for table in folder.rglob("*.jsonl.gz"):
        with gzip.open(table, "rt", encoding="utf-8") as lines:
            yield from ((f"{table}, line {number}", line) for number, line in enumerate(lines, 1))


def test_every_published_record_is_read() -> None:
    found = list(published())
    assert len(found) > 50
    for place, text in found:
        content = json.loads(text)
        record = from_json(content, place)
        assert record.status == "success" and record.version == VERSION, place
        for key in ("results", "sparsity", "calibration", "machine", "git", "seconds"):
            assert plain(getattr(record, key)) == content[key], (place, key)
        assert plain(record.initial) == content.get("initial"), place
        assert plain(record.linears) == content.get("linears", {}), place
        assert record.seeds is not None and record.seeds.run == content["seeds"]["run"], place
        assert record.config["pattern"] == content["config"]["pattern"], place


def test_records_without_a_version_are_those_of_before(whole: dict[str, Any]) -> None:
    assert from_json(first_version(whole), "one") == records.record()


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        (lambda old: [old.pop(key) for key in ("choices", "digest", "tracking")], "digest", ""),
        (lambda old: [old.pop(key) for key in ("resumed", "initial")], "initial", None),
        (lambda old: [old.pop(key) for key in ("linears", "files", "traceback")], "linears", {}),  # a table's
        (lambda old: old.update(initial="kept"), "initial", Initial(known=True, seconds=None)),
        (lambda old: old.update(initial="computed"), "initial", Initial(known=False, seconds=None)),
        (lambda old: old.update(machine={}, status="started"), "machine", Machine()),
        (lambda old: old.update(seeds={}, status="started"), "seeds", None),
        (lambda old: old.update(seeds={"run": 3}), "seeds", replace(records.record().seeds, run=3, calibration=None)),
        (lambda old: old.update(run="the name in a table"), "status", "success"),
    ],
)
def test_older_forms_are_known(change: Change, key: str, expected: Any, whole: dict[str, Any]) -> None:
    old = first_version(whole)
    change(old)
    assert getattr(from_json(old, "one"), key) == expected


def test_a_rebuilding_of_one_component_is_one_of_one_step(whole: dict[str, Any]) -> None:
    old = first_version(whole)
    step = {"_target_": "barber.rebuild.Barber", "alpha": 0.1}
    old["config"]["rebuild"] = step
    assert from_json(old, "one").config["rebuild"] == {"barber": step}


def test_a_later_version_is_left_alone(whole: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"version": 4, "all": "is otherwise"}))
    expected = "must be a record of version 3 at most, not 4: upgrade llm-barber to read it"
    for look in (read, successful):
        with pytest.raises(NewerRecordError) as caught:
            look(tmp_path)
        assert str(caught.value) == f"{tmp_path / 'record.json'} {expected}"


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def without(*path: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def with_(value: Any, *path: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


TEXT = ("results", "rebuilt", "perplexity", "text")
TASK = ("results", "rebuilt", "zero_shot", "tasks", "boolq")
DAMAGED: dict[str, tuple[Change, str]] = {
    "no config": (without("config"), "config is missing"),
    "no status": (without("status"), "status is missing"),
    "no results": (without("results"), "results is missing"),
    "no loss": (without(*TEXT, "nll_per_token"), "results.rebuilt.perplexity.text.nll_per_token is missing"),
    "no length": (without(*TEXT, "seqlen"), "results.rebuilt.perplexity.text.seqlen is missing"),
    "no zeros": (without("linears", "layers.0.q", "zeros"), "linears.layers.0.q.zeros is missing"),
    "a list": (with_([], "config"), "config must be an object, not []"),
    "a status": (with_("done", "status"), "status must be one of started, success, failed, not 'done'"),
    "a text": (
        with_("20", *TEXT, "perplexity"),
        "results.rebuilt.perplexity.text.perplexity must be a number, not '20'",
    ),
    "a flag": (
        with_(True, *TEXT, "windows"),
        "results.rebuilt.perplexity.text.windows must be a whole number, not True",
    ),
    "a number": (with_(1, *TEXT, "bos"), "results.rebuilt.perplexity.text.bos must be true or false, not 1"),
    "a fraction": (with_(1.5, "sparsity", "zeros"), "sparsity.zeros must be a whole number, not 1.5"),
    "no metric": (with_("0.5", *TASK, "acc"), "results.rebuilt.zero_shot.tasks.boolq.acc must be a number, not '0.5'"),
    "a word": (with_("a=1", "overrides"), "overrides must be a list, not 'a=1'"),
    "a version": (with_("2", "version"), "version must be a whole number, not '2'"),
    "no version": (with_(0, "version"), "version must be 1 at least, not 0"),
    "a long text": (
        with_("x" * 500, "machine", "threads"),
        "machine.threads must be a whole number, not 'xxxxxxxxxxxx...",
    ),
    "overrides": (with_(["a=1", 2], "overrides"), "overrides[1] must be a text, not 2"),
}


@pytest.mark.parametrize(("change", "expected"), list(DAMAGED.values()), ids=list(DAMAGED))
def test_what_is_wrong_with_a_record_is_said_by_its_key(
    change: Change, expected: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    content = copy.deepcopy(whole)
    change(content)
    sentence = refused(json.dumps(content).encode(), tmp_path)
    assert sentence.removeprefix("must be the record of a run, and is damaged or none: ").startswith(expected)


@pytest.mark.parametrize(
    ("change", "of_json"),
    [
        (lambda text: b"", "Expecting value"),
        (lambda text: text[:-20], "delimiter"),
        (lambda text: text[: len(text) // 2], ""),
        (lambda text: text.replace(b"4.5", b"NaN"), "NaN is no number of JSON"),
        (lambda text: text.replace(b"4.5", b"-Infinity"), "-Infinity is no number of JSON"),
        (lambda text: text.replace(b"4.5", b"1e999"), "seconds.walk must be a number, not inf"),
        (lambda text: text.replace(b"4.5", b"1" + 400 * b"0"), "seconds.walk must be a number, not 10000"),
        (lambda text: b"\xff\xfe\x00", "decode"),
        (lambda text: b"[" * 100_000, "recursion"),
        (lambda text: b"null", "must be an object, not None"),
        (lambda text: b"[1, 2]", "must be an object, not [1, 2]"),
        (lambda text: b"{}", "config is missing"),
        (lambda text: b'{"results": {"perplexity": 3}}', "config is missing"),
    ],
    ids=[
        "empty",
        "cut off",
        "half",
        "NaN",
        "infinite",
        "too large",
        "a huge integer",
        "no text",
        "deep",
        "null",
        "list",
        "{}",
        "others",
    ],
)
def test_what_is_no_record_at_all_is_told(
    change: Callable[[bytes], bytes], of_json: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    assert of_json in refused(change(json.dumps(whole).encode()), tmp_path)


def refused(content: bytes, folder: Path) -> str:
    """What is said of a file, in one line after its path; and that it is not taken for a finished run."""
    file = folder / "record.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(folder)
    assert not isinstance(caught.value, NewerRecordError)
    assert successful(folder) is None
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < len(str(file)) + 200
    return sentence.removeprefix(f"{file} ")


@given(st.integers(0), st.integers(0, 7))
@QUICK
def test_a_bit_that_turns_over_is_found(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("record")
    records.record().write(folder)
    content = bytearray((folder / "record.json").read_bytes())
    content[place % len(content)] ^= 1 << bit
    (folder / "record.json").write_bytes(content)
    with suppress(UserError):
        assert read(folder) == records.record()  # it was a space


def test_a_folder_without_a_record_is_told(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"{place} must be the folder of a run, with a record\.json: "):
            read(place)
        assert successful(place) is None


@given(st.data())
@settings(QUICK, max_examples=300)
def test_whatever_stands_in_a_file_it_is_a_record_or_a_sentence(whole: dict[str, Any], data: st.DataObject) -> None:
    """Something in the record is replaced, by anything or by nothing."""
    content = copy.deepcopy(whole)
    place: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.booleans()):
        place[key] = data.draw(anything)
    else:
        del place[key]
    try:
        found: RunRecord | UserError = from_json(content, "one")
    except UserError as error:
        found = error
    assert isinstance(found, RunRecord) or (str(found).startswith("one must be ") and "\n" not in str(found))


def test_only_finished_runs_are_successful(tmp_path: Path) -> None:
    for status in ("started", "failed"):
        records.record(status=status).write(tmp_path)
        assert successful(tmp_path) is None
    records.record().write(tmp_path)
    assert successful(tmp_path) == records.record()


def test_a_damaged_job_is_no_finished_one(tmp_path: Path) -> None:
    """Of two folders of a job the finished one counts."""
    for name in ("first-d1", "second-d1"):
        (tmp_path / name).mkdir()
        records.record().write(tmp_path / name)
    assert folder_of_job(tmp_path, "third", "d1") == tmp_path / "first-d1"
    record = tmp_path / "first-d1" / "record.json"
    record.write_bytes(record.read_bytes()[:-1])
    assert folder_of_job(tmp_path, "third", "d1") == tmp_path / "second-d1"

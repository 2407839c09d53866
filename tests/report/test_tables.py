"""Tables of records: what stands in them, and that everything reads them as it reads the folders of runs."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from barber.report import sources
from barber.report.__main__ import main as report
from barber.report.errors import ReportError
from barber.run import reading
from experiments.pack import main as pack
from tests.report.making import Write

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def packed(tmp_path: Path) -> Path:
    """The runs below the folder `sweep` in a table."""
    table = tmp_path / "sweep.jsonl.gz"
    assert pack([str(table), str(tmp_path / "sweep")]) == 0
    return table


def lines(table: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(table.read_bytes()).splitlines()]


def written(place: Path, out: Path) -> dict[str, bytes]:
    assert report([str(place), "--out", str(out)]) == 0
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_a_report_of_a_table_is_that_of_its_folders(write: Write, tmp_path: Path) -> None:
    """But for the pictures of layers and linears; failed and repeated runs are listed by their names."""
    for sparsity in (0.5, 0.6):
        for seed in (0, 1):
            write(None, "Wanda", 60 + 100 * sparsity + seed, sparsity=sparsity, seed=seed, walk=20.0, folder="sweep")
    for alpha in (0.01, 0.1):
        write(f"deep/er/{alpha}", alpha=alpha, folder="sweep", machine={"peak_memory_bytes": 2**30})
    write("early", "Magnitude", 60.0, digest="same", folder="sweep")
    write("late", "Magnitude", 61.0, digest="same", folder="sweep")
    write("bad", status="failed", error="layer 3 has NaN", traceback="Traceback", results={}, folder="sweep")

    of_folders = written(tmp_path / "sweep", tmp_path / "of_folders")
    of_table = written(packed(tmp_path), tmp_path / "of_table")
    assert of_folders.keys() - of_table.keys() == {
        f"{n}.{e}" for n in ("exchanges", "block_losses") for e in ("png", "svg")
    }
    pictures = {"sparsity", "alpha", "pareto", "time_and_memory"}
    assert {name for name in of_table if name.endswith(".svg")} == {f"{name}.svg" for name in pictures}
    for name in of_table.keys() - {"index.html"}:
        assert of_table[name] == of_folders[name], name
    assert b"layer 3 has NaN" in of_table["table.md"] and b"| early | repeated |" in of_table["table.md"]
    assert b"deep/er/0.1, seed 0" in of_table["index.html"]


def test_tables_below_a_folder_stand_for_folders(write: Write, tmp_path: Path) -> None:
    write("a", "Wanda", 60.0, folder="sweep")
    write("b", "Magnitude", status="failed", error="no room", results={}, folder="sweep")
    packed(tmp_path).rename(tmp_path / "sweep" / "more.jsonl.gz")
    assert {run.name for run in sources.find([tmp_path / "sweep"])} == {"a", "b", "more/a", "more/b"}
    both = [tmp_path / "sweep" / "more.jsonl.gz", tmp_path / "sweep" / "a"]
    assert [run.name for run in sources.find(both)] == ["more/a", "more/b", "a"]


def test_a_table_holds_all_of_a_record_but_rows_a_linear(write: Write, tmp_path: Path) -> None:
    folder = write("one", alpha=0.1, folder="sweep", files={"loss": "loss.png"}, traceback=None)
    whole = reading.read(folder).content()
    table = packed(tmp_path)
    (line,) = lines(table)
    assert line.pop("run") == "one"
    left_out = {"linears": {}, "files": {}, "digests": {}, "traceback": None}
    assert line == {key: value for key, value in whole.items() if key not in left_out}
    assert sources.one(f"{table}#one") == line | left_out
    assert sources.one(str(folder)) == whole


def test_the_same_records_are_the_same_bytes(write: Write, tmp_path: Path) -> None:
    write("b", folder="sweep")
    write("a", "Magnitude", folder="sweep")
    first = packed(tmp_path).read_bytes()
    assert first[4:8] == bytes(4)  # gzip's time
    (tmp_path / "sweep" / "a").rename(tmp_path / "sweep" / "c")
    (tmp_path / "sweep" / "c").rename(tmp_path / "sweep" / "a")
    assert packed(tmp_path).read_bytes() == first
    assert [line["run"] for line in lines(tmp_path / "sweep.jsonl.gz")] == ["a", "b"]


def test_runs_are_added_to_a_table(write: Write, tmp_path: Path) -> None:
    write("a", folder="sweep")
    table = packed(tmp_path)
    write("new/b", "Magnitude")
    assert pack([str(table), str(table), str(tmp_path / "new")]) == 0
    assert list(sources.read(table)) == ["new/b", "sweep/a"]


def test_mistakes_in_packing_are_one_sentence_and_leave_the_table_as_it_was(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("bad", status="failed", error="no room", results={}, folder="sweep")
    write("x/run", folder="one")
    write("x/run", folder="two")
    sweep, table = tmp_path / "sweep", tmp_path / "t.jsonl.gz"
    table.write_bytes(b"as it was")
    torn = tmp_path / "torn" / "record.json"
    torn.parent.mkdir()
    torn.write_text('{"config": ')
    for arguments, sentence in (
        (
            [table, tmp_path / "nowhere"],
            f"There is no record.json and no table (*.jsonl.gz) below {tmp_path / 'nowhere'}.",
        ),
        ([table, sweep], f"None of the 1 runs below {sweep} has succeeded."),
        ([tmp_path / "t.json", sweep], f"The name of a table ends with .jsonl.gz, not as {tmp_path / 't.json'} does."),
        (
            [sweep / "t.jsonl.gz", sweep],
            f"{sweep / 't.jsonl.gz'} lies in {sweep}, where a report would find its runs twice",
        ),
        ([table, tmp_path / "one" / "x", tmp_path / "two" / "x"], "2 of the runs are called x/run"),
        ([table, tmp_path / "torn"], f"{torn} must be the record of a run, and is damaged or none"),
        ([table, tmp_path / "torn" / "record.json"], f"{torn} is neither a folder nor a table (*.jsonl.gz)."),
        ([tmp_path / "no" / "t.jsonl.gz", tmp_path / "one"], f"{tmp_path / 'no' / 't.jsonl.gz'} cannot be written"),
    ):
        assert pack([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(sentence), captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
    assert table.read_bytes() == b"as it was"


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"{"), gzip.compress(b'{"a": 1}\n'), gzip.compress(b"x" * 9999)[:-9]],
    ids=["plain", "JSON", "records", "end"],
)
def test_what_is_no_table_is_listed_below_a_report(content: bytes, write: Write, tmp_path: Path) -> None:
    write("good", folder="sweep")
    (tmp_path / "sweep" / "bad.jsonl.gz").write_bytes(content)
    table = written(tmp_path / "sweep", tmp_path / "out")["table.md"].decode()
    assert "| bad | unreadable |" in table and "cannot be read as a table of records" in table
    with pytest.raises(ReportError, match="cannot be read as a table of records"):
        sources.one(f"{tmp_path / 'sweep' / 'bad.jsonl.gz'}#good")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)


def test_a_run_of_a_table_is_compared_like_a_folder(write: Write, tmp_path: Path) -> None:
    write("a", "Wanda", 60.0, alpha=0.1, folder="sweep")
    other = write("b", "Wanda", 66.0, alpha=0.5, folder="sweep")
    table = packed(tmp_path)
    found = run("experiments.diff", f"{table}#a", str(other))
    assert (found.returncode, found.stderr) == (0, "")
    assert "  rebuild.barber.alpha: 0.1 | 0.5" in found.stdout.splitlines()
    assert "  rebuilt.perplexity.wikitext2.perplexity: 60.0000 | 66.0000 (+10.00%)" in found.stdout.splitlines()
    missing = run("experiments.diff", f"{table}#a", f"{table}#c")
    assert (missing.returncode, missing.stderr) == (2, f"{table} has no run 'c'; there is a, b.\n")
    whole = run("experiments.table", str(table))
    assert whole.returncode == 2
    assert whole.stderr == f"{table} is a table: give a run of it as {table}#NAME; there is a, b.\n"


def test_what_is_published_is_small_and_succeeded() -> None:
    files = [file for file in RESULTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 1_000_000
    assert not [file for file in files if file.name == sources.FILE]
    found = sources.find([RESULTS])
    assert found and {run.record["status"] if run.record else run.error for run in found} == {"success"}


def test_the_page_of_a_run_is_made_from_its_table() -> None:
    found = run("experiments.table", f"{RESULTS / 'smollm2_wanda' / 'records.jsonl.gz'}#smollm2_wanda")
    page = (RESULTS / "smollm2_wanda" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in found.stdout.splitlines() if line.startswith("|")]
    assert found.returncode == 0 and len(rows) > 20
    assert set(rows) <= set(page)

import copy
import csv
import html.parser
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from barber.report import figures, formats, paper, perplexities, points, records, sources, table, walks
from barber.report.__main__ import main
from barber.report.errors import ReportError
from experiments.table import table as run_table
from tests.report.making import Write, record


def built(folder: Path, published: paper.Paper | None = None) -> table.Table:
    published = published or paper.load()
    runs, broken = records.read([folder], published.aliases)
    return table.build(points.points(runs), runs, broken, published)


def row(content: table.Table, method: str, pattern: str = "50%") -> table.Row:
    (found,) = [r for r in content.rows if (r.point.method, r.point.pattern) == (method, pattern)]
    return found


def test_seeds_become_mean_and_sample_standard_deviation(write: Write, tmp_path: Path) -> None:
    for seed, perplexity in enumerate((60.0, 62.0, 67.0)):
        write(None, "Wanda", perplexity, seed=seed)
    cell = row(built(tmp_path), "Wanda").cells["perplexity, wikitext2"]
    # Mean 63, squared deviations 9 + 1 + 16, over n - 1 = 2.
    assert cell.text == "63.00 ± 3.61 (n=3)"
    assert cell.mean and cell.mean.std == pytest.approx(13**0.5)
    assert row(built(tmp_path), "Wanda").cells["seeds"].text == "0, 1, 2"


def test_methods_have_the_fields_names(write: Write, tmp_path: Path) -> None:
    write(None, "SparseGPT")
    write(None, "SparseGPT", alpha=0.0, granularity="layer")
    write(None, "SparseGPT", alpha=0.1, granularity="layer")
    write(None, "Wanda", alpha=0.01, nm=(2, 4))
    content = built(tmp_path)
    assert [(r.point.method, r.point.pattern) for r in content.rows] == [
        ("Dense", ""),
        ("SparseGPT (mask only)", "50%"),
        ("SparseGPT (update)", "50%"),
        ("SparseGPT + Barber (layer, 0.1)", "50%"),
        ("Wanda + Barber (output, 0.01)", "2:4"),
    ]


def test_a_rebuilt_run_measured_before_rebuilding_only_is_its_initial_mask(write: Write, tmp_path: Path) -> None:
    content = record(alpha=0.1)
    content["results"]["pruned"] = content["results"].pop("rebuilt")
    write(None, alpha=0.1, results=content["results"])
    assert [r.point.method for r in built(tmp_path).rows] == ["Dense", "Wanda"]


def test_best_is_bold_in_its_model_and_pattern_and_never_the_dense_model(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, accuracy=0.4)
    write(None, "Magnitude", 500.0, accuracy=0.5)
    write(None, "Wanda", 170.0, nm=(2, 4))
    write(None, "SparseGPT", 90.0, nm=(2, 4))
    content = built(tmp_path)
    best = {
        (r.point.method, r.point.pattern, title) for r in content.rows for title, cell in r.cells.items() if cell.best
    }
    assert best == {
        ("Wanda", "50%", "perplexity, wikitext2"),
        ("Magnitude", "50%", "zero-shot acc (%)"),
        ("SparseGPT (update)", "2:4", "perplexity, wikitext2"),
    }
    assert "| **60.00**" in formats.markdown(content)
    assert "\\textbf{60.00}" in formats.latex(content)


def test_only_settings_that_vary_are_columns(write: Write, tmp_path: Path) -> None:
    write(None, alpha=0.1)
    write(None, alpha=0.2)
    titles = [column.title for column in built(tmp_path).columns]
    assert "alpha" in titles
    assert not {"granularity", "metric", "nsamples", "seeds", "evals.seqlen"} & set(titles)
    write(None, alpha=0.2, calibration=(32, 512, "ptb"))
    assert {"nsamples", "calibration"} <= {column.title for column in built(tmp_path).columns}


def test_how_far_steps_follow_the_dense_model_is_in_the_methods_name_alone(write: Write, tmp_path: Path) -> None:
    for follow in (0.0, 0.5):
        content = record()
        content["config"]["update"] = {"alps": {"_target_": "barber.updates.ALPS", "follow": follow}}
        content["results"]["rebuilt"] = content["results"]["pruned"]
        write(None, config=content["config"], results=content["results"])
    content = built(tmp_path)
    methods = ["Wanda + ALPS (follow 0.5), with reconstruction", "Wanda + ALPS, with reconstruction"]
    assert [found.point.method for found in content.rows] == ["Dense", *methods]
    assert not any("follow" in column.title for column in content.columns)


def test_a_published_figure_is_compared_under_its_own_protocol_only(write: Write, tmp_path: Path) -> None:
    c4 = (128, 2048, "c4")
    write(None, "Wanda", 7.26 * 1.1, model="llama-7b", seqlen=2048, max_windows=None, calibration=c4)
    write(None, "SparseGPT", 7.0, model="llama-7b", seqlen=1024, max_windows=None, calibration=c4)
    write(None, "Wanda", 8.0, model="llama-7b", sparsity=0.55, seqlen=2048, max_windows=None, calibration=c4)
    content = built(tmp_path)
    same = row(content, "Wanda").cells
    assert (same["published"].text, same["difference (%)"].text) == ("7.26", "+10.0")
    assert same["published"].hint == "BESA's README"
    assert same["method"].notes == same["perplexity, wikitext2"].notes == ()
    other = row(content, "SparseGPT (update)").cells
    assert (other["published"].text, other["difference (%)"].text) == ("7.22", "")
    assert other["published"].notes[0].startswith("other protocol: BESA's README")
    assert row(content, "Wanda", "55%").cells["published"].text == ""


@pytest.mark.parametrize("change", [{"max_windows": 40}, {"text": "ptb"}], ids=["windows", "text"])
def test_limited_windows_and_other_texts_are_another_protocol(
    write: Write, tmp_path: Path, change: dict[str, Any]
) -> None:
    write(None, "Wanda", 7.26, **({"model": "llama-7b", "seqlen": 2048, "max_windows": None} | change))
    cells = row(built(tmp_path), "Wanda").cells
    assert cells["difference (%)"].text == ""
    assert "other protocol" in cells["published"].notes[0]


def test_the_length_chooses_among_published_figures(write: Write, tmp_path: Path) -> None:
    for seqlen in (2048, 4096):
        write(None, "Wanda", 7.0, model="llama2-7b", seqlen=seqlen, max_windows=None)
    published = [r.cells["published"].text for r in built(tmp_path).rows if r.point.method == "Wanda"]
    assert published == ["6.92", "6.42"]


def test_the_authors_code_is_compared_on_its_own_windows(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 62.21, alpha=0.01)
    cells = row(built(tmp_path), "Wanda + Barber (output, 0.01)").cells
    assert (cells["published"].text, cells["difference (%)"].text) == ("62.19", "+0.0")
    assert cells["difference (%)"].notes == ("published with calibration on 16 x 512 WikiText-2 validation",)


def test_an_unknown_published_figure_is_a_dash_with_its_note(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 7.0, alpha=0.01, model="llama-7b")
    cell = row(built(tmp_path), "Wanda + Barber (output, 0.01)").cells["published"]
    assert cell.text == "–"
    assert "could not be read" in cell.notes[0]


def test_what_keeps_figures_from_being_compared_is_footnoted(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, accuracy=0.4, limit=200)
    cells = row(built(tmp_path), "Wanda").cells
    assert cells["perplexity, wikitext2"].notes == (
        "wikitext2: only the first 40 windows (max_windows)",
        "wikitext2: windows of 512 tokens, not 2048",
    )
    assert cells["zero-shot acc (%)"].notes == ("zero-shot: only the first 200 documents of every task (limit)",)
    assert cells["method"].notes == ("calibrated on 16 x 512 wikitext2, not on 128 x 2048 c4",)


def test_what_was_counted_is_footnoted(write: Write, tmp_path: Path) -> None:
    folder = write(None, "Wanda", calibration=(128, 2048, "c4"), zeros={"dense": {"zeros": 1, "weights": 4}})
    assert row(built(tmp_path), "Dense", "").cells["method"].notes == ("25.00% of the dense model's weights are zeros",)
    assert "| zeros in the decoder's linears | 25.00% | – |" in list(run_table(sources.one(str(folder))))
    content = record(calibration=(128, 2048, "c4"))
    content["calibration"]["distinct"] = 14
    assert records.Run("a run", "a model", content).calibration == "128 x 2048 c4 (14 distinct)"


def test_magnitude_needs_no_calibration_and_gets_no_note(write: Write, tmp_path: Path) -> None:
    write(None, "Magnitude", 60.0)
    assert row(built(tmp_path), "Magnitude").cells["method"].notes == ()


def test_a_limit_that_cuts_nothing_is_none(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, seqlen=2048, max_windows=80)  # the text has 80
    assert row(built(tmp_path), "Wanda").cells["perplexity, wikitext2"].notes == ()


def test_mixed_protocols_are_flagged_loudly_and_not_ranked_together(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0)
    write(None, "Magnitude", 500.0)
    write(None, "SparseGPT", 10.0, seqlen=2048)
    content = built(tmp_path)
    assert content.warnings[0].startswith("MIXED PROTOCOLS: 2 of 5 rows")  # and its dense model
    cell = row(content, "SparseGPT (update)").cells["perplexity, wikitext2"]
    assert cell.notes[0].startswith("NOT THE PROTOCOL OF MOST ROWS")
    assert not cell.best
    assert row(content, "Wanda").cells["perplexity, wikitext2"].best
    assert formats.markdown(content).startswith("> **MIXED PROTOCOLS")
    assert "MIXED PROTOCOLS" in formats.latex(content)


def test_a_resumed_run_has_the_same_figures_but_not_all_seconds(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, walk=3.0, resumed={"from": "x", "layers": 2})
    write(None, "Wanda", 61.0, walk=9.0, seed=1)
    write(None, "Magnitude", 500.0, walk=1.0, resumed={"from": "x", "layers": 2})
    content = built(tmp_path)
    assert row(content, "Wanda").cells["walk (s)"].text == "9.0"
    cells = row(content, "Magnitude").cells
    assert cells["walk (s)"].notes == ("a resumed run: seconds after its last start only",)
    assert not any("resumed" in note for note in cells["perplexity, wikitext2"].notes)


def test_initial_masks_of_another_run_cost_what_they_cost_there(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, walk=8.0, initial={"known": True, "seconds": 4.0})
    write(None, "Magnitude", 500.0, walk=8.0, initial={"known": False, "seconds": 4.0})
    content = built(tmp_path)
    assert row(content, "Wanda").cells["walk (s)"].text == "12"
    assert row(content, "Magnitude").cells["walk (s)"].text == "8.0"


def test_allocations_and_gradients_of_the_loss_cost_what_they_take(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, seconds={"walk": 8.0, "allocate": 5.0}, walk_seconds={"select": 8.0})
    write(None, "GBLM", 59.0, seconds={"walk": 70.0}, walk_seconds={"select": 8.0})
    content = built(tmp_path)
    assert row(content, "Wanda").cells["walk (s)"].text == "13"
    assert row(content, "GBLM").cells["walk (s)"].text == "70"
    by_method = {points.method_of(run): run for run in records.read([tmp_path], {})[0]}
    assert by_method["Wanda"].phases == {"allocation": 5.0, "select": 8.0}
    assert by_method["GBLM"].phases == {"select": 8.0, "other": 62.0}


def test_of_runs_with_one_digest_the_later_counts_and_the_other_is_listed(write: Write, tmp_path: Path) -> None:
    write("early", "Wanda", 60.0, digest="same")
    write("late", "Wanda", 61.0, digest="same")
    content = built(tmp_path)
    assert row(content, "Wanda").cells["perplexity, wikitext2"].text == "61.00"
    assert [(one.name, one.status) for one in content.broken] == [("early", "repeated")]


def test_old_records_without_digest_and_choices(write: Write, tmp_path: Path) -> None:
    old: dict[str, Any] = copy.deepcopy(record("Wanda", 60.0))
    old["config"]["model"]["file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    old["config"]["calibration"]["dataset"] = "allenai/c4"
    for perplexity in (60.0, 61.0):
        old["results"]["pruned"]["perplexity"]["wikitext2"]["perplexity"] = perplexity
        write(None, **{key: old[key] for key in ("config", "results")}, choices={}, digest="")
    content = built(tmp_path)
    found = row(content, "Wanda")
    assert found.point.model == "smollm2-135m"
    assert found.cells["perplexity, wikitext2"].text == "61.00"  # one seed: not two runs to average
    assert found.cells["method"].notes == ("calibrated on 16 x 512 c4, not on 128 x 2048 c4",)


def test_failed_unfinished_and_unreadable_runs_are_listed(write: Write, tmp_path: Path) -> None:
    write("good", "Wanda", 60.0)
    write("bad", status="failed", error="layer 3 has NaN", results={})
    write("open", status="started", results={})
    write("silent", results={"dense": record()["results"]["dense"]})
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "record.json").write_text('{"config": ')
    listed = {one.name: (one.status, one.error) for one in built(tmp_path).broken}
    assert listed["bad"] == ("failed", "layer 3 has NaN")
    assert listed["open"] == ("unfinished", "still running, or killed")
    assert listed["torn"][0] == "unreadable"
    assert listed["silent"][0] == "without figures"
    assert "good" not in listed
    assert "layer 3 has NaN" in formats.markdown(built(tmp_path))
    assert "layer 3 has NaN" in formats.latex(built(tmp_path))


def test_latex_is_escaped_and_balanced(write: Write, tmp_path: Path) -> None:
    write("good", "Wanda", 60.0)
    write("a_run & 50%", status="failed", error="C:\\x_y {z} ~ #1 $ ^", results={})
    text = formats.latex(built(tmp_path))
    assert r"a\_run \& 50\%" in text
    assert r"C:\textbackslash{}x\_y \{z\} \textasciitilde{} \#1 \$ \textasciicircum{}" in text
    assert re.findall(r"(?<!\\)[%_#$]", text.replace("$\\pm$", "").removeprefix("%")) == []
    tabular = text[text.index("\\toprule") : text.index("\\bottomrule")]
    rows = [line for line in tabular.splitlines() if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in rows}) == 1


def test_csv_parses_back(write: Write, tmp_path: Path) -> None:
    for seed, perplexity in enumerate((60.0, 62.0)):
        write(None, "Wanda", perplexity, seed=seed)
    write(None, "Magnitude", 524.2)
    rows = {r["method"]: r for r in csv.DictReader(io.StringIO(formats.to_csv(built(tmp_path))))}
    assert float(rows["Wanda"]["perplexity, wikitext2"]) == 61.0
    assert float(rows["Wanda"]["perplexity, wikitext2 std"]) == pytest.approx(2**0.5)
    assert rows["Wanda"]["perplexity, wikitext2 n"] == "2"
    assert rows["Magnitude"]["published"] == "524.2"
    assert rows["Magnitude"]["published source"] == "authors' code, measured"
    assert "max_windows" in rows["Magnitude"]["notes"]


class Page(html.parser.HTMLParser):
    """Tags and what a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]


def sweep(write: Write) -> None:
    """Enough for every figure."""
    for sparsity in (0.5, 0.6):
        write(None, "Wanda", 60 + 100 * sparsity, sparsity=sparsity, walk=20.0)
        write(None, "Magnitude", 6000 * sparsity, sparsity=sparsity, walk=10.0)
    for granularity in ("output", "block"):
        for alpha in (0.0, 0.01, 0.1):
            write(
                None,
                "Wanda",
                60 - 10 * alpha,
                alpha=alpha,
                granularity=granularity,
                machine={"peak_memory_bytes": 2**30},
            )
    write("<script>a_b", "SparseGPT", 50.0, overrides=["name=<script>alert(1)</script>_x"])
    write("bad", status="failed", error="<img src=http://x/y.png>", results={})


def test_command_writes_everything(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(write)
    out = tmp_path / "out"
    assert main([str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| model | method |")
    names = ("sparsity", "alpha", "granularity", "pareto", "time_and_memory", "block_losses", "exchanges")
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len((out / f"{name}.png").read_bytes()) > 5000
        assert "</svg>" in (out / f"{name}.svg").read_text()
        assert str(out / f"{name}.svg") in printed
    page = Page(text := (out / "index.html").read_text())
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == len(names)
    assert all(value.startswith(("data:", "#")) for value in page.loaded)
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:|//)", re.sub(r"&lt;.*?&gt;", "", text))
    assert "&lt;script&gt;a_b" in text
    assert "name=&lt;script&gt;alert(1)&lt;/script&gt;_x" in text
    assert "the end of the log &lt;/pre&gt;" in text
    assert "abc123" in text


def test_out_is_by_default_in_the_folder_and_is_not_read_again(write: Write, tmp_path: Path) -> None:
    write(None)
    assert main([str(tmp_path)]) == main([str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "table.md",
        "table.tex",
        "table.csv",
        "index.html",
    }


def test_nothing_that_varies_is_no_figure(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda")
    runs, _ = records.read([tmp_path], {})
    assert figures.draw(points.points(runs), tmp_path) == []


def test_a_point_far_above_the_others_does_not_press_them_together() -> None:
    near = [(1.0, 60.0), (2.0, 40.0), (3.0, 50.0)]
    assert perplexities.within_sight([*near, (0.0, 480.0)]) == [*near, (0.0, 62.0)]
    assert perplexities.within_sight([*near, (0.0, 200.0)]) == [*near, (0.0, 200.0)]
    assert perplexities.within_sight([(1.0, 7.0)]) == [(1.0, 7.0)]


def test_non_dominated_points() -> None:
    assert perplexities.non_dominated([(1, 9), (2, 5), (3, 5), (4, 1), (2, 6)]) == [0, 1, 3]


def test_shares_of_exchanged_weights(write: Write, tmp_path: Path) -> None:
    write(None, alpha=0.1)
    (run,), _ = records.read([tmp_path], {})
    found = walks.exchange_grid(run)
    assert found is not None
    names, grid = found
    assert names == ["q_proj", "down_proj"]
    assert grid.tolist() == [[0.01, 0.02, 0.03]] * 2


def test_a_folder_without_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"There is no record.json and no table (*.jsonl.gz) below {tmp_path}.\n"
    assert captured.out == ""


def test_only_failed_runs_are_still_a_report(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("bad", status="failed", error="out of memory", results={})
    assert main([str(tmp_path)]) == 0
    assert "out of memory" in capsys.readouterr().out


def test_it_runs_without_torch() -> None:
    heavy = {"torch", "transformers"}
    code = f"import sys, barber.report.__main__; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_every_published_row_has_a_source() -> None:
    published = paper.load()
    found = {(one.model, one.method, one.pattern, one.seqlen): one for one in published.figures}
    assert len(found) == len(published.figures)
    assert found["llama2-13b", "BESA (row)", "50%", 2048].value == 5.75
    assert found["llama2-7b", "Magnitude", "2:4", 4096].value == 54.59
    assert found["smollm2-135m", "SparseGPT (update)", "4:8", 512].source.title == "authors' code, measured"
    assert all(one.value is None for one in published.figures if "LLM-Barber" in one.source.title)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nobody"}, "source 'nobody' is none of"),
        ({"pattern": 124}, 'in quotes ("2:4"), not 124'),
        ({"sparsity": 50}, "sparsity has to be between 0 and 1"),
        ({"value": "7.2"}, "value has to be a positive number or null"),
        ({"value": None}, "needs a note"),
        ({"valeu": 7.2}, "unknown keys: valeu"),
    ],
)
def test_a_mistake_in_paper_yaml_is_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"model": "m", "method": "Wanda", "pattern": "unstructured", "sparsity": 0.5}
    good |= {"seqlen": 2048, "value": 7.2, "source": "s"}
    content = {"sources": {"s": {"title": "S"}}, "models": {}, "figures": [good | change]}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ReportError, match=re.escape(message)) as error:
        paper.load(tmp_path / "paper.yaml")
    assert "figures[0] of paper.yaml" in str(error.value)


def test_own_models_have_their_names_and_are_told_apart_where_these_are_equal(write: Write, tmp_path: Path) -> None:
    def own(choice: str, path: str) -> None:
        config = record()["config"] | {"model": {"_target_": "barber.Pretrained", "path": path}}
        write(None, config=config, choices={"model": choice}, results=record()["results"])

    own("local", "/x/My-Model")
    own("hub", "ORG/Other")
    assert {point.model for point in points.points(records.read([tmp_path], {})[0])} == {"My-Model", "Other"}
    own("local", "/y/My-Model")
    own("hub", "THEIRS/Other")
    own("local", "/z/llama-7b")
    write(None, model="llama-7b")
    found = {point.model for point in points.points(records.read([tmp_path], paper.load().aliases)[0])}
    assert found == {"x/My-Model", "y/My-Model", "ORG/Other", "THEIRS/Other", "z/llama-7b", "llama-7b"}

"""What stands on the pages of a report, and why not."""

import base64
import csv
import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from barber.report import details, experiments, figures, formats, paper, points, records, table
from barber.report.__main__ import main
from barber.report.answer import answer
from barber.run.curves import coinciding
from tests.report.making import Write, record


def figures_of(folder: Path) -> tuple[list[points.Point], table.Table]:
    runs, broken = records.read([folder], {})
    found = points.points(runs)
    return found, table.build(found, runs, broken, paper.load())


def with_errors(*arguments: Any, error: float = 1.5, experiment: str | None = None, **settings: Any) -> dict[str, Any]:
    content = record(*arguments, **settings)
    for stage in content["results"].values():
        for found in stage["perplexity"].values():
            found["perplexity_standard_error"] = error
        if zero_shot := stage.get("zero_shot"):
            task = {"acc": 0.4, "acc_stderr": 0.03, "version": 1.0, "num_fewshot": 0}
            zero_shot["tasks"] = {"boolq": task, "rte": task | {"acc_stderr": 0.04}}
    content["choices"]["experiment"] = experiment
    return {key: content[key] for key in ("results", "choices")}


def pages(folder: Path, out: Path) -> dict[str, str]:
    assert main([str(folder), "--out", str(out)]) == 0
    return {file.name: file.read_text(encoding="utf-8") for file in out.glob("*.html")}


def visible(page: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", page)).split())


def test_figures_have_their_standard_errors(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, accuracy=0.45, **with_errors("Wanda", 60.0, accuracy=0.45))
    _, content = figures_of(tmp_path)
    cells = content.rows[1].cells
    assert cells["perplexity, wikitext2"].text == "60.00 ± 1.50"
    # Half of the root of 3² + 4²: two tasks of independent documents.
    assert cells["zero-shot acc (%)"].text == "45.00 ± 2.50"
    assert "± is one standard error" in formats.markdown(content) and "one standard error" in formats.latex(content)
    (_, wanda) = csv.DictReader(formats.to_csv(content).splitlines())
    assert wanda["perplexity, wikitext2 standard error"] == "1.5" and "perplexity, wikitext2 n" not in wanda


def test_seeds_are_told_by_their_deviation_alone(write: Write, tmp_path: Path) -> None:
    for seed, perplexity in enumerate((60.0, 62.0)):
        write(None, "Wanda", seed=seed, **with_errors("Wanda", perplexity, seed=seed))
    _, content = figures_of(tmp_path)
    assert content.rows[1].cells["perplexity, wikitext2"].text == "61.00 ± 1.41 (n=2)"


def test_behind_a_row_are_results_then_pictures_then_settings(write: Write, tmp_path: Path) -> None:
    folder = write(
        None, "Wanda", 60.0, alpha=0.1, files={"loss": "loss.png", "of": "../../etc/x.png", "log": "run.log"}
    )
    (folder / "loss.png").write_bytes(b"\x89PNG loss")
    _, content = figures_of(tmp_path)
    (*_, panel) = details.panels(content.rows)
    in_order = ("perplexity, wikitext2", "60.00", base64.b64encode(b"\x89PNG loss").decode(), "git commit", "config")
    places = [panel.index(part) for part in in_order]
    assert places == sorted(places)
    assert panel.count("<img") == 1 and "28.74" in panel  # the dense model beside


def test_pictures_beyond_the_room_on_a_page_are_named(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(None, "Wanda", 60.0, files={"loss": "loss.png"})
    (folder / "loss.png").write_bytes(b"x" * 100)
    _, content = figures_of(tmp_path)
    monkeypatch.setattr(details, "EMBEDDED", 99)
    (*_, panel) = details.panels(content.rows)
    assert "<img" not in panel and str(folder / "loss.png") in panel


def test_an_experiment_has_a_page_with_question_answer_and_protocol(write: Write, tmp_path: Path) -> None:
    chosen = {"experiment": "ablation_alpha"}
    for alpha, perplexity in ((0.01, 50.0), (0.1, 40.0), (0.5, 80.0)):
        write(None, alpha=alpha, **with_errors("Wanda", perplexity, alpha=alpha, **chosen))
    write(None, "Magnitude", 500.0)
    found = pages(tmp_path, tmp_path / "out")
    assert found.keys() == {"index.html", "ablation_alpha.html"}
    assert 'href="ablation_alpha.html"' in found["index.html"]
    page = found["ablation_alpha.html"]
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:|//)", page)
    text = visible(page[page.index("<body>") :])
    assert "question The share of the worthwhile pairs that is exchanged." in text
    assert (
        "answer On wikitext2, smollm2-135m at 50% has its lowest perplexity, 40.00 ± 1.50, with Wanda + Barber "
        "(output, 0.1): 20.0% below Wanda + Barber (output, 0.01), the next, and 50.0% below Wanda + Barber "
        "(output, 0.5), the last of 3 (dense: 28.74 ± 1.50)." in text
    )
    assert "Protocol model smollm2-135m texts wikitext2: the first 40 windows of 512 tokens" in text
    assert "calibration 16 x 512 wikitext2" in text and "commit abc123" in text
    assert "Magnitude" not in text and "Magnitude" in found["index.html"]
    assert (tmp_path / "out" / "ablation_alpha" / "alpha.svg").exists()


def test_an_experiment_without_figures_says_so(write: Write, tmp_path: Path) -> None:
    choices = record()["choices"] | {"experiment": "index"}
    write("bad", status="failed", error="no room", results={}, choices=choices)
    text = visible(pages(tmp_path, tmp_path / "out")["index_experiment.html"])
    assert "answer No figure yet." in text and "no room" in text and "question" not in text


def test_questions_are_those_of_the_package() -> None:
    assert experiments.question("ablation_metric").startswith("|weight| x gradient against")
    assert experiments.question("of somebody else") == ""


def test_an_answer_is_cautious_within_the_spread(write: Write, tmp_path: Path) -> None:
    for pruner, values in (("Wanda", (60.0, 64.0)), ("SparseGPT", (61.0, 65.0))):
        for seed, value in enumerate(values):
            write(None, pruner, value, seed=seed)
    found, _ = figures_of(tmp_path)
    assert "62.00 ± 2.83 (n=2), with Wanda: 1.6% below SparseGPT (update), the next (less than one ± apart)" in answer(
        found
    )


def test_an_answer_on_many_patterns_counts(write: Write, tmp_path: Path) -> None:
    for sparsity in (0.4, 0.5, 0.6, 0.7):
        write(None, "Wanda", 60.0, sparsity=sparsity)
        write(None, "SparseGPT", 50.0 if sparsity == 0.4 else 70.0, sparsity=sparsity)
    found, _ = figures_of(tmp_path)
    lowest = "the lowest perplexity on wikitext2 is that of Wanda in 3, of SparseGPT (update) in 1."
    assert answer(found) == f"Of 4 models and patterns, {lowest}"
    assert answer([]) == "No figure yet."


def test_points_that_have_nothing_in_common_are_no_picture(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, sparsity=0.5, machine={"device": "cpu", "threads": 2})
    write(None, "Magnitude", 90.0, sparsity=0.5, machine={"device": "cuda", "gpu": "H100"})
    write(None, "SparseGPT", 80.0, sparsity=0.7)
    write(None, "Wanda", 60.0, alpha=0.1, sparsity=0.6, granularity="output")
    write(None, "Wanda", 60.0, alpha=0.2, sparsity=0.6, granularity="layer", machine={"device": "cuda"})
    found, _ = figures_of(tmp_path)
    drawn = {picture.name for picture in figures.draw(found, tmp_path / "out")}
    assert not drawn & {"sparsity", "alpha", "granularity", "pareto"}


def test_curves_that_lie_on_each_other_are_said_to() -> None:
    axes = Figure().subplots()
    x = [0, 1, 2]
    axes.plot(x, [1, 2, 3], label="initial")
    axes.errorbar(x, [1, 2, 3.001], [0.1] * 3, label="rebuilt")
    axes.plot(x, [3, 2, 1], label="other")
    axes.axhline(2, label="alone")
    assert coinciding(axes) == "initial and rebuilt coincide"
    axes.set_ylim(2.999, 3.002)  # where the two can be told apart
    assert coinciding(axes) == ""


def test_pages_need_no_torch(write: Write, tmp_path: Path) -> None:
    write(None, "Wanda", 60.0, **with_errors("Wanda", 60.0, experiment="ablation_alpha"))
    code = f"""
import sys
from barber.report.__main__ import main
assert main([{str(tmp_path)!r}]) == 0
sys.exit(bool({{"torch", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert (tmp_path / "report" / "ablation_alpha.html").exists()

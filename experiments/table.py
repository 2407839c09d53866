"""A run's results as a Markdown table with its protocol, from its record: python -m experiments.table RUN_FOLDER."""

import shlex
import sys
from collections.abc import Iterator
from typing import Any

from barber.report import sources
from barber.report.errors import ReportError
from barber.report.measures import measures, zeros

Record = dict[str, Any]


def table(record: Record) -> Iterator[str]:
    """The measures as rows, the stages of the model as columns."""
    stages = record["results"]
    cells = {stage: dict(emphasized(*one) for one in measures(results)) for stage, results in stages.items()}
    yield "| | " + " | ".join(stages) + " |"
    yield "|---|" + "---:|" * len(stages)
    yield "| zeros in the decoder's linears | " + " | ".join(zeros(record, stage) for stage in stages) + " |"
    for row in dict.fromkeys(row for column in cells.values() for row in column):
        yield f"| {row} | " + " | ".join(cells[stage].get(row, "") for stage in stages) + " |"


def emphasized(name: str, text: str) -> tuple[str, str]:
    """For Markdown: a star is a star, and the mean stands out."""
    return name.replace("*", r"\*"), f"**{text}**" if "mean of the" in name else text


def protocol(record: Record) -> Iterator[str]:
    """What one has to know to compare the figures with others."""
    results = next(iter(record["results"].values()))
    if calibration := record["calibration"]:
        samples, distinct = calibration["samples"], calibration.get("distinct")
        size = f"{samples} x {calibration['seqlen']} tokens" + (f", {distinct} distinct" if distinct else "")
        size += f", seed {record['seeds']['calibration']}"
        yield f"calibration: {size}; {calibration['source']} (sha256 {calibration['digest'][:12]}…)"
    for text, found in results.get("perplexity", {}).items():
        limit = f", of the first {found['max_windows']} windows at most" if found["max_windows"] else ""
        yield (
            f"{text}: {found['windows']} windows of {found['seqlen']} tokens, stride {found['stride']}, "
            f"{'with' if found['bos'] else 'no'} BOS{limit}; {found['text']} (sha256 {found['digest'][:12]}…)"
        )
    if zero_shot := results.get("zero_shot"):
        limited = rf"\* **only the first {zero_shot['limit']} documents of every task**"
        documents = limited if zero_shot["limit"] else "all documents"
        shots = "/".join(map(str, sorted({found["num_fewshot"] for found in zero_shot["tasks"].values()})))
        versions = ", ".join(f"{name} {found['version']}" for name, found in zero_shot["tasks"].items())
        yield f"zero-shot: lm-eval {zero_shot['lm_eval']}, {shots} shots, {documents}; task versions: {versions}"
    yield "± is one standard error, over windows (perplexity, KL, agreement) or documents (accuracies)"
    packages = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers"))
    dirty = " with changes" if record["git"] and record["git"]["dirty"] else ""
    commit = record["git"]["commit"][:10] + dirty if record["git"] else "unknown"
    yield f"commit {commit}, {packages}, {record['machine']['device']}, {record['machine']['threads']} threads"


def report(record: Record) -> Iterator[str]:
    """The whole page."""
    if record["status"] != "success":
        yield f"**This run did not finish: {record['status']}. {record['error'] or ''}**\n"
    yield "```\nbarber " + " ".join(shlex.quote(override) for override in record["overrides"]) + "\n```\n"
    yield from table(record)
    yield ""
    yield from (f"- {line}" for line in protocol(record))
    seconds = ", ".join(f"{phase} {value:.0f}" for phase, value in record["seconds"].items())
    yield f"- seconds: {seconds}"
    samples = {stage: results["sample"] for stage, results in record["results"].items() if "sample" in results}
    if samples:
        yield f"\n{next(iter(samples.values()))['prompt']!r} goes on, greedily:\n"
        yield from (f"- {stage}: `{' '.join(sample['text'].split())}`" for stage, sample in samples.items())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.table RUN_FOLDER (or a run of a table, TABLE.jsonl.gz#NAME)")
    try:
        record = sources.one(sys.argv[1])
    except ReportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print("\n".join(report(record)))

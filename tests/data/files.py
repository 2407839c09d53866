"""Files with rows and texts, and what is said of those that are not what they should be."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from barber.errors import UserError


def write(path: Path, text: str | bytes) -> Path:
    """Write a file as it stands, gzipped where its name says so."""
    content = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_column(path: Path, texts: Sequence[object], column: str = "text") -> Path:
    """Write a file of rows with one column of that name and another."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(texts))), column: list(texts)}), path, row_group_size=2)
        return path
    rows = [json.dumps({"id": i, column: text}, ensure_ascii=False) for i, text in enumerate(texts)]
    return write(path, "".join(row + "\n" for row in rows))


def complaint(action: Callable[[], object]) -> str:
    """The one sentence that it ends with."""
    with pytest.raises(UserError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence

"""Made-up rows of the tasks' data, in the form of the hub's data sets."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCUMENTS = 9

Row = dict[str, Any]

WORDS = ["the", "a", "one", "old", "red", "dog", "tree", "river", "runs", "sees", "under", "never", "because", "warm"]


def words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(count))


def choices(chance: random.Random) -> Row:
    return {"text": [words(chance, chance.randint(1, 4)) for _ in range(4)], "label": ["A", "B", "C", "D"]}


def arc(chance: random.Random) -> Row:
    return {
        "id": "x",
        "question": words(chance, 8) + "?",
        "choices": choices(chance),
        "answerKey": chance.choice("ABCD"),
    }


def hellaswag(chance: random.Random) -> Row:
    return {
        "activity_label": words(chance, 2),
        "ctx_a": words(chance, 6) + ".",
        "ctx_b": words(chance, 2),
        "endings": [words(chance, 3) + " [header] " + words(chance, chance.randint(1, 3)) for _ in range(4)],
        "label": str(chance.randrange(4)),
    }


#: A row of every file as the hub's data set has it.
ROWS: dict[str, Callable[[random.Random], Row]] = {
    "boolq/boolq_validation": lambda chance: {
        "question": words(chance, 5),
        "passage": words(chance, 12),
        "answer": chance.random() < 0.5,
    },
    "glue_rte/validation": lambda chance: {
        "sentence1": words(chance, 9),
        "sentence2": words(chance, 5),
        "label": chance.randrange(2),
        "idx": 0,
    },
    "hellaswag/hellaswag_val": hellaswag,
    "winogrande_xl/validation": lambda chance: {
        "sentence": words(chance, 4) + " _ " + words(chance, 3),
        "option1": words(chance, 1),
        "option2": words(chance, 2),
        "answer": chance.choice("12"),
    },
    "ai2_arc/ARC-Easy-test": arc,
    "ai2_arc/ARC-Challenge-test": arc,
    "openbookqa/test": lambda chance: {
        "id": "x",
        "question_stem": words(chance, 7),
        "choices": choices(chance),
        "answerKey": chance.choice("ABCD"),
    },
}


def rows(name: str, count: int = DOCUMENTS, seed: int = 0) -> list[Row]:
    chance = random.Random(f"{name} {seed}")
    return [ROWS[name](chance) for _ in range(count)]


def write(path: Path, content: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eapo_fast.data import check_golds, load_dataset, require_column
from eapo_fast.errors import DataError

ROW = {"problem": "1+1?", "answer": "2"}


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_jsonl_rows_get_a_prompt_and_keep_their_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(ROW | {"level": 3}), "", json.dumps(ROW))
    expected = {"problem": "1+1?", "answer": "2", "level": 3, "prompt": "1+1?"}
    assert load_dataset(path)[0] == expected
    assert len(load_dataset(str(path))) == 2


def test_a_dataset_object_is_any_iterable_of_mappings() -> None:
    class Dataset:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield {"question": "1+1?", "answer": 2}

    assert load_dataset(Dataset()) == [{"question": "1+1?", "answer": "2", "prompt": "1+1?"}]


def test_messages_stay_messages_and_rows_are_copied() -> None:
    source = [{"prompt": [{"role": "user", "content": "hi"}], "answer": "x"}]
    rows = load_dataset(source)
    rows[0]["prompt"][0]["content"] = "changed"
    assert source[0]["prompt"][0]["content"] == "hi"  # type: ignore[index]


REFERENCES = {
    "gsm8k": ({"answer": "1 + 1 = 2\n#### 2"}, "2", "1 + 1 = 2\n#### 2"),
    "box": ({"answer": r"so $\boxed{\frac12}$"}, r"\frac12", r"so $\boxed{\frac12}$"),
    "solution": ({"solution": "text #### 7"}, "7", "text #### 7"),
    "plain": ({"answer": "7"}, "7", None),
    "unmarked solution": ({"solution": "long proof"}, None, "long proof"),
    "empty answer": ({"answer": "", "solution": r"\boxed{8}"}, "8", r"\boxed{8}"),
    "solution beside answer": ({"answer": "#### 3", "solution": "s"}, "3", "s"),
}


@pytest.mark.parametrize(
    ("columns", "answer", "solution"), REFERENCES.values(), ids=REFERENCES.keys()
)
def test_reference_answers(columns: dict[str, str], answer: str, solution: str) -> None:
    row = load_dataset([{"prompt": "p", **columns}])[0]
    assert (row.get("answer"), row.get("solution")) == (answer, solution)


FORMATS = {
    "GSM8K": ({"question": "q", "answer": "2*3=<<2*3=6>>6\n#### 6"}, "6"),
    "GSM8K thousands": ({"question": "q", "answer": "so\n#### 1,080"}, "1,080"),
    "MATH": ({"problem": "q", "solution": r"$x=\boxed{\frac{1}{2}}$", "level": "Level 5"},
             r"\frac{1}{2}"),
    "MATH-500": ({"problem": "q", "solution": r"\boxed{3}", "answer": "3", "level": 2}, "3"),
    "AIME 2024": ({"ID": "2024-I-1", "Problem": "q", "Solution": "...", "Answer": 204}, "204"),
    "AIME 2025": ({"problem": "q", "answer": "070", "id": 3}, "070"),
    "AIMO": ({"question": "q", "answer": 250}, "250"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "answer"), FORMATS.values(), ids=FORMATS.keys())
def test_rows_as_the_public_sets_have_them(row: dict[str, Any], answer: str) -> None:
    [loaded] = load_dataset([row])
    assert (loaded["prompt"], loaded["answer"]) == ("q", answer)
    assert check_golds([loaded]) == []
    assert set(row) <= set(loaded)


def test_missing_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval_dataset: .*nothing\.jsonl does not exist"):
        load_dataset(tmp_path / "nothing.jsonl", name="eval_dataset")
    with pytest.raises(DataError, match="is a folder"):
        load_dataset(tmp_path)


def test_unreadable_line_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(ROW), "{broken")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a JSON object"):
        load_dataset(path)
    with pytest.raises(DataError, match=r"b\.jsonl:1: got list"):
        load_dataset(write(tmp_path / "b.jsonl", "[1, 2]"))
    (tmp_path / "c.jsonl").write_bytes(b'{"problem": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: not UTF-8"):
        load_dataset(tmp_path / "c.jsonl")


def test_empty_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no rows in .*a\.jsonl"):
        load_dataset(write(tmp_path / "a.jsonl", ""))
    with pytest.raises(DataError, match="no rows in the list"):
        load_dataset([])


def test_missing_prompt_lists_columns_and_proposes() -> None:
    with pytest.raises(DataError, match=r"columns are problems, label.*Did you mean 'problem'"):
        load_dataset([{"problems": "x", "label": 1}])


@pytest.mark.parametrize("prompt", ["", "  ", 5, [], ["text"], [{"role": "user"}]])
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(DataError, match=r"train_dataset\[0\]\.prompt"):
        load_dataset([{"prompt": prompt}])


def test_half_a_surrogate_pair_is_no_text() -> None:
    for prompt in ("a\ud800b", [{"role": "user", "content": "a\ud800b"}]):
        with pytest.raises(
            DataError, match=r"\[1\]\.prompt: half of a surrogate pair at character 1"
        ):
            load_dataset([{"prompt": "a"}, {"prompt": prompt}])


def test_a_missing_value_of_a_table_is_no_answer() -> None:
    rows = load_dataset([{"prompt": "a", "answer": float("nan")}, {"prompt": "b", "answer": 2.5}])
    assert [row["answer"] for row in rows] == [None, "2.5"]
    with pytest.raises(DataError, match=r"1 of 2 rows have none \(rows 0"):
        require_column(rows, "answer", needed_by="evaluation")
    [row] = load_dataset([{"prompt": "a", "answer": float("nan"), "solution": "#### 7"}])
    assert row["answer"] == "7"


@pytest.mark.parametrize("source", [{"train": [ROW]}, 5, None])
def test_bad_sources(source: Any) -> None:
    with pytest.raises(DataError, match="allowed is a JSONL path"):
        load_dataset(source)


def test_require_column() -> None:
    rows = load_dataset([ROW, ROW])
    require_column(rows, "answer", needed_by="exact")
    with pytest.raises(DataError, match=r"exact needs a column 'answers'.*'answer'"):
        require_column(rows, "answers", needed_by="exact")
    rows[1]["answer"] = None
    with pytest.raises(DataError, match=r"1 of 2 rows have none \(rows 1"):
        require_column(rows, "answer", needed_by="exact")


def test_check_golds_lists_the_unreadable() -> None:
    rows = [{"answer": "5"}, {"answer": r"\foo"}, {}]
    first, second = check_golds(rows)
    assert first.startswith("row 1: answer '\\\\foo' cannot be read: unknown command")
    assert "row 2" in second
    assert "no answer" in second

"""`equipoise tasks`: what it writes, prints and says when something is wrong."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from cluster.cli import main
from cluster.recipe.recipe import UserError
from cluster.tasks_cli import app
from tasks.datasets import read_manifest
from tasks.images import check_image
from tasks.load import load_task
from tasks.splits import split_of
from tests.support.shade import read_dataset

TEST = ["--split", "test"]
SMALL = ["--train", "8", "--test", "3", "--set", "size=4", "--set", "blanks=6"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def good(*arguments: str | Path) -> str:
    result = run(*arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def error(*arguments: str | Path) -> str:
    """The message that the command line prints without a traceback."""
    result = run(*arguments)
    assert isinstance(result.exception, UserError), result.exception
    return str(result.exception)


def test_generate_writes_a_data_set_and_says_what(tmp_path: Path) -> None:
    out = tmp_path / "data"
    text = good("generate", "sudoku", "--out", out, *SMALL, "--style", "verbose")
    assert "train: 8 problems" in text and "test: 3 problems" in text
    assert "8 right by the task's own checker" in text and f"wrote {out}" in text
    train, test = (read_dataset(out, split) for split in ("train", "test"))
    assert not {p.symmetry_key for p in train} & {p.symmetry_key for p in test}
    assert {p.perception.count("-") for p in train + test} == {6}

    entry = read_manifest(out)["splits"]["train"]
    rows = pq.read_table(out / "train.parquet").to_pylist()
    parse = load_task("sudoku").parse
    spans = [parse(row["response"]).spans["perception"] for row in rows]
    share = sum(end - start for start, end in spans) / sum(len(r["response"]) for r in rows)
    assert entry["perception_chars"] / entry["response_chars"] == share
    assert f"perception is {share:.1%} of their characters" in text


def test_the_manifests_command_draws_the_same_data(tmp_path: Path) -> None:
    good("generate", "sudoku", "--out", tmp_path / "a", *SMALL, "--split", "train_rl=2")
    command = read_manifest(tmp_path / "a")["command"].split()
    assert command[:2] == ["equipoise", "tasks"]
    good(*command[2:], "--out", tmp_path / "b")
    for name in ("train.parquet", "test.parquet", "train_rl.parquet", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_show_a_row_and_save_its_image(tmp_path: Path) -> None:
    good("generate", "sudoku", "--out", tmp_path / "data", *SMALL)
    text = good("show", tmp_path / "data", "--row", "3", "--image", tmp_path / "x.png")
    problem = read_dataset(tmp_path / "data")[3]
    for part in (problem.id, problem.prompt, problem.perception, problem.symmetry_key):
        assert part in text
    assert "exact (graded 1.000)" in text and "right" in text and "defects       none" in text
    assert (tmp_path / "x.png").read_bytes() == problem.images[0]
    check_image((tmp_path / "x.png").read_bytes(), "x.png")


def test_show_several_images_and_none(tmp_path: Path) -> None:
    album = "tests.tasks.test_datasets:Album"
    good("generate", album, "--out", tmp_path / "data", "--train", "12", "--test", "4")
    rows = read_dataset(tmp_path / "data")
    for count in (0, 2):
        row = next(n for n, problem in enumerate(rows) if len(problem.images) == count)
        text = good("show", tmp_path / "data", "--row", str(row))
        assert text.count("image         4x4, ") == count
    good("show", tmp_path / "data", "--row", str(row), "--image", tmp_path / "x.png")
    saved = [(tmp_path / f"x-{n}.png").read_bytes() for n in (1, 2)]
    assert tuple(saved) == rows[row].images


def test_held_out_names_are_drawn_from_the_held_out_side_and_others_are_told(
    tmp_path: Path,
) -> None:
    out, more = tmp_path / "data", ["--split", "val=4", "--split", "HoldOut=2", "--split", "ood=4"]
    text = good("generate", "sudoku", "--out", out, *SMALL, *more)
    sides = {n: {split_of(p) for p in read_dataset(out, n)} for n in ("val", "HoldOut", "ood")}
    assert sides == {"val": {"test"}, "HoldOut": {"test"}, "ood": {"train"}}
    lines = text.splitlines()
    (told,) = (line for line in lines if "taken as" in line)
    assert told == "  taken as training data: its name says neither train nor test, val, dev, ..."
    assert lines[lines.index(told) - 1].startswith("ood: 4 problems")


def test_show_prints_what_is_stored_and_asks_the_teacher_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_teacher(*_: object) -> str:
        raise NotImplementedError

    good("generate", "sudoku", "--out", tmp_path / "data", *SMALL, "--style", "none")
    assert "[response]" in good("show", tmp_path / "data", "--style", "terse")
    monkeypatch.setattr("tasks.sudoku.Sudoku.demonstrate", no_teacher)
    text = good("show", tmp_path / "data")
    assert "[p*]" in text and "[response]" not in text


@pytest.mark.parametrize("coding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_a_character_shows_its_escape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coding: str
) -> None:
    good("generate", "sudoku", "--out", tmp_path / "data", *SMALL)
    file = tmp_path / "data" / "train.parquet"
    table = pq.read_table(file)
    asked = pa.array(["Löse → 解"] * table.num_rows)
    pq.write_table(table.set_column(table.schema.get_field_index("query"), "query", asked), file)
    (tmp_path / "data" / "manifest.json").unlink()
    for arguments in (["show", str(file)], ["show", str(tmp_path / "→ 解")]):
        shown = {name: io.TextIOWrapper(io.BytesIO(), coding) for name in ("stdout", "stderr")}
        for name, stream in shown.items():
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["equipoise", "tasks", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        text = ""
        for stream in shown.values():
            stream.flush()
            assert isinstance(stream.buffer, io.BytesIO)
            text += stream.buffer.getvalue().decode(coding)
        assert "\\u2192 \\u89e3" in text
        assert ended.value.code in (0, 2)


@pytest.mark.parametrize("task", ["sudoku", "graph_coloring"])
def test_show_draws_a_problem_of_a_task(task: str) -> None:
    first, again, other = (good("show", task, "--seed", s) for s in ("3", "3", "4"))
    assert first == again != other
    later, held_out = (good("show", task, "--seed", "3", *o) for o in (["--row", "1"], TEST))
    assert len({first, later, held_out}) == 3
    assert "exact (graded 1.000)" in first and "[p*]" in first


def test_hostile_text_cannot_steer_the_terminal(tmp_path: Path) -> None:
    good("generate", "sudoku", "--out", tmp_path / "data", *SMALL)
    file = tmp_path / "data" / "train.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[0]["query"] = rows[0]["response"] = "\x1b]0;owned\x07\x9b31m \u202e[bold]\r\x00"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    (tmp_path / "data" / "manifest.json").unlink()
    text = good("show", file)
    assert "\\x1b]0;owned\\x07\\x9b31m \\u202e[bold]\\r\\x00" in text
    assert all(c == "\n" or c.isprintable() for c in text)


def test_a_data_file_cannot_choose_what_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good("generate", "sudoku", "--out", tmp_path / "data", *SMALL)
    (tmp_path / "own_trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "data" / "train.parquet"
    table = pq.read_table(file)
    names = pa.array(["own_trap:Task"] * table.num_rows)
    pq.write_table(table.set_column(table.schema.get_field_index("task"), "task", names), file)
    (tmp_path / "data" / "manifest.json").unlink()
    assert "name its task with --task" in good("show", file)
    assert "exact (graded 1.000)" in good("show", file, "--task", "sudoku")


def test_import_then_show(tmp_path: Path) -> None:
    good("generate", "graph_coloring", "--out", tmp_path / "data", "--train", "4", "--test", "2")
    public = ["query", "image", "ground_truth", "response"]
    (tmp_path / "public").mkdir()
    for split in ("train", "test"):
        table = pq.read_table(tmp_path / "data" / f"{split}.parquet", columns=public)
        pq.write_table(table, tmp_path / "public" / f"{split}.parquet")
    assert "equipoise tasks import" in error("show", tmp_path / "public")
    text = good("import", "graph_coloring", tmp_path / "public", "--out", tmp_path / "mine")
    assert "train: 4 problems" in text and "4 right by the task's own checker" in text
    assert "exact (graded 1.000)" in good("show", tmp_path / "mine", "--split", "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "sudokku", "--out", "data"], 'did you mean "sudoku"'),
        (["generate", "sudoku", "--out", "data", "--set", "blnks=6"], "--set blnks: "),
        (["generate", "sudoku", "--out", "data", "--set", "blnks=6"], 'did you mean "blanks"'),
        (["generate", "sudoku", "--out", "data", "--set", "blanks=many"], "--set blanks: "),
        (["generate", "sudoku", "--out", "data", "--set", "blanks"], "--set blanks: "),
        (["generate", "sudoku", "--out", "data", "--train", "0", "--test", "0"], "nothing to draw"),
        (["generate", "sudoku", "--out", "data", "--split", "rl"], "--split rl: expected"),
        (["generate", "sudoku", "--out", "data", "--split", "a/b=1"], "split 'a/b'"),
        (["import", "sudoku", "nowhere", "--out", "data"], "nowhere: no such file"),
        (["show", "no/such"], "no/such: no such file or folder"),
    ],
)
def test_errors_name_the_field_and_write_nothing(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_errors_about_a_data_set(tmp_path: Path) -> None:
    out = tmp_path / "data"
    good("generate", "sudoku", "--out", out, *SMALL)
    assert "--force" in error("generate", "sudoku", "--out", out, *SMALL)
    good("generate", "sudoku", "--out", out, *SMALL, "--force", "--seed", "1")
    assert json.loads((out / "manifest.json").read_text())["seed"] == 1
    assert "--row 8: the split has fewer rows" in error("show", out, "--row", "8")
    assert "no split 'valid'" in error("show", out, "--split", "valid")
    assert "--set" in error("show", out, "--set", "size=4")

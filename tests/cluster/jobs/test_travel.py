"""What travels with a job: chosen, small, in its place; the rest named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cluster.jobs.packing import Packed, packed
from cluster.jobs.request import Request
from cluster.jobs.travel import ROOMS, ROOT, Luggage, below, inside
from cluster.recipe.recipe import UserError
from tests.support.recipes import SUDOKU, recipe_file
from tests.support.terminal import Equipoise

OWN_TERM = '[[reward.terms]]\nname = "{name}"\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user without a checkout."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(folder: Path, *places: str, text: str = "x = 1\n") -> None:
    for place in places:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)


def large(file: Path, mib: int) -> Path:
    """A file of that size that takes no room."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as made:
        made.truncate(mib * 2**20)
    return file


def pack(here: Path, *search: Path, recipe: str = "x.toml", **asked: object) -> Packed:
    request = Request(
        **{"name": "n", "command": "train", "recipe": recipe, "place": "", "output": "/o"} | asked  # type: ignore[arg-type]
    )
    return packed(request, here, list(map(str, search)))


def places(made: Packed) -> set[str]:
    """Of what travels, without Equipoise itself."""
    return {p for p in made.luggage.files if p.partition("/")[0] not in ROOMS}


def test_recipe_own_modules_what_lies_beside_them_and_small_data_travel_and_nothing_else(
    here: Path,
) -> None:
    write(here, "mine/score.py", "mine/beside.py", "mine/lib/__init__.py", "mine/lib/words.txt")
    write(here, "mine/lib/sub/deep.py", "mine/notes.txt", "mine/loose/no_package.py")
    write(
        here, "top.py", "sibling.py", "data/rows.jsonl", "data/images/a.png", "policy/config.json"
    )
    write(here, ".env", ".git/config", "runs/old/recipe.toml", "more/a.txt", "more/.hidden")
    write(here, "mine/__pycache__/score.pyc", "mine/lib/.secret", "policy/.cache/x")
    more = OWN_TERM.format(name="mine/score.py:f") + OWN_TERM.format(name="top:f")
    more += 'args = { words = "more", text = "of no file" }\n'
    task = '{ name = "vqa", data = "data/rows.jsonl" }'
    recipe_file(here, more, model="policy", tasks=task)
    assert places(pack(here, include=("runs/old/recipe.toml",))) == {
        *("x.toml", "policy/config.json", "data/rows.jsonl", "data/images/a.png", "more/a.txt"),
        *("mine/score.py", "mine/beside.py", "mine/lib/__init__.py", "mine/lib/words.txt"),
        *("mine/lib/sub/deep.py", "top.py", "sibling.py", "runs/old/recipe.toml"),
    }


def test_equipoise_itself_travels_whole_with_its_data(here: Path) -> None:
    recipe_file(here)
    files = pack(here).luggage.files
    for place in ("cluster/__main__.py", "tasks/digits.csv.gz", "cluster/record/metrics.toml"):
        assert files[place].samefile(ROOT / place)
    assert {p for p in files if p.endswith(".pyc")} == set()


def test_what_travels_of_a_folder_is_all_but_hidden_files_and_caches(tmp_path: Path) -> None:
    """Against a walk of its own over random trees, with links among them that go round."""
    rng = np.random.default_rng(5)
    for case in range(20):
        top = tmp_path / str(case)
        names = ["a", "b", ".c", "__pycache__", "d.py", ".gitignore"]
        for _ in range(12):
            parts = rng.choice(names[:4], size=rng.integers(0, 4)).tolist()
            write(top, "/".join([*parts, f"{rng.integers(9)}{rng.choice(names[4:])}"]))
        (top / "around").symlink_to(top)
        walked = {
            os.path.relpath(os.path.join(folder, file), top)
            for folder, _, files in os.walk(top)
            for file in files
        }
        plain = {
            path
            for path in walked
            if not any(part[0] == "." or part == "__pycache__" for part in path.split("/"))
        }
        found = dict(below(top))
        assert set(found) == plain
        assert all(found[place].samefile(top / place) for place in found)


def test_a_file_a_folder_and_the_sum_that_are_too_large_are_refused_with_their_size(
    here: Path,
) -> None:
    large(here / "policy" / "model.safetensors", 65)
    recipe_file(here, model="policy")
    said = r"x.toml: model.path: .*policy: 65 MiB, and 64 MiB travel .* absolute path there, or its"
    with pytest.raises(UserError, match=said):
        pack(here)
    assert "policy/model.safetensors" in places(pack(here, settings=("job.travel_mib=80",)))
    large(here / "one.bin", 40)
    large(here / "two" / "half.bin", 41)
    recipe_file(here)
    assert pack(here, include=("one.bin",)).luggage.size < 64 * 2**20
    with pytest.raises(UserError, match=r"job.travel_mib: got 64, .*: two 41 MiB, one.bin 40 MiB"):
        pack(here, include=("one.bin", "two"))


@pytest.mark.parametrize("model", ["/on/the/cluster", "~/m", "$SCRATCH_OF_NONE/m", "s3://b/m"])
def test_absolute_paths_and_uris_stay_as_they_are_even_where_something_is_here(
    here: Path, model: str
) -> None:
    recipe_file(here, model=str(here) if model.startswith("/") else model)
    made = pack(here)
    assert places(made) == {"x.toml"}
    (note,) = made.luggage.notes
    why = "each node fetches it" if "://" in model else "it must be there on the cluster"
    assert "model.path" in note and note.endswith(f": stays; {why}")


def test_what_is_not_here_is_a_name_on_the_hub_or_refused(here: Path) -> None:
    recipe_file(here, model="Owner/name-2.5")
    (note,) = pack(here).luggage.notes
    assert "Owner/name-2.5: not here, so the job asks the hub" in note
    recipe_file(here, model="models/mine/step-10")
    with pytest.raises(UserError, match=r"model.path: models/mine/step-10: no such file or folder"):
        pack(here)
    with pytest.raises(UserError, match="--include gone: no such file or folder"):
        recipe_file(here)
        pack(here, include=("gone",))


def test_a_path_out_of_the_working_folder_is_refused(here: Path) -> None:
    write(here.parent, "outside/config.json")
    recipe_file(here, model="../outside")
    with pytest.raises(UserError, match=r"model.path: \.\./outside: lies outside of the folder"):
        pack(here)
    for name in ("..", "a/../../b", "/etc/passwd"):
        with pytest.raises(UserError, match="lies outside"):
            inside("--include x", name)
    assert inside("", "a/./b/../c") == "a/c" and inside("", "..a") == "..a"


def test_a_recipe_of_another_folder_lies_in_the_jobs_own(here: Path, tmp_path: Path) -> None:
    file = recipe_file(tmp_path)
    made = pack(here, recipe=str(file))
    assert made.request.place == "x.toml" and made.luggage.files["x.toml"] == file
    assert made.words() == "python -m cluster train x.toml --output /o"


def test_modules_on_the_path_lie_where_the_job_finds_them_and_installed_ones_stay(
    here: Path, tmp_path: Path
) -> None:
    write(tmp_path, "src/far.py", "src/near/__init__.py", "src/plain.txt")
    names = ("far:f", "numpy.linalg:norm", "json:loads", "tasks.sudoku:Sudoku", "nowhere:f")
    recipe_file(here, "".join(OWN_TERM.format(name=name) for name in names))
    made = pack(here, tmp_path / "src", *map(Path, __import__("sys").path))
    assert places(made) == {"x.toml", "far.py", "near/__init__.py"}
    assert [note for note in made.luggage.notes if "numpy.linalg: is installed here" in note]


def test_two_files_for_one_place_are_refused(here: Path, tmp_path: Path) -> None:
    write(here, "a.txt")
    luggage = Luggage(1)
    luggage.add("one", here / "a.txt", "a.txt")
    luggage.add("the same", here / "a.txt", "./a.txt")
    write(tmp_path, "a.txt", text="other")
    with pytest.raises(UserError, match=r"two: .*would lie where .* at a.txt"):
        luggage.add("two", tmp_path / "a.txt", "a.txt")


def write_study(here: Path) -> None:
    """An ablation, its base in another folder, and an arm with a term of its own."""
    write(here, "policy/config.json", "other.py")
    write(here, "study/over/a.toml", text='question = "?"\nbase = "../base.toml"\nseeds = [1, 2]\n'
        'budget = { kind = "updates", amount = 1 }\n[[arms]]\nname = "plain"\n[[arms]]\n'
        'name = "own"\nset = { "reward.terms" = [{ name = "other.py:f" }] }\n')  # fmt: skip
    recipe_file(here, model="policy").rename(here / "study" / "base.toml")


def test_an_ablation_takes_its_base_and_what_any_cell_needs(here: Path) -> None:
    write_study(here)
    made = pack(here, recipe="study/over/a.toml", command="ablate", name="")
    wanted = {"study/over/a.toml", "study/base.toml", "policy/config.json", "other.py"}
    assert places(made) == wanted
    with pytest.raises(UserError, match=r"base: .*lies outside"):
        pack(here / "study" / "over", recipe="a.toml", command="ablate")


def test_an_ablation_is_known_by_itself_and_its_job_runs_and_goes_on_as_one(
    here: Path, equipoise: Equipoise
) -> None:
    write_study(here)
    words = ("study/over/a.toml", "--output", "/o/a", "--name", "n", "--dry-run")
    code, said, _ = equipoise("submit", *words)
    assert code == 0
    assert "job n: python -m cluster ablate study/over/a.toml --output /o/a\n" in said
    assert all(f"travels: {file} (" in said for file in ("study/base.toml", "other.py"))
    assert equipoise("submit", *words, "--command", "train").code == 2
    code, _, said = equipoise("submit", *words, "--set", "seed=1")
    assert code == 2 and "of an ablation its own file says what is set" in said
    again = pack(here, recipe="study/over/a.toml", command="ablate").again()
    assert again.request.id == "n.2"
    assert again.words() == "python -m cluster ablate study/over/a.toml --output /o"


def test_a_dry_run_lists_all_of_it_and_asks_nobody(
    here: Path, monkeypatch: pytest.MonkeyPatch, equipoise: Equipoise
) -> None:
    write(here, "a b.txt")
    recipe_file(here, tasks=SUDOKU)
    monkeypatch.setenv("WANTED", "the-value")
    words = ("--include", "a b.txt", "--env", "WANTED", "--output", "/o/it's", "--dry-run")
    code, said, _ = equipoise("submit", "x.toml", *words, "--name", "n")
    assert code == 0
    assert "travels: a b.txt (6 bytes)\n" in said and "variables: WANTED\n" in said
    assert """job n: python -m cluster train x.toml --output '/o/it'"'"'s'\n""" in said
    assert "the-value" not in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--dry-run",), "x.toml: output.folder: runs: is relative, and a job's working folder"),
        (("--output", "r", "--dry-run"), "--output: r: is relative"),
        (("--output", "/o", "--name", "a b"), "--name a b: use at most 120 letters"),
        (("--output", "/o"), "--address: give that of the cluster's dashboard"),
        (("--output", "/o", "--address", "head:6379"), "--address head:6379: expected the address"),
        (("--output", "/o", "--address", "http://127.0.0.1:9"), "127.0.0.1:9: nobody answers"),
        (("--output", "/o", "--env", "MY_API_KEY"), "--env MY_API_KEY: has the name of a key"),
        (("--output", "/o", "--env", "NOT_SET_AT_ALL"), "--env NOT_SET_AT_ALL: is not set here"),
        (("--set", "job.env=['HF_TOKEN']"), "x.toml: job.env[0]: HF_TOKEN has the name of a key"),
        (
            ("--set", "job.runtime_env.working_dir='.'"),
            "x.toml: job.runtime_env.working_dir: is made of what travels; name files in",
        ),
        (
            ("--set", "job.runtime_env.env_vars={ A = 1 }"),
            "x.toml: job.runtime_env.env_vars: expected a table of text",
        ),
    ],
)
def test_what_cannot_be_submitted_is_one_line_before_anyone_is_asked(
    here: Path,
    words: tuple[str, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    equipoise: Equipoise,
) -> None:
    recipe_file(here)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    code, _, said = equipoise("submit", "x.toml", *words)
    assert code == 2 and line in said and len(said.splitlines()) == 1

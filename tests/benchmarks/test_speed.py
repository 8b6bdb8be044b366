"""Records of speed from made-up numbers, and the tables that pages have of them."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import results_page, speed
from benchmarks.cells import Results
from simplest_vit.commands import ENVIRONMENT
from simplest_vit.errors import UserError

COMMIT = "0123456789abcdef"
PAGE = "docs/x.md"


@pytest.fixture(autouse=True)
def _committed(monkeypatch):
    monkeypatch.setattr(speed, "_commit", lambda: COMMIT)
    monkeypatch.setattr("sys.argv", ["/x/benchmarks/checkpoint.py", "--config=a b"])


def recorder(record, **settings):
    return speed.Recorder(record, device="1 x H200", **settings)


def filled():
    """A table of two rows, in each form that a number has."""
    record = recorder("steps")
    record.add("step", 63.84, "ms", row="ours", spread=(63.0, 64.256))
    record.add("images/s", 32095.4, row="ours")
    record.add("error", 2.1e-7, row="ours", note="TF32")
    record.add("step", "> 300", "ms", row="theirs")
    record.add("error", "", row="theirs", spread=(0.5, 1))
    return record


TABLE = """\
|[1 x H200](../results/speed.csv?plain=1#L2-L6)|step, ms|images/s|error|
|---|---|---|---|
|ours|63.84 (63 to 64.26)|32,095|2.1e-07 (TF32)|
|theirs|> 300||0.5 to 1|"""


def page(table="steps", body=""):
    return f"# A\n<!-- speed: {table} -->\n{body}<!-- speed: end -->\nafter `90 %`\n"


def test_numbers_are_written_and_read_and_stand_in_a_page(tmp_path):
    path = tmp_path / "speed.csv"
    record = filled()
    record.write(path)
    found = speed.read(path)
    assert found == record.numbers
    first = found[0]
    assert (first.table, first.row, first.column, first.unit) == ("steps", "ours", "step", "ms")
    assert (first.value, first.low, first.high) == ("63.84", "63", "64.26")
    assert (first.device, first.commit, first.source) == ("1 x H200", COMMIT[:7], "run")
    assert first.command == "python -m benchmarks.checkpoint '--config=a b'"
    text = results_page.fill(page(body="old\n"), Results([]), PAGE, found)
    assert text == page(body=TABLE + "\n")
    assert results_page.fill(text, Results([]), PAGE, found) == text


def test_rows_of_several_devices_have_them_in_a_column():
    first, *_, last = filled().numbers
    numbers = {2: first, 3: dataclasses.replace(last, device="1 x H100")}
    lines = results_page.measured(numbers, "README.md").splitlines()
    assert lines[0] == "|[records](results/speed.csv?plain=1#L2-L3)|step, ms|error|device|"
    assert lines[2:] == ["|ours|63.84 (63 to 64.26)||1 x H200|", "|theirs||0.5 to 1|1 x H100|"]


def test_a_number_that_no_run_has_recorded_is_marked():
    first, *_, last = (dataclasses.replace(number, source="docs/x.md@0123456") for number in filled().numbers)
    assert results_page.measured({2: first, 3: last}, "README.md").startswith("|[1 x H200, converted](")
    lines = results_page.measured({2: first, 3: dataclasses.replace(last, source="run")}, "README.md").splitlines()
    assert [line.split("|")[-2] for line in lines[2:]] == ["1 x H200, converted", "1 x H200"]


def test_every_recorded_number_names_its_device_and_commit():
    assert all(number.device and number.commit for number in speed.read())


def test_a_row_is_replaced_where_it_stands_and_a_new_one_follows_in_its_table(tmp_path):
    path = tmp_path / "speed.csv"
    filled().write(path)
    other = recorder("attention:a: b", one_row=True)
    other.add("step", 1)
    other.write(path)
    again = recorder("steps:ours", one_row=True)
    again.add("step", 5, "ms")
    again.add("step", 7, "ms", row="new")
    again.write(path)
    found = [(number.table, number.row, number.column, number.value) for number in speed.read(path)]
    assert found == [
        ("attention", "a: b", "step", "1"),
        ("steps", "ours", "step", "5"),
        ("steps", "theirs", "step", "> 300"),
        ("steps", "theirs", "error", ""),
        ("steps", "new", "step", "7"),
    ]


def test_without_the_flag_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_commit", lambda: None)
    record = recorder(None, one_row=True)
    record.add("step", 1.0)
    record.write(tmp_path / "speed.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("record", "one_row", "expected"),
    [
        ("steps", True, "--record=steps: expected --record=TABLE:ROW"),
        ("steps:", True, "--record=steps:: expected --record=TABLE:ROW"),
        ("steps:ours", False, "--record=steps:ours: expected --record=TABLE"),
        ("", False, "--record=: expected --record=TABLE"),
        ("a table", False, "expected --record=TABLE"),
    ],
)
def test_the_flag_names_a_table_and_the_row_of_a_program_with_one(record, one_row, expected):
    with pytest.raises(UserError, match=expected):
        recorder(record, one_row=one_row)


def test_uncommitted_code_is_refused_and_records_and_pages_are_no_code(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(speed, "PATH", tmp_path / "results" / "speed.csv")
    monkeypatch.setattr(speed, "environment", lambda: {"commit": COMMIT + "+"})
    for name in ("results/speed.csv", "docs/page.md", "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    for words in (("init", "-q"), ("add", "."), ("-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "results" / "speed.csv").write_text("new")
    (tmp_path / "docs" / "page.md").write_text("new")
    assert recorder("steps").table == "steps"
    (tmp_path / "code.py").write_text("new")
    with pytest.raises(UserError, match=rf"--record=steps: made by uncommitted code \(commit {COMMIT}\+\); commit it"):
        recorder("steps")
    (tmp_path / "code.py").write_text("old")
    monkeypatch.setattr(speed, "environment", lambda: {"commit": None})
    with pytest.raises(UserError, match=r"commit unknown"):
        recorder("steps")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("steps,ours,step,many,,,,ms,d,c,0123456,run", "line 2: no record .*many"),
        ("steps,ours,step,,,,,ms,d,c,0123456,run", "line 2: no record"),
        ("steps,ours,step,1,0.5,x,,ms,d,c,0123456,run", "line 2: no record .*'x'"),
        ("steps,ours,step", "line 2: no record"),
        ("steps,ours,step,1,,,,ms,d,c,0123456,run,more", "line 2: no record"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, row, message):
    path = tmp_path / "speed.csv"
    path.write_text(f"{','.join(speed.FIELDS)}\n{row}\n")
    with pytest.raises(UserError, match=message):
        speed.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (page("nothing"), f"{PAGE}: unknown block nothing; expected one of steps"),
        ("It takes 63.8 ms.", "'63.8 ms' is outside the generated blocks"),
        ("It uses 15.3\nGB.", "is outside"),
        ("5 to 9 % slower", "'9 %' is outside"),
        ("It is 1.5 times as fast.", "'1.5 times' is outside"),
        ("96,000 images/s", "'96,000 images/s' is outside"),
    ],
)
def test_a_number_that_no_record_vouches_for_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        results_page.fill(text, Results([]), PAGE, filled().numbers)


@pytest.mark.parametrize("text", ["`--minutes 3 s`", "```\n5 ms\n```", "12 blocks of 384, 90 epochs", "at 1e-5 steps"])
def test_a_setting_and_the_output_of_a_command_are_no_measured_numbers(text):
    assert results_page.fill(text, Results([]), PAGE) == text


def test_the_records_of_the_repository_are_whole_and_each_table_has_its_page(tmp_path):
    found = speed.read()
    speed.write(speed.merge([], found), tmp_path / "speed.csv")
    assert (tmp_path / "speed.csv").read_text() == speed.PATH.read_text()
    assert len({(number.table, number.row, number.column) for number in found}) == len(found)
    assert all(number.source == "run" or number.source.endswith(".md@5e7fa11") for number in found)
    assert all(number.device and number.commit and number.command for number in found if number.source == "run")
    pages = "".join((results_page.ROOT / name).read_text() for name in results_page.PAGES)
    for table in {number.table for number in found}:
        assert pages.count(f"<!-- speed: {table} -->") == 1


def test_a_benchmark_runs_in_the_environment_of_the_commands():
    program = (
        "import os; from benchmarks import speed; "
        "speed.run(lambda: print(os.environ['MALLOC_ARENA_MAX'], os.environ['OPENBLAS_NUM_THREADS']), '', required=())"
    )
    own = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | {"OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, cwd=pathlib.Path(__file__).parents[2], env=own, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout.split()) == (0, [ENVIRONMENT["MALLOC_ARENA_MAX"], "2"])

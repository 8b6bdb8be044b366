"""The pages from made-up records, whose means, intervals and verdicts are known."""

import dataclasses

import pytest

from benchmarks import records, results_figure, results_page, speed, verdict
from benchmarks.cells import Results, compare, difference_text
from benchmarks.protocols import NETWORKS
from simplest_vit.errors import UserError

NAMES = ("isometric", "SimpleViT")
FRESH = (11, 12, 13, 14, 15)


def row(name="isometric", accuracy=0.7, seed=11, **fields):
    network = NETWORKS[name]
    on_hold_out = {"train_split": "train[:45000]"} if fields.get("validation_split") else {}
    record = records.Record(
        protocol="small",
        data="cifar10",
        network=network.preset,
        changes=records.changes_text(network.fields),
        optimizer="soap",
        learning_rate=2e-3,
        seed=seed,
        steps=1500,
        train_split="train",
        validation_split="",
        selected_on="hold-out",
        validation_accuracy=accuracy,
        train_loss=1.0,
        accuracy_at={},
        train_loss_at={},
        step_time_s=0.5,
        device="1 x cpu",
        commit="0123456",
        source="runs/x",
    )
    return dataclasses.replace(record, **on_hold_out | fields)


def rows(name, *accuracies, **fields):
    return [row(name, accuracy, seed, **fields) for seed, accuracy in zip(FRESH, accuracies, strict=False)]


def cell(name, *accuracies):
    return Results(rows(name, *accuracies)).find(NETWORKS[name])


def test_a_cell_is_mean_deviation_and_seeds_with_the_lines_of_its_records():
    found = Results([row("SimpleViT"), *rows("isometric", 0.70, 0.72, 0.74)]).find(NETWORKS["isometric"])
    assert found.text("RESULTS.md") == "[72.0±2.0 (3)](results/runs.csv?plain=1#L3-L5)"
    assert cell("isometric", 0.8755).text("docs/isometric.md") == "[87.6](../results/runs.csv?plain=1#L2)"


def test_runs_on_other_images_are_not_in_tables():
    others = rows("isometric", 0.9, 0.9, validation_split="test[:100]") + rows(
        "isometric", 0.9, train_split="train[:9]"
    )
    assert Results([*others, row(accuracy=0.7)]).find(NETWORKS["isometric"]).mean == pytest.approx(70)
    assert Results(others).find(NETWORKS["isometric"]) is None


def test_recorded_runs_come_before_old_pages_then_most_seeds_then_the_best_rate():
    page = rows("isometric", 0.9, 0.9, 0.9, source="RESULTS.md@884f800: x")
    one = [row(accuracy=0.8, learning_rate=4e-3)]
    two = rows("isometric", 0.6, 0.6)
    better = rows("isometric", 0.7, 0.7, learning_rate=1e-3)
    hold_out = rows("isometric", 0.95, validation_split="train[45000:]")
    results = Results([*page, *one, *two, *better, *hold_out])
    assert results.find(NETWORKS["isometric"]).mean == pytest.approx(70)
    assert results.find(NETWORKS["isometric"], hold_out=True).mean == pytest.approx(95)
    assert Results(page).find(NETWORKS["isometric"]).text("x").startswith("[90.0±0.0 (3)†]")
    assert results.find(NETWORKS["isometric"], steps=500) is None
    first = Results(page).find(NETWORKS["isometric"])
    assert results.find(NETWORKS["isometric"], like=first).mean == pytest.approx(90)


def test_differences_are_over_common_seeds_with_the_wider_interval():
    ours, theirs = cell("isometric", 0.70, 0.72, 0.74), cell("SimpleViT", 0.69, 0.70, 0.71)
    mean, (paired, welch) = compare(ours, theirs)
    assert mean == pytest.approx(2)
    assert paired.half_width == pytest.approx(4.302653 / 3**0.5)  # differences of 1, 2 and 3
    assert welch.half_width > paired.half_width
    assert difference_text(ours, theirs) == f"+2.0±{welch.half_width:.1f}"
    assert difference_text(ours, cell("SimpleViT", 0.71)) == "-1.0"
    assert difference_text(ours, None) == ""
    other_seed = Results([row("SimpleViT", 0.7, seed=1)]).find(NETWORKS["SimpleViT"])
    assert compare(ours, other_seed) == (pytest.approx(2), [])
    page = Results(rows("SimpleViT", 0.69, 0.70, 0.71, source="RESULTS.md@884f800: x")).find(NETWORKS["SimpleViT"])
    assert compare(ours, page) is None


def judged(*found):
    return verdict.sentence(verdict.criteria(Results([record for part in found for record in part])))


OURS = rows("isometric", 0.72, 0.721, 0.722, 0.723, 0.724)
THEIRS = rows("SimpleViT", 0.69, 0.691, 0.692, 0.692, 0.694)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((OURS,), "open"),
        ((OURS, rows("isometric, attention frozen", 0.716)), "narrowed"),
        ((OURS, rows("isometric, attention frozen", 0.714)), "open"),
        ((OURS, rows("isometric + skip", 0.74, 0.74, 0.74)), "refuted"),
        ((OURS, rows("isometric + skip", 0.74, 0.74)), "open"),
        ((OURS, rows("SimpleViT, constant shifts", 0.718, 0.718, 0.718)), "refuted"),
        ((OURS, rows("SimpleViT, shifts", 0.712, 0.712, 0.713)), "refuted"),
    ],
)
def test_the_verdict_follows_the_criteria(found, expected):
    assert judged(*found).startswith(f"**Verdict: {expected}.**")


def test_short_runs_on_the_hold_out_are_shown_but_decide_nothing():
    def short(name, *accuracies):
        return rows(name, *accuracies, steps=500, validation_split="train[45000:]")

    found = [*short("isometric", 0.6, 0.6, 0.6), *short("isometric + skip", 0.62, 0.62, 0.62)]
    criterion = verdict.criteria(Results(found))[0]
    assert (criterion.found, criterion.holds) == ("+2.0 (CIFAR-10, 3 seeds, 500 steps on the hold-out)", None)
    found += [*OURS, *rows("isometric + skip", 0.72, 0.72, 0.72)]
    assert verdict.criteria(Results(found))[0].found.endswith("(CIFAR-10, 3 seeds)")


def both(*found):
    """The same on both data sets."""
    everything = [record for part in found for record in part]
    return [*everything, *(dataclasses.replace(record, data="cifar100") for record in everything)]


LONGER = rows("isometric, attention frozen", 0.72, 0.721, 0.722, 0.723, 0.724, steps=2700)


def test_a_lead_off_zero_with_everything_measured_is_a_proof_and_one_within_noise_is_not():
    measured = (
        *(rows(name, *[0.70] * 3) for name in ("isometric + LayerNorm", "isometric, attention frozen")),
        *(rows(name, *[0.68] * 3) for name in ("SimpleViT, constant shifts", "SimpleViT, shifts")),
        rows("SimpleViT, constant shifts", *[0.68] * 5, steps=1900),
        LONGER,
    )
    assert judged(both(OURS, THEIRS, *measured)).startswith("**Verdict: proven.**")
    assert judged(both(OURS, rows("SimpleViT", 0.6, 0.9, 0.6, 0.7, 0.75), *measured)).startswith("**Verdict: not shown")
    assert judged(both(OURS, THEIRS[:3], *measured)).startswith("**Verdict: open.** 2 of 6")
    assert judged(both(OURS, THEIRS, *measured[:-1])).startswith("**Verdict: open.** 1 of 6")
    level = [dataclasses.replace(record, data="cifar100") for record in rows("SimpleViT", 0.6, 0.9, 0.6, 0.7, 0.75)]
    one_of_two = [record for record in both(OURS, THEIRS, *measured) if record not in both(THEIRS)[5:]]
    assert judged(one_of_two, level).startswith("**Verdict: not shown")


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ((), ("+3.0 (CIFAR-10, 5 seeds), +3.0 (CIFAR-100, 5 seeds)", None)),  # a control is missing
        ((rows("SimpleViT, constant shifts", *[0.711, 0.712] * 2, 0.711, steps=1900),), ("+1.1 (", True)),
        ((rows("SimpleViT, constant shifts", *[0.713, 0.714] * 2, 0.713, steps=1900),), ("+0.9 (", False)),
        ((rows("SimpleViT, constant shifts", 0.711, steps=1900),), ("+0.9 (CIFAR-10, 1 seed)", None)),
        ((rows("SimpleViT, constant shifts", *[0.8] * 5),), ("+3.0 (", None)),  # of another number of steps
        ((rows("SimpleViT, constant shifts", 0.6, steps=1900),), ("+3.0 (", True)),
    ],
)
def test_in_equal_time_the_best_networks_meet(others, expected):
    criterion = verdict.criteria(Results(both(THEIRS, LONGER, *others)))[-1]
    assert criterion.found.startswith(expected[0])
    assert criterion.holds is expected[1]


def test_a_page_keeps_its_text_and_gets_its_blocks():
    results = Results(both(OURS, THEIRS))
    text = "# A\n<!-- results: headline -->\nold\n<!-- results: end -->\nafter\n"
    filled = results_page.fill(text, results, "RESULTS.md")
    assert filled.startswith("# A\n<!-- results: headline -->\n||isometric|")
    assert filled.endswith("|\n<!-- results: end -->\nafter\n")
    assert "[72.2±0.2 (5)](results/runs.csv?plain=1#L2-L6)|not run|[69.2±0.1 (5)]" in filled
    assert "old" not in filled
    assert results_page.fill(filled, results, "RESULTS.md") == filled


def test_equal_time_takes_each_network_at_its_own_steps():
    shifts = "shift MLP"
    found = Results([*rows("SimpleViT", 0.69, 0.69), *rows(shifts, 0.9), *rows(shifts, 0.76, 0.76, steps=2700)])
    lines = results_page.equal_time(found, "RESULTS.md").splitlines()
    assert lines[2].startswith("|SimpleViT|1,500|[69.0±0.0 (2)]")
    assert lines[3].startswith(f"|{shifts}|2,700|[76.0±0.0 (2)]")
    assert lines[3].endswith("|+7.0±0.0|not run||")
    short = results_page.summary(found, "README.md").splitlines()
    assert short[2] == f"|{shifts}|2,700|[76.0±0.0 (2)](results/runs.csv?plain=1#L5-L6)|not run|"
    assert short[3] == "|SimpleViT, constant shifts|1,900|not run|not run|"
    assert short[4].startswith("|SimpleViT|1,500|[69.0±0.0 (2)]")


def test_an_idea_is_compared_on_the_hold_out_with_its_own_optimizer():
    short = {"steps": 500, "validation_split": "train[45000:]"}
    found = Results(
        [
            *rows("isometric", 0.60, 0.60, **short),
            *rows("isometric", 0.9),
            *rows("isometric, shift_without_values", 0.58, 0.59, **short),
            *rows("isometric, pull 1", 0.61, optimizer="soap_near_isometry", **short),
            *rows("isometric, pull 10", 0.61, **short),
        ]
    )
    lines = [line.split("|")[1:-1] for line in results_page.replaced(found, "RESULTS.md").splitlines()[2:]]
    assert [(row, cell[1:5], difference) for row, cell, _, difference in lines] == [
        ("isometric", "60.0", ""),
        ("isometric, shift_without_values", "58.5", "-1.5±6.4"),
        ("isometric, pull 1", "61.0", "+1.0"),
    ]


def test_long_and_deep_runs_are_found_by_their_protocol_and_steps():
    strong = {"protocol": "small, strong augmentation", "steps": 7812}
    deep = "shift MLP, 64 blocks"
    found = Results(
        [
            *rows("SimpleViT", 0.70, **strong),
            *rows("SimpleViT", 0.9, steps=7812),
            *rows("shift MLP", 0.72, **strong),
            *rows(deep, 0.40, steps=500, validation_split="train[45000:]"),
            *rows(deep, 0.62, steps=900, validation_split="train[45000:]"),
            *rows("SimpleViT, 64 blocks", 0.49, steps=500),
        ]
    )
    lines = results_page.long(found, "RESULTS.md").splitlines()[2:]
    assert [line.split("|")[2][1:5] for line in lines[1:]] == ["72.0", "70.0"]
    assert lines[1].endswith("|+2.0|")
    assert lines[2].endswith("||")
    lines = results_page.depth_equal_time(found, "RESULTS.md").splitlines()[2:]
    assert lines[0].startswith("|SimpleViT, 64 blocks|500|not run|[49.0](")
    assert lines[1].startswith(f"|{deep}|900|[62.0](")
    assert lines[1].endswith("|not run|")


def test_an_old_run_is_compared_with_old_runs_as_long_as_there_are_any():
    old = both(
        rows("isometric", 0.7, source="RESULTS.md@884f800: x"), rows("SimpleViT", 0.6, source="RESULTS.md@884f800: x")
    )
    found = Results(
        [*old, *rows("SimpleViT", 0.69, 0.69, data="cifar100"), *rows("isometric + skip", 0.5, data="cifar100")]
    )
    (line,) = (line for line in results_page.headline(found, "RESULTS.md").splitlines() if "CIFAR-100" in line)
    assert [part[:6] for part in line.split("|")[2:5]] == ["[70.0†", "not ru", "[60.0†"]
    assert "|+10.0|" in line
    (line,) = (line for line in results_page.controls(found, "RESULTS.md").splitlines() if "|isometric + skip|" in line)
    assert line.endswith("|[50.0](results/runs.csv?plain=1#L8)||")


def test_the_figure_has_the_seeds_of_equal_time_and_of_each_optimizer():
    adam = [dataclasses.replace(record, optimizer="adam") for record in rows("isometric", 0.6, 0.61)]
    longer = rows("shift MLP", 0.76, 0.77, steps=2700)
    figure = results_figure.draw(Results([*rows("isometric", 0.7), *adam, *longer, *rows("SimpleViT", 0.69)]))
    seeds = [(*line.get_xdata().round(), *line.get_ydata()) for line in figure.axes[0].lines]
    assert seeds == [(1, 70), (2, 2, 60, 61), (0, 0, 76, 77), (0, 69), (1, 69)]
    assert "white" not in [line.get_markerfacecolor() for line in figure.axes[0].lines]
    figure = results_figure.draw(Results(rows("isometric", 0.7, source="RESULTS.md@884f800: x")))
    assert [line.get_markerfacecolor() for line in figure.axes[0].lines] == ["white"], "of an old page"


def test_the_headline_has_the_larger_p_value_by_holm_over_all_tests():
    theirs = rows("SimpleViT", 0.70, 0.73, 0.68, 0.74, 0.66)

    def last(found):
        return [line.split("|")[-2] for line in results_page.headline(Results(found), "RESULTS.md").splitlines()[2:]]

    largest = max(test.p for test in compare(*(Results([*OURS, *theirs]).find(NETWORKS[n]) for n in NAMES))[1])
    assert last([*OURS, *theirs]) == [f"{largest:.3f}"]
    assert last(both(OURS, theirs)) == [f"{min(1, 2 * largest):.3f}"] * 2
    assert last([*OURS, *THEIRS]) == ["<0.001"]
    assert last(OURS) == [""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: nothing -->\n<!-- results: end -->", "unknown block nothing; expected one of verdict"),
        ("It has 71.7 % there.", "'71.7 %' is outside the generated blocks"),
        ("It is 3 points ahead.", "'3 points' is outside"),
    ],
)
def test_a_page_that_no_record_vouches_for_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        results_page.fill(text, Results([]), "RESULTS.md")


def test_check_writes_nothing_and_fails_until_the_page_is_made(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- results: width -->\n<!-- results: end -->\n")
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    monkeypatch.setattr(results_page, "PAGES", ("page.md",))
    monkeypatch.setattr("sys.argv", ["results_page", "--check"])
    with pytest.raises(SystemExit, match="2"):
        results_page.main()
    assert "page.md does not match results/*.csv" in capsys.readouterr().err
    assert len(page.read_text().splitlines()) == 2
    monkeypatch.setattr("sys.argv", ["results_page"])
    results_page.main()
    assert "isometric" in page.read_text()
    monkeypatch.setattr("sys.argv", ["results_page", "--check"])
    results_page.main()


def test_the_pages_of_the_repository_say_what_the_records_give():
    results, numbers = Results(records.read()), speed.read()
    for page in results_page.PAGES:
        text = (results_page.ROOT / page).read_text()
        assert results_page.fill(text, results, page, numbers) == text, "run python -m benchmarks.results_page"

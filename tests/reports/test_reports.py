"""The reports as data: everything that they name exists, nothing stands twice."""

import pytest

from fastcnn.archs import NETWORKS
from fastcnn.recipes import recipe_options, resolve
from fastcnn.reports.catalogue import REPORTS, reports_table, rows_table

FIGURES = {"bars", "curves", "losses", "panels", "histogram"}
EXPERIMENTS = [(report, one) for report in REPORTS.values() for one in report.experiments]
IDS = [f"{report.key}-{one.key}" for report, one in EXPERIMENTS]

# the figures as the reports print them, typed once more by hand: top-1, top-5
PRINTED = {
    "marie2019 table1": [59.3, 52.9, 33.3, 94.3, 91.1, 76.9],
    "marie2019 full": [72.1, 97.7],
    "murgolo table1": [60.92, 66.60, 62.10, 61.55, 60.65, 62.48],
    "skagerstrom2018 table3": [17, 22, 6, 29, 25, 24, 37, 45, 20, 55, 50, 48],
    "mao2022 structure": [69.32, 71.46, 70.18, 70.03, 71.99, 73.58, 74.87],
    "mao2022 training": [74.87, 72.36, 73.91, 74.79],
}


def test_the_five_reports_and_their_experiments():
    assert {key: [one.key for one in report.experiments] for key, report in REPORTS.items()} == {
        "marie2019": ["table1", "full", "figure2"],
        "murgolo": ["table1", "ood"],
        "skagerstrom2018": ["table3"],
        "mao2022": ["structure", "training"],
        "bohnstedt2019": ["vgg"],
    }


@pytest.mark.parametrize(("report", "one"), EXPERIMENTS, ids=IDS)
def test_an_experiment_names_what_exists(report, one):
    keys = [row.key for row in one.rows]
    assert len(set(keys)) == len(keys)
    assert set(one.figures) <= FIGURES
    assert set(one.modern) <= set(NETWORKS)
    for claim in one.claims:
        assert {claim.better, claim.worse} <= set(keys)
    for row in one.rows:
        config = resolve(dict(row.options))
        network = NETWORKS[config.model.arch]
        assert network.report == report.key
        assert config.run.recipe == "report"
        recipe = recipe_options(network, "report", report.data)
        # a row says only what its recipe does not
        assert all(recipe.get(name) != value for name, value in row.options.items())


@pytest.mark.parametrize(("report", "one"), EXPERIMENTS, ids=IDS)
def test_one_key_is_one_run(report, one):
    by_key = {row.key: row.options for other in report.experiments for row in other.rows}
    assert all(by_key[row.key] == row.options for row in one.rows)


@pytest.mark.parametrize(("report", "one"), EXPERIMENTS, ids=IDS)
def test_published_figures_are_the_printed_ones(report, one):
    published = [row.published for row in one.rows if row.published and not row.reading]
    found = [p.top1 for p in published] + [p.top5 for p in published]
    expected = PRINTED.get(f"{report.key} {one.key}")
    if expected:
        assert [number for number in found if number is not None] == expected
    for p in published:
        for number, span in ((p.top1, p.top1_range), (p.top5, p.top5_range)):
            if number is not None and span is not None:
                assert span[0] < number < span[1]


def test_a_second_reading_is_held_against_the_same_figures():
    for _, one in EXPERIMENTS:
        literal = {row.options["arch"]: row.published for row in one.rows if not row.reading}
        for row in one.rows:
            if row.reading:
                assert row.published == literal[row.options["arch"]]


def test_the_list_has_every_experiment_and_row():
    assert [row[:2] for row in reports_table().rows] == [
        (report.key, one.key) for report, one in EXPERIMENTS
    ]
    report = REPORTS["marie2019"]
    table = rows_table(report, report.experiments)
    assert table.rows[0][:5] == ("table1", "table1-cnn-a", "CNN A", "cnn-a", "5")
    assert table.rows[0][5:] == ("59.3 (54.9 to 62.6)", "94.3 (93.9 to 95)")

"""The tables of an ablation in Markdown: cells, columns, and the order and figures of the paper."""

from __future__ import annotations

from typing import Any

import pytest

from train.config import Config
from train.methods import METHODS
from train.report.markdown import Results, spread, table, usage
from train.report.paper import DATASETS, TABLES, dataset_of

GROUPS = ("overall", "many", "medium", "few")
CONFIG = Config().replace(data="somewhere/file.npz")


def counts(dataset: str) -> list[int]:
    """Return training counts with the number, sum and extremes of a dataset of the paper."""
    (key,) = (key for key, name in DATASETS.items() if name == dataset)
    classes, samples, largest, smallest = key
    each, rest = divmod(samples - largest - smallest, classes - 2)
    return [largest, *([each + 1] * rest), *([each] * (classes - 2 - rest)), smallest]


def result(method: str, accuracy: float = 0.5, images: int = 7, **more: Any) -> dict[str, Any]:
    return {"method": method, "images": images, "accuracy": dict.fromkeys(GROUPS, accuracy), **more}


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_cells() -> None:
    assert spread([0.5, 0.6]) == "55.0 ± 7.1"
    assert spread([0.5]) == "50.0"
    assert spread([0.5, None]) == spread([]) == "–"
    assert usage([{"slot_usage": [0.75, 0.25]}, {"slot_usage": [0.25, 0.75]}]) == "50 / 50"
    assert usage([{"slot_usage": [1.0]}, {}]) == ""


def test_equal_image_passes_are_in_the_caption_and_others_in_a_column() -> None:
    text = table({"": {0: [result("plain"), result("gist", 0.25, 7)]}}, CONFIG)
    assert "data file.npz, split rule standard; 7 image passes." in text
    assert lines_of(text) == [
        "| | overall | many | medium | few |",
        "| plain softmax | 50.0 | 50.0 | 50.0 | 50.0 |",
        "| GistNet (COS+CS+GIST) | 25.0 | 25.0 | 25.0 | 25.0 |",
    ]
    text = table({"": {0: [result("plain"), result("gist", 0.25, 1234, slot_usage=[0.5, 0.5])]}}, CONFIG)
    assert "split rule standard." in text
    assert lines_of(text) == [
        "| | overall | many | medium | few | slot usage, % | image passes |",
        "| plain softmax | 50.0 | 50.0 | 50.0 | 50.0 |  | 7 |",
        "| GistNet (COS+CS+GIST) | 25.0 | 25.0 | 25.0 | 25.0 | 50 / 50 | 1,234 |",
    ]


def test_other_scores_follow_in_a_table_of_their_own() -> None:
    scores = {"both heads": dict.fromkeys(GROUPS, 0.75)}
    runs: Results = {
        "": {
            0: [result("gist", accuracy_of=scores), result("plain")],
            1: [result("gist", accuracy_of=scores), result("plain")],
        }
    }
    text = table(runs, CONFIG)
    both_tables = text.partition("Other scores of the same models:")
    assert [len(lines_of(part)) for part in (both_tables[0], both_tables[2])] == [3, 2]
    assert lines_of(both_tables[2])[-1] == (
        "| GistNet (COS+CS+GIST): both heads | 75.0 ± 0.0 | 75.0 ± 0.0 | 75.0 ± 0.0 | 75.0 ± 0.0 |"
    )


def test_a_row_names_its_seeds_if_other_rows_have_more() -> None:
    runs: Results = {
        "": {0: [result("plain"), result("gist")], 1: [result("plain")]},
        "lr=0.1": {1: [result("plain")]},
    }
    titles = [line.split(" | ")[0] for line in lines_of(table(runs, CONFIG))[1:]]
    assert titles == [
        "| plain softmax",
        "| GistNet (COS+CS+GIST), seeds 0 only",
        "| plain softmax, lr=0.1, seeds 1 only",
    ]


@pytest.mark.parametrize("name", DATASETS.values())
def test_a_dataset_of_the_paper_is_known_by_its_training_counts(name: str) -> None:
    data = counts(name)
    assert dataset_of(data) == dataset_of(data[::-1]) == name
    assert dataset_of(data[:-1]) is None
    assert dataset_of([data[0] - 1, *data[1:]]) is None
    assert dataset_of([]) is None


def test_the_papers_figures_stand_beside_its_rows_in_its_order() -> None:
    more = {"train_counts": counts("ImageNet-LT")}
    runs: Results = {
        "lr=0.2": {0: [result("plain", 0.1, **more)]},
        "": {0: [result(m, 0.4, **more) for m in ("gist", "cos-gist", "plain")]},
        "num-displacements=2": {0: [result("gist", 0.3, **more)]},
    }
    text = table(runs, CONFIG, TABLES[3])
    assert (
        "Paper: Table 3 of Liu et al., GistNet, ICCV 2021, for ImageNet-LT with ResNet-10 on its validation samples"
        in text
    )
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in lines_of(text)}
    assert rows.pop("") == ["overall", "many", "medium", "few", "paper |"]
    assert list(rows) == [
        "plain softmax",
        "COS+CB",
        "COS+CS+CB",
        "GistNet (COS+CS+GIST)",
        "COS+GIST",
        "w/v combined",
        "GistNet, rotation",
        "GistNet, MLP",
        "GistNet (COS+CS+GIST), m = 2",
        "plain softmax, lr=0.2",
    ]
    assert rows["GistNet (COS+CS+GIST)"] == ["40.0"] * 4 + ["43.5 / 54.8 / 41.0 / 21.4 |"]
    assert rows["plain softmax"] == ["40.0"] * 4 + ["25.1 |"]
    assert rows["COS+CB"] == ["–"] * 4 + ["37.6 / 49.4 / 34.8 / 14.7 |"]
    assert rows["GistNet (COS+CS+GIST), m = 2"] == ["30.0"] * 4 + [" |"]


def test_other_data_has_the_papers_order_without_its_figures() -> None:
    runs: Results = {"": {0: [result("gist"), result("plain", train_counts=[5, 3])]}}
    text = table(runs, CONFIG, TABLES[3])
    assert (
        "Paper: no figures, because the numbers of training samples per class are not those of ImageNet-LT, "
        "the data of its Table 3." in text
    )
    assert [line.split(" | ")[0] for line in lines_of(text)[1:]] == [
        "| plain softmax",
        "| GistNet (COS+CS+GIST)",
    ]


def notes_on_figures(table_number: int, train_counts: list[int] | None, config: Config) -> list[str]:
    more = {} if train_counts is None else {"train_counts": train_counts}
    text = table({"": {0: [result("gist", **more)]}}, config, TABLES[table_number])
    return [line for line in text.splitlines() if line.startswith("Paper: ")]


def test_a_table_without_the_papers_figures_names_the_reason() -> None:
    imagenet, places = counts("ImageNet-LT"), counts("Places-LT")
    held_out = [n - max(1, round(0.1 * n)) for n in imagenet]
    few = "Paper: no figures, because the numbers of training samples per class"
    assert notes_on_figures(1, held_out, CONFIG.replace(hold_out=0.1)) == [
        f"{few}, after --hold-out 0.1, are not those of ImageNet-LT or Places-LT, the data of its Table 1."
    ]
    both = CONFIG.replace(hold_out=0.1, hold_out_val=0.2)
    assert notes_on_figures(1, held_out, both)[0].startswith(
        f"{few}, after --hold-out 0.1 and --hold-out-val 0.2, are not"
    )
    assert notes_on_figures(2, held_out, CONFIG) == [
        f"{few} are not those of iNaturalist 2018, the data of its Table 2."
    ]
    assert notes_on_figures(3, places, CONFIG) == [
        "Paper: no figures for Places-LT: its Table 3 is of ImageNet-LT."
    ]
    assert notes_on_figures(3, None, CONFIG) == [
        "Paper: no figures, because the records, of an early version, have no numbers of training samples per class."
    ]
    (source,) = notes_on_figures(1, places, CONFIG)
    assert source.startswith(
        "Paper: Table 1 of Liu et al., GistNet, ICCV 2021, for Places-LT with ResNet-152"
    )


def test_the_papers_decoupling_stands_above_its_variants() -> None:
    more = {"train_counts": counts("Places-LT")}
    text = table({"": {0: [result(m, 0.4, **more) for m in ("gist", "lws", "ncm")]}}, CONFIG, TABLES[1])
    assert lines_of(text)[1:] == [
        "| Decoupling, one of the next four | – | – | – | – | 37.9 |",
        "| Decoupling, NCM | 40.0 | 40.0 | 40.0 | 40.0 |  |",
        "| Decoupling, LWS | 40.0 | 40.0 | 40.0 | 40.0 |  |",
        "| GistNet (COS+CS+GIST) | 40.0 | 40.0 | 40.0 | 40.0 | 39.6 / 42.5 / 40.8 / 32.1 |",
    ]
    text = table({"": {0: [result("ncm")]}}, CONFIG, TABLES[2])
    assert [line.split(" | ")[0] for line in lines_of(text)[1:]] == ["| Decoupling, NCM"]


@pytest.mark.parametrize("number", TABLES)
def test_the_rows_of_each_table(number: int) -> None:
    rows = TABLES[number].rows
    names = set(Config().options())
    for row in rows:
        assert row.shown_title()
        assert row.method is None or row.method in METHODS
        assert set(row.options) <= names
        for dataset, figures in row.figures.items():
            assert dataset in DATASETS.values()
            assert len(figures) in (1, 4)
            assert all(0 < figure < 100 for figure in figures)
    assert rows[0].method == {1: "plain", 2: "cb-focal", 3: "plain"}[number]
    titles = [row.shown_title() for row in rows]
    assert len(set(titles)) == len(titles)

"""``lentando report``: the page that it makes of the logs of real runs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from chromium import Page, chromium

from lentando.cli.app import run
from lentando.cli.report.logs import read_run, read_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two runs of one rank: one with local steps, and one without outer steps."""
    pytest.importorskip("torch")
    import torch

    import lentando.torch as lt

    folders = [tmp_path_factory.mktemp("runs") / name for name in ("local", "synchronous <1>")]
    lt.init()
    for folder, base in zip(folders, (lt.LocalSGD(), lt.AllReduce()), strict=True):
        model = torch.nn.Linear(2, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        period = 2 if base == lt.LocalSGD() else None
        optimizer = lt.DistributedOptimizer(sgd, model=model, base=base, period=period)
        log = optimizer.open_log(folder)
        for step in range(4):
            model(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
            log.write(loss=1.0 / (1 + step), with_consensus=True, **{"val/accuracy": 0.5})
    yield folders
    lt.shutdown()


def test_the_page_compares_runs_and_needs_nothing_from_elsewhere(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run(["report", *map(str, runs), "--output", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "synchronous &lt;1&gt;" in text
    assert "synchronous <1>" not in text
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert "val/accuracy against steps" in captions
    captions = [caption for caption in captions if "accuracy" not in caption]
    assert captions[:5] == [
        "loss against steps",
        "loss against time",
        "loss against communication",
        "period",
        "distance between the replicas",
    ]
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == len(captions) + 3
    for chart in charts:
        assert len(list(ET.fromstring(chart).iter())) > 20
    assert re.findall(r"(?:src|href)=\"(?!#)", re.sub(r"xmlns:xlink=\S+|xlink:href=\"#", "", text)) == []
    assert "@import" not in text
    assert "<script" not in text


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, str]]:
    """A browser, and the address of a page that compares a run of gossip with one of averages, on 4 ranks each."""
    folders = [tmp_path_factory.mktemp("pages") / name for name in ("gossip", "local")]
    for folder, gossip in zip(folders, (True, False), strict=True):
        sends = {"sends": [[[0, 1], [1, 0]], [[0, 2], [1, 3]]], "steps_until_repeated": 2} if gossip else {}
        lines = [
            {"step": step, "seconds": step / 2, "bytes_sent": 1e6 * step, "rounds": step, "waiting_seconds": 0.1}
            | {"loss": 1 / step, "consensus_distance": 0.1, "period": None if gossip else 4}
            | {f"compute_seconds_by_rank/{rank}": 0.1 * (rank + 1) for rank in range(4)}
            for step in range(1, 6)
        ]
        header = {"method": "DistributedOptimizer(" + "argument=value, " * 20 + ")", "ranks": 4, **sends}
        folder.mkdir()
        (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    with chromium() as page:
        assert run(["report", *map(str, folders)]) == 0
        yield page, (folders[0] / "report.html").as_uri()


FIGURES = """[...document.querySelectorAll("figure")].map(figure => {
    const box = figure.querySelector("svg").getBoundingClientRect()
    return {name: figure.innerText, x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height}
})"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_every_figure_on_a_phone_and_on_a_screen(
    pages: tuple[Page, str], width: int, scheme: str
) -> None:
    page, address = pages
    page.show(width, 800, scheme)
    page.open(address)
    assert page.errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    background = page.picture({"x": 0, "y": 0, "width": 2, "height": 2})[0, 0]
    assert background.mean() > 0.9 if scheme == "light" else background.mean() < 0.2
    figures = page.evaluate(FIGURES)
    assert len(figures) == 3 + 2 + 2 + 2
    assert {figure.pop("name") for figure in figures} >= {"who sends to whom, gossip", "who averages with whom, local"}
    for figure in figures:
        assert figure["width"] > 250
        picture = page.picture(figure)
        drawn = np.abs(picture - background).max(axis=-1)
        assert (drawn > 0.2).mean() > 0.01  # lines and text that contrast with the page
        assert (np.ptp(picture, axis=-1) > 0.3).mean() > 0.001  # and colour


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    r"""Not as TeX, of which $\none$ is an error; and those that begin with _ are part of the legend, too."""
    folders = [tmp_path / name for name in ("lr$\\none$<b>", "_second")]
    for folder in folders:
        folder.mkdir()
        line = {"step": 1, "seconds": 1, "bytes_sent": 1, "rounds": 1, "waiting_seconds": 0, "a$\\none$<b>": 1.0}
        header = {"method": "SlowMo()", "ranks": 2}
        (folder / "run.jsonl").write_text("".join(json.dumps(written) + "\n" for written in (header, line)))
    assert run(["report", *map(str, folders)]) == 0
    page = (folders[0] / "report.html").read_text()
    for name in ("lr$\\none$", "_second"):
        assert len(re.findall(f"<!-- {re.escape(name)}", page)) == 3  # as matplotlib notes what it has drawn as curves
    assert "$<b>" not in page


def test_runs_in_folders_of_one_name_have_different_names(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("torch/slowmo", "keras/slowmo")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "run.jsonl").write_text('{"method": "SlowMo()", "ranks": 2}\n{"step": 1, "bytes_sent": 0}\n')
    assert [read.name for read in read_runs(folders)] == ["torch/slowmo", "keras/slowmo"]
    assert [read.name for read in read_runs([*folders, folders[0]])] == ["torch/slowmo", "keras/slowmo", "torch/slowmo"]
    assert [read.name for read in read_runs(folders[:1])] == ["slowmo"]


def test_a_resumed_run_replaces_what_it_repeats_and_adds_up_its_bytes(tmp_path: Path) -> None:
    header = {"method": "SlowMo()", "ranks": 2}
    first = [{"step": step, "bytes_sent": 10 * step, "loss": float(step)} for step in (1, 2, 3)]
    second = [{"step": step, "bytes_sent": 10 * (step - 2), "loss": 10.0 * step} for step in (3, 4)]
    lines = [header, *first[:2], header, *second]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resumed = read_run(tmp_path)
    assert resumed.points("step", "loss") == ([1, 2, 3, 4], [1.0, 2.0, 30.0, 40.0])
    assert resumed.points("step", "bytes_sent") == ([1, 2, 3, 4], [10, 20, 30, 40])


def test_unknown_numbers_are_left_out(tmp_path: Path) -> None:
    lines = [{"method": "SlowMo()", "ranks": 1}, {"step": 1, "bytes_sent": 0, "loss": None}]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path).points("step", "loss") == ([], [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("[1]}", "is no log of a run"),
        ("{}\n", "is no log of a run"),
        ('{"method": "SlowMo()", "ranks": 1}\n', "contains no numbers yet"),
        ('{"method": "SlowMo()", "ranks": 2, "sends": [[[0, 2]]]}\n', "is no log of a run"),
    ],
)
def test_a_folder_without_a_log_is_refused(
    text: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "run.jsonl").write_text(text)
    assert run(["report", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err

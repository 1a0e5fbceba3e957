"""Traces keep to the Trace Event Format, of Perfetto and chrome://tracing, and the viewer of the latter reads them.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, as Perfetto's documentation
names it for JSON (https://perfetto.dev/docs/faq). Perfetto's own parser is a program that its package downloads when it
is first used, so it is not part of these tests.
"""

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, chromium
from launching import mpirun

from lentando.cli.app import run

PROGRAM = str(Path(__file__).parents[1] / "support" / "recorded_job.py")
RANKS = 3

Events = list[dict[str, Any]]

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "M": {"args": dict},
    "X": {"dur": (int, float)},
    "i": {"s": str},
    "b": {"cat": str, "id": str},
    "e": {"cat": str, "id": str},
    "s": {"cat": str, "id": str},
    "f": {"cat": str, "id": str, "bp": str},
}
"""The fields that an event of each phase must have, besides those of all events."""
OF_ALL = {"name": str, "ph": str, "pid": int, "tid": int, "ts": (int, float)}
METADATA = {"process_name": "name", "process_sort_index": "sort_index", "thread_name": "name"}
"""Events that name processes and threads, and the argument that each of them must have."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The traces of three ranks with asynchronous sums, outer steps and gossip, and the one that merges them."""
    folder: Path = tmp_path_factory.mktemp("timeline")
    environment = {"LENTANDO_TIMELINE": str(folder), "HOROVOD_TIMELINE_MARK_CYCLES": "1"}
    job = mpirun(RANKS, PROGRAM, environment=environment)
    assert job.status == 0, job.output
    assert run(["timeline", str(folder)]) == 0
    return sorted(folder.glob("*.json"))


def test_all_kinds_of_events_are_in_the_traces(files: list[Path]) -> None:
    assert len(files) == RANKS + 1
    assert {event["ph"] for file in files for event in json.loads(file.read_text())} == set(FIELDS)


def test_every_event_has_the_fields_of_its_phase(files: list[Path]) -> None:
    for file in files:
        for event in json.loads(file.read_text()):
            for name, kind in {**OF_ALL, **FIELDS[event["ph"]]}.items():
                assert isinstance(event[name], kind), event
                assert not isinstance(event[name], bool), event
            assert event.get("dur", 0) >= 0, event
            assert event.get("s", "g") in ("g", "p", "t"), event
            assert event.get("bp", "e") == "e", event
            if event["ph"] == "M":
                assert METADATA[event["name"]] in event["args"], event


def test_processes_and_threads_have_one_name_each(files: list[Path]) -> None:
    for file in files:
        events: Events = json.loads(file.read_text())
        names = Counter(
            (event["name"], event["pid"], event["tid"] if event["name"] == "thread_name" else None)
            for event in events
            if event["ph"] == "M"
        )
        assert set(names.values()) == {1}
        assert {("thread_name", event["pid"], event["tid"]) for event in events} <= set(names)
        assert {("process_name", event["pid"], None) for event in events} <= set(names)


def test_spans_of_a_thread_are_nested(files: list[Path]) -> None:
    """Two that overlap in part cannot be drawn."""
    for file in files:
        by_thread: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for event in json.loads(file.read_text()):
            if event["ph"] == "X":
                by_thread.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        for spans in by_thread.values():
            open_until: list[float] = []
            for began, ended in sorted(spans, key=lambda span: (span[0], -span[1])):
                while open_until and open_until[-1] <= began:
                    open_until.pop()
                assert not open_until or ended <= open_until[-1] + 1e-3
                open_until.append(ended)


def test_what_begins_ends_once(files: list[Path]) -> None:
    for file in files:
        open_now: Counter[tuple[Any, ...]] = Counter()
        for event in sorted(json.loads(file.read_text()), key=lambda event: event["ts"]):  # stable: as written
            if event["ph"] in "be":
                key = (event["pid"], event["cat"], event["id"], event["name"])
                open_now[key] += 1 if event["ph"] == "b" else -1
                assert open_now[key] in (0, 1), event
        assert set(open_now.values()) <= {0}


def test_events_of_the_merged_trace_are_in_order_and_arrows_bind_to_spans(files: list[Path]) -> None:
    merged: Events = json.loads(next(file for file in files if file.name == "merged.json").read_text())
    times = [event["ts"] for event in merged]
    assert times == sorted(times)
    spans = [event for event in merged if event["ph"] == "X"]
    starts, ends = (
        {(event["cat"], event["id"]): event for event in merged if event["ph"] == phase} for phase in ("s", "f")
    )
    assert starts
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(event["ph"] == "s" for event in merged) == sum(event["ph"] == "f" for event in merged)
    for key, start in starts.items():
        assert start["ts"] <= ends[key]["ts"]
        assert start["pid"] != ends[key]["pid"]
        for arrow in (start, ends[key]):
            place = {name: arrow[name] for name in ("pid", "tid")}
            assert any(
                place.items() <= span.items() and span["ts"] <= arrow["ts"] <= span["ts"] + span["dur"]
                for span in spans
            ), arrow


IMPORTED = """(() => {
    const options = new tr.importer.ImportOptions(), model = new tr.Model()
    options.shiftWorldToZero = false
    new tr.importer.Import(model, options).importTraces([trace])
    return {
        warnings: model.importWarnings.map(warning => warning.message),
        arrows: model.flowEvents.map(arrow => [arrow.startSlice, arrow.endSlice].map(slice => slice && slice.title)),
        spans: Object.fromEntries(Object.values(model.processes).map(process => [
            process.name, Object.values(process.threads).map(thread => thread.sliceGroup.length)])),
    }
})()"""


@pytest.fixture(scope="module")
def viewer() -> Iterator[Page]:
    """A browser that has loaded the importer of chrome://tracing, out of the file that PyTorch's profiler ships.

    The file is made for a Chrome that had custom elements of version 0. The importer needs none of them: its pieces are
    run one by one, and those that only draw may fail.
    """
    found = importlib.util.find_spec("torch_tb_profiler")
    if found is None or found.origin is None:
        pytest.skip("needs the viewer of chrome://tracing: pip install --no-deps torch-tb-profiler")
    text = (Path(found.origin).parent / "static" / "trace_viewer_full.html").read_text()
    begin = text.rindex("'use strict';", 0, text.index("this.tr=(function()"))
    pieces = re.split(r"(?='use strict';)", text[begin : text.rindex("</script>")])
    with chromium() as page:
        page.run("Polymer = function () {}; Polymer.Settings = {}; document.registerElement = () => function () {}")
        page.run("Object.defineProperty(document, 'currentScript', {get: () => ({ownerDocument: document})})")
        assert sum(map(page.run, pieces)) > len(pieces) / 2
        yield page


@pytest.mark.slow
def test_the_viewer_of_chrome_imports_all_files_without_a_warning(viewer: Page, files: list[Path]) -> None:
    for file in files:
        events: Events = json.loads(file.read_text())
        viewer.run(f"globalThis.trace = {json.dumps(file.read_text())}")
        found = viewer.evaluate(IMPORTED)
        assert found["warnings"] == []
        assert len(found["arrows"]) == sum(event["ph"] == "s" for event in events)
        assert all(start and end for start, end in found["arrows"])
        for rank in {event["pid"] for event in events}:
            spans = sum(event["ph"] == "X" and event["pid"] == rank for event in events)
            assert sum(found["spans"][f"rank {rank}"]) == spans


@pytest.mark.slow
def test_the_viewer_of_chrome_warns_of_a_trace_that_is_wrong(viewer: Page) -> None:
    wrong = [{"name": "end", "ph": "E", "pid": 0, "tid": 0, "ts": 1.0}]
    viewer.run(f"globalThis.trace = {json.dumps(json.dumps(wrong))}")
    assert viewer.evaluate(IMPORTED)["warnings"] != []

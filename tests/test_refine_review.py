"""The review page: what it keeps, what it refuses, and that it works in a browser."""

import json
import shutil
import threading
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from smidgen.errors import UserError
from smidgen.refine.folder import Finding
from smidgen.refine.review import Decisions, Item, application, serve

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
CLASSES = ("iv", "vi", "x")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def items(count: int = 5) -> list[Item]:
    found = [Finding(f"iv/{i}.png", "relabel", "iv", "vi", "vi with probability 0.97", {"a": 0.1 * i, "b": 0.9}) for i in range(count)]
    return [Item.of(finding) for finding in found]


def opened(path: str) -> Image.Image:
    return Image.new("L", (60, 40), 40 * int(path[3]))


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "review.jsonl"


def test_decisions_are_lines_and_the_last_one_counts(file):
    decisions = Decisions(file, items(), CLASSES)
    decisions.add({"path": "iv/1.png", "decision": "drop"})
    decisions.add({"path": "iv/2.png", "decision": "relabel", "label": "x"})
    decisions.add({"path": "iv/1.png", "decision": "keep"})
    decisions.add({"path": "iv/3.png", "decision": "drop"})
    decisions.add({"path": "iv/3.png", "decision": None})
    assert len(file.read_text().splitlines()) == 5
    again = Decisions(file, items(), CLASSES)
    assert again.made == decisions.made
    assert {path: (a.decision, a.label) for path, a in again.made.items()} == {"iv/1.png": ("keep", ""), "iv/2.png": ("relabel", "x")}
    file.write_text(file.read_text() + '{"path": "iv/4.png", "deci')  # the power went
    assert Decisions(file, items(), CLASSES).made == decisions.made


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "/etc/passwd", "decision": "drop"}, "about one of the images shown"),
        ({"path": "iv/1.png", "decision": "explode"}, "keep, relabel or drop"),
        ({"path": "iv/1.png", "decision": "relabel", "label": "../x"}, "no class"),
        ([1, 2], "about one of the images shown"),
    ],
)
def test_nonsense_is_not_written(file, row, message):
    decisions = Decisions(file, items(), CLASSES)
    with pytest.raises(UserError, match=message):
        decisions.add(row)
    assert not file.exists() and not decisions.made
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1: not a decision about these images"):
        Decisions(file, items(), CLASSES)


def test_what_the_page_asks_for(file):
    pytest.importorskip("httpx")
    from starlette.testclient import TestClient

    ended = []
    client = TestClient(application(Decisions(file, items(), CLASSES), opened, lambda: ended.append(True)), base_url="http://127.0.0.1")
    state = client.get("/state").json()
    assert state["classes"] == list(CLASSES) and [i["path"] for i in state["items"]][:2] == ["iv/0.png", "iv/1.png"]
    assert state["items"][2]["score"] == pytest.approx(0.2) and state["items"][2]["decided"] is None
    assert client.get("/image/3").content.startswith(b"\x89PNG") and client.get("/image/9").status_code == 404
    said = client.post("/decide", json={"path": "iv/1.png", "decision": "drop"})
    assert said.json() == {"decided": 1} and client.get("/state").json()["items"][1]["decided"]["decision"] == "drop"
    assert client.post("/decide", json={"path": "iv/7.png", "decision": "drop"}).status_code == 400
    assert client.post("/decide", content="{", headers={"content-type": "application/json"}).status_code == 400
    assert client.post("/decide", data={"path": "iv/1.png"}).status_code == 415, "a form of another site"
    assert client.post("/done", content="").status_code == 415 and not ended
    assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400, "a name of another site that leads here"
    client.post("/done", json={})
    assert ended == [True]


@pytest.fixture
def address(file):
    """The page, served until somebody finishes it."""
    said: list[str] = []
    thread = threading.Thread(target=serve, args=(Decisions(file, items(), CLASSES), opened, said.append), daemon=True)
    thread.start()
    for _ in range(200):
        if said:
            break
        time.sleep(0.05)
    yield said[0].split(": ")[1].split()[0], thread
    if thread.is_alive():
        asked = Request(said[0].split(": ")[1].split()[0] + "/done", b"{}", {"Content-Type": "application/json"})
        urlopen(asked).close()
    thread.join(10)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(file, address):
    """Three are relabelled by keyboard, the page is opened again, and knows."""
    playwright = pytest.importorskip("playwright.sync_api")
    url, thread = address
    with playwright.sync_playwright() as p:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1060, "height": 760})
        page.set_default_timeout(20_000)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)

        def shows(what: str, text: str) -> None:
            playwright.expect(page.locator(f"#{what}")).to_have_text(text, timeout=20_000)

        page.goto(url)
        shows("path", "iv/0.png")
        for i in range(3):
            page.keyboard.press("r")
            shows("count", f"{i + 1} of 5 decided")
        page.keyboard.press("d")
        shows("count", "4 of 5 decided")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("u")
        shows("count", "3 of 5 decided")
        page.reload()
        shows("count", "3 of 5 decided")
        shows("path", "iv/3.png")
        assert page.locator("#strip img.relabel").count() == 3 and page.locator("#strip img.here").count() == 1
        assert page.evaluate("[...document.images].every(i => !i.complete || i.naturalWidth > 0)")
        page.select_option("#classes", "x")
        shows("count", "4 of 5 decided")
        page.click("#finish")
        playwright.expect(page.locator("main")).to_contain_text("Done")
        browser.close()
    thread.join(10)
    assert not thread.is_alive() and not wrong
    made = Decisions(file, items(), CLASSES).made
    assert [(a.path, a.decision, a.label) for a in sorted(made.values(), key=lambda a: a.path)] == [
        *((f"iv/{i}.png", "relabel", "vi") for i in range(3)),
        ("iv/3.png", "relabel", "x"),
    ]

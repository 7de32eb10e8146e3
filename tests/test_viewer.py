"""The viewer's page: what its data and its policy let through, also in a real browser."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess

import pytest

from nanotoolrl.look.viewer import TEMPLATE, page_of

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RUN = "document.title = 'run'"
EVIL = f"</script><script>{RUN}</script><img src=x onerror=\"{RUN}\"><!--/*DATA*/ \ud800\u2028'unsafe-inline'"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="


def data_of(text):
    """Data of one rollout, with a text wherever one is shown and numbers that are not finite."""
    message = {"role": "assistant", "start": 0, "end": 2, "state": "call"}
    rollout = {
        "tokens": [0, 1],
        "mask": "01",
        "logprobs": [0.0, math.nan],
        "reward": 1,
        "advantage": math.inf,
    }
    rollout |= {"source": text, "verdicts": [text], "messages": [message, message | {"role": "system"}]}
    steps = [{"step": 1, "groups": [{"task": text, "rollouts": [rollout]}]}]
    named = {"title": text, "summary": [["run"], [text]], "sampled": text}
    run = {"name": text, "steps": steps, "vocabulary": {0: text, 1: "\x1b[31m"}}
    return named | {"figures": [{"title": text, "png": PIXEL}], "runs": [run]}


@pytest.fixture(scope="module")
def page():
    return page_of(TEMPLATE.read_text(encoding="utf-8"), data_of(EVIL))


def test_the_data_comes_back_as_it_was(page):
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in inside
    data = json.loads(inside, parse_constant=pytest.fail)
    assert data["title"] == EVIL.replace("\ud800", "?")
    (rollout,) = data["runs"][0]["steps"][0]["groups"][0]["rollouts"]
    assert rollout["logprobs"] == [0, None] and rollout["advantage"] is None


def test_the_policy_allows_the_page_itself_and_nothing_else(page):
    """The template's script and style run by their hashes, whoever edits them; it says first how it is
    encoded, and can be read in any encoding."""
    source = TEMPLATE.read_bytes()
    assert source.isascii() and source.index(b'<meta charset="utf-8">') < 1024
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    allowed = dict(one.strip().split(" ", 1) for one in policy.split(";"))
    hashes = {}
    for element in ("script", "style"):
        text = page.split(f"<{element}>")[1].split(f"</{element}>")[0]
        hashes[f"{element}-src"] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert allowed == {name: f"'sha256-{value}'" for name, value in hashes.items()} | {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert page.index("Content-Security-Policy") < page.index("<style>")


def looked_at(page, tmp_path):
    """(the page's elements after its self-test, what the browser's console said) in a real browser."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=9000 --dump-dom"
    )
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'home'}", f"{path.as_uri()}#selftest"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=300)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
def test_the_page_runs_under_its_policy(page, tmp_path):
    elements, console = looked_at(page, tmp_path)
    seen = json.loads(re.search(r'<pre id="selftest">(.*?)</pre>', elements)[1])
    assert console == "" and seen["errors"] == []
    assert (seen["steps"], seen["rollouts"], seen["images"], seen["scripts"]) == (1, 1, 1, 0)
    assert seen["shadings"] == 2, "trained tokens are shaded, numbers that are not finite are not"
    assert "<title>nanotoolrl report</title>" in elements, "hostile text was run"
    assert "advantage not finite" in elements and "title=" not in elements


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize(
    "injected",
    [
        f"<script>{RUN}</script>",
        f'<img src="data:," onerror="{RUN}">',
        f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
        '<img src="http://127.0.0.1:9/x.png">',
        '<link rel="stylesheet" href="http://127.0.0.1:9/x.css">',
        "<style>body { display: none; }</style>",
    ],
)
def test_what_gets_into_the_page_is_neither_run_nor_loaded(page, tmp_path, injected):
    """The second line of defence: markup that stands in the page itself."""
    elements, console = looked_at(page.replace('<div id="group">', f'{injected}<div id="group">'), tmp_path)
    assert "Content Security Policy" in console
    assert "<title>nanotoolrl report</title>" in elements and '<pre id="selftest">' in elements

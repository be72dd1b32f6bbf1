"""The docs site in a real browser: each page, no request to elsewhere, no error; figures, widgets, math, search."""
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

for needed in ("sphinx", "myst_nb", "pydata_sphinx_theme"): pytest.importorskip(needed, reason="needs the extra [docs]")
CHROMIUM = next((c for c in ("chromium", "chromium-browser", "google-chrome") if shutil.which(c)), None)
pytestmark = pytest.mark.slow
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
SHOTS = Path(__file__).parent/"artefacts"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]

# a chapter of another package: math, a FigureWidget, an Output widget, linked controls, a link, HTML from outside
GUEST = {"# Guest\n\nRecall is $r_k = \\frac{|A \\cap T|}{k}$, and see [the run engine](../core/17_run.ipynb).\n\n"
         "$$\\begin{aligned} a &= b^2 \\\\ c &= \\operatorname{argmax}_x f(x) \\end{aligned}$$\n\n"
         "> Wait for $5 or so.": "md",
         "n: int = 3  # points": "parameters",
         "import plotly.graph_objects as go\nimport ipywidgets as w\nimport numpy as np\nfrom opml_wb import log\n"
         "log.metric('points', n)": "",
         "#| echo: false\ngo.FigureWidget(data=[dict(type='scatter', y=np.arange(3.) ** 2, name='</script>')])": "",
         "out = w.Output()\nwith out: print('said inside')\n"
         "a, b = w.IntSlider(description='left'), w.IntText(description='right')\n"
         "w.jslink((a, 'value'), (b, 'value'))\nw.VBox([a, b, out])": "",
         "#| hide\nsecret = 'not for readers'": "",
         "from IPython.display import HTML, Math\nHTML('<img src=\"https://example.org/pixel.png\">')": "",
         "Math(r'\\sum_i x_i')": "",
         "HTML('<table class=\"dataframe\"><tr><td>kept</td></tr></table>')": ""}


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    "The guest's notebook."
    import nbformat
    v4 = nbformat.v4
    cells = [v4.new_markdown_cell(s) if kind == "md" else
             v4.new_code_cell(s, metadata={"tags": [kind]} if kind else {}) for s, kind in GUEST.items()]
    path = tmp_path_factory.mktemp("guest")/"guest.ipynb"
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


BUILD = """import sys
from pathlib import Path
from opml_wb.core import chapter, docs
ours, guest = docs.chapters, Path(sys.argv[1])
docs.chapters = lambda: [*ours(), chapter.Chapter('guest', guest)]
sys.exit(docs.docs.main(sys.argv[2:], standalone_mode=False) or 0)"""


@pytest.fixture(scope="module")
def build(tmp_path_factory, guest):
    "build(*options) -> CompletedProcess of `opml docs` with the guest among the chapters, in a home of this module."
    home = tmp_path_factory.mktemp("home")
    def call(*options):
        env = {**os.environ, "OPML_HOME": str(home)}
        return subprocess.run([sys.executable, "-c", BUILD, str(guest), *map(str, options)], env=env, cwd=ROOT,
                              capture_output=True, text=True, timeout=900)
    call.home = home
    return call


@pytest.fixture(scope="module")
def site(build, tmp_path_factory):
    "The folder of the built site."
    out = tmp_path_factory.mktemp("site")/"docs"
    done = build("--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def web(site):
    "The site's address."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *what): pass
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra [dev]")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "A page whose requests off this machine are cut; `page.faults` collects those, its errors, and what was not found."
    context = browser.new_context(viewport=dict(width=1280, height=1000))
    page = context.new_page()
    page.faults = []
    def gate(route):
        if re.match(r"(https?://127\.0\.0\.1[:/]|file:|data:|blob:)", route.request.url): return route.continue_()
        page.faults.append(f"outside: {route.request.url}")
        route.abort()
    page.route("**/*", gate)
    page.on("pageerror", lambda e: page.faults.append(f"page error: {e}"))
    page.on("response", lambda r: r.status >= 400 and page.faults.append(f"{r.status}: {r.url}"))
    page.on("console", lambda m: m.type == "error" and page.faults.append(f"console: {m.text}"))
    yield page
    context.close()


def drawn(page): page.wait_for_selector("html[data-opml=drawn]", timeout=30_000)


def shot(page, name):
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS/f"docs-{name}.png", full_page=True)


# texts of tables, widgets and outputs that can hardly be read on what lies behind them: [contrast, text]
CONTRAST = """() => {
  const rgba = s => { const n = (s.match(/[\\d.]+/g) ?? []).map(Number)
    return s.startsWith('color(') ? [...n.slice(0, 3).map(x => x * 255), n[3] ?? 1] : n }
  const light = c => [.2126, .7152, .0722].reduce((sum, w, i) => { const v = c[i] / 255
    return sum + w * (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4) }, 0)
  const ground = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor)
    if (c.length < 4 ? c.length : c[3] > .5) return c } return [255, 255, 255] }
  const words = '.opml td, .opml th, .dataframe td, .dataframe th, .widget-label, .widget-readout, pre'
  return [...document.querySelectorAll(words)]
    .filter(e => e.innerText.trim() && e.offsetParent).map(e => {
      const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x)
      return [(a + .05) / (b + .05), e.innerText.slice(0, 40)] }).filter(([ratio]) => ratio < 3) }"""


def figures(notebook):
    "How many plotly figures an executed notebook shows."
    outputs = [o for c in json.loads(notebook.read_text())["cells"] for o in c.get("outputs", ())]
    return sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in outputs)


@browser_only
def test_every_page_is_whole(site, web, page):
    "No outside request, no page error, nothing missing, on any page; and none is heavy."
    pages = sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)
    assert len(pages) > 25
    for p in pages:
        assert p.stat().st_size < 2_000_000, f"{p.relative_to(site)}: {p.stat().st_size / 1e6:.1f} MB"
        page.goto(f"{web}/{p.relative_to(site)}", wait_until="load")
        if "opml.js" in p.read_text(): drawn(page)
    assert page.faults == []


@browser_only
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_chapter_shows_figures_widget_and_how_to_run(site, build, web, browser, page, theme):
    from opml_wb.core.store import Store
    home = Store(build.home)
    for p in sorted((site/"chapters").glob("*.html")):
        if p.stem == "index" or not (run := next(iter(home.ls(1, p.stem)), None)): continue
        page.emulate_media(color_scheme=theme)
        page.goto(f"{web}/chapters/{p.name}", wait_until="load")
        drawn(page)
        shown = page.locator(".opml-fig .main-svg")
        assert page.locator(".opml-fig").count() >= figures(Path(run["notebook"])) and shown.count() > 0
        for box in page.locator(".opml-fig").all(): assert box.bounding_box()["height"] > 100
        assert page.locator(".opml-widget .widget-slider").count() > 0
        assert f"opml run {p.stem}" in page.locator(".opml-bar").inner_text()
        assert f"opml lab {p.stem}" in page.locator(".opml-hint").first.inner_text()
        with page.expect_download() as got: page.locator(".opml-bar a.download").click()
        assert json.loads(Path(got.value.path()).read_text())["nbformat"] == 4
        shot(page, f"{p.stem}-{theme}")
        assert page.evaluate(CONTRAST) == []
        dark = page.evaluate("document.documentElement.dataset.theme")
        assert dark == theme
    assert page.faults == []


@browser_only
def test_sliders_move(web, page):
    page.goto(f"{web}/chapters/riann.html")
    drawn(page)
    handle = page.locator(".opml-widget .noUi-handle").first
    before = page.locator(".opml-widget .widget-readout").first.inner_text()
    handle.focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    assert int(page.locator(".opml-widget .widget-readout").first.inner_text()) == int(before) + 3
    assert page.faults == []


@browser_only
def test_math_output_widgets_and_figure_widgets_of_a_guest(site, web, page):
    page.goto(f"{web}/chapters/guest.html")
    drawn(page)
    page.wait_for_selector("mjx-container svg")
    assert page.locator("mjx-container").count() == 3 and "$" not in page.locator("mjx-container").first.inner_text()
    assert page.locator("[data-mml-node=merror]").count() == 0
    assert page.locator(".opml-fig .scatterlayer .point").count() == 3             # the FigureWidget, as a figure
    assert page.locator(".opml-widget").inner_text().count("said inside") == 1      # the Output widget
    left = page.locator(".opml-widget .noUi-handle")
    left.focus()
    for _ in range(4): page.keyboard.press("ArrowRight")
    assert page.locator(".opml-widget input[type=number]").input_value() == "4"     # linked in the browser
    text = page.locator("article").inner_text()
    assert "echo: false" not in text and "not for readers" not in text and "kept" in text
    page.get_by_role("link", name="the run engine").click()
    page.wait_for_url("**/api/core/run.html")
    assert page.faults == []


@browser_only
@pytest.mark.parametrize("how", ["served", "from the disk"])
def test_search_finds(site, web, page, how):
    base = web if how == "served" else site.as_uri()
    page.goto(f"{base}/search.html?q=DynamicHNSW")
    page.get_by_text("Search finished").wait_for(timeout=15_000)
    found = page.locator("#search-results ul.search li a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    for wanted in ("api/riann/graph.html", "chapters/riann.html"): assert any(wanted in href for href in found), found
    if how == "served": shot(page, "search")
    else: page.faults.clear()                # there the browser refuses Sphinx the excerpts below the hits, and says so
    page.goto(f"{base}/chapters/riann.html")
    drawn(page)
    assert page.locator(".opml-fig .main-svg").count() > 0 and page.locator(".opml-widget .widget-slider").count() == 3
    assert page.faults == []


@browser_only
def test_home_and_api(web, page):
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.goto(f"{web}/index.html")
        assert page.get_by_role("link", name="riann", exact=True).first.get_attribute("href") == "chapters/riann.html"
        assert "indexing speed-up over default HNSW" in page.locator("article").inner_text()
        shot(page, f"home-{theme}")
        assert page.evaluate(CONTRAST) == []
        page.goto(f"{web}/api/riann/graph.html")
        signature = page.locator("dt#opml_wb\\.riann\\.graph\\.DynamicHNSW\\.insert")
        assert "deg" in signature.inner_text() and "raises" not in signature.inner_text()
        fold = page.locator("details:has(summary:has-text('DynamicHNSW'))").first
        assert not fold.locator("pre").is_visible()
        fold.locator("summary").click()
        assert "class DynamicHNSW" in fold.locator("pre").inner_text()
        shot(page, f"api-{theme}")
        page.goto(f"{web}/publish.html")
        shot(page, f"publish-{theme}")
    assert page.faults == []


def test_a_second_build_executes_nothing(site, build):
    import sqlite3
    def runs(): return sqlite3.connect(build.home/"opml.db").execute("select count(*) from run").fetchone()[0]
    before, was = runs(), (site/"chapters"/"riann.html").read_text()
    done = build("--out", site)
    assert done.returncode == 0, done.stderr
    assert runs() == before and "riann: unchanged, from the store" in done.stdout
    assert (site/"chapters"/"riann.html").read_text() == was


def test_a_failing_chapter_or_a_stranger_leaves_the_site_alone(site, build, guest, tmp_path):
    was, source = (site/"index.html").read_text(), guest.read_text()
    try:
        guest.write_text(source.replace("log.metric('points', n)", "1 / 0"))
        done = build("--out", site)
        assert done.returncode == 1 and "guest failed (ZeroDivisionError" in done.stderr and "--no-run" in done.stderr
        guest.write_text(source.replace("the run engine](../core/17_run.ipynb)", "nowhere](nowhere.md)"))
        done = build("--out", site, "--no-run")
        assert done.returncode == 1 and "nowhere.md" in done.stderr and "Sphinx found" in done.stderr
    finally: guest.write_text(source)
    assert (site/"index.html").read_text() == was
    (tmp_path/"thesis.tex").write_text("do not lose me")
    done = build("--out", tmp_path)
    assert done.returncode == 1 and "opml docs --out DIR" in done.stderr and (tmp_path/"thesis.tex").exists()


def test_from_a_wheel(tmp_path):
    "Without a clone the sources come from inside the package, and the site goes into the home."
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT/"opml_wb", tmp_path/"opml_wb", ignore=ignore)
    for carried, folder in (("_nbs", "nbs"), ("_chapters", "nbs/chapters"), ("_bench", "nbs/bench"), ("_data", "data")):
        shutil.copytree(ROOT/folder, tmp_path/"opml_wb"/carried, ignore=ignore)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OPML_HOME": str(tmp_path/"home")}
    code = "from opml_wb.core.docs import docs; raise SystemExit(docs.main(['--no-run'], standalone_mode=False) or 0)"
    def opml_docs():
        return subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    done = opml_docs()
    assert done.returncode == 0, done.stderr
    assert "not run yet" in (tmp_path/"home"/"docs"/"chapters"/"riann.html").read_text()
    shutil.rmtree(tmp_path/"opml_wb"/"_nbs")
    done = opml_docs()
    assert done.returncode == 1 and "from a clone" in done.stderr


def test_a_missing_extra_says_what_to_install(monkeypatch):
    from opml_wb.core import docs
    monkeypatch.setattr(docs, "NEEDED", {"no_such_package_here": "myst-nb"})
    with pytest.raises(docs.DocsError, match=r"myst-nb: pip install 'opml_wb\[docs\]'"): docs.check()

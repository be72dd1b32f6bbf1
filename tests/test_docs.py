"""The docs site in a real browser: each page, no request to elsewhere, no error; figures, widgets, math, search."""
import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin

import house
import pages
import pytest
from conftest import BEGAN, ROOT
from figures import CHROMIUM, ready, strangers
from test_lab import CONTRAST

for needed in ("sphinx", "myst_nb", "pydata_sphinx_theme"): pytest.importorskip(needed, reason="needs the extra [docs]")
pytestmark = pytest.mark.slow
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
SHOTS = Path(__file__).parent/"artefacts"

RUN = next((ROOT/"nbs"/"core"/"engine").glob("*_run.ipynb"))

# a chapter of another package: math, a FigureWidget, an Output widget, linked controls, a link, HTML from outside
GUEST = {"# Guest\n\nRecall is $r_k = \\frac{|A \\cap T|}{k}$, and see [the run engine](../core/engine/%s).\n\n" % RUN.name +
         "$$\\begin{aligned} a &= b^2 \\\\ c &= \\operatorname{argmax}_x f(x) \\end{aligned}$$\n\n"
         "> Wait for $5 or so.": "md",
         "n: int = 3  # points": "parameters",
         "import plotly.graph_objects as go\nimport ipywidgets as w\nimport numpy as np\nfrom opml_wb import log\n"
         "log.metric('points', n); log.claim('guests', paper=2, measured=n, how='counted')": "",
         "#| echo: false\ngo.FigureWidget(data=[dict(type='scatter', y=np.arange(3.) ** 2, name='</script>')])": "",
         "out = w.Output()\nwith out: print('said inside')\n"
         "a, b = w.IntSlider(description='left'), w.IntText(description='right')\n"
         "w.jslink((a, 'value'), (b, 'value'))\nw.VBox([a, b, out])": "",
         "from opml_wb.core import ui\nline = ui.figure('x, s', 'y', 'A line').add_scatter(y=[0, 1, 2])\n"
         "def turn(fig, slope, dashed, of):\n"
         "    fig.update_traces(y=[0, slope, 2 * slope], line_dash='dash' if dashed else 'solid', name=of)\n"
         "    return f'slope {slope} of {of}'\n"
         "ui.play(line, turn, slope=(1, 0, 5), dashed=w.Checkbox(), of=w.Dropdown(options=['a', 'b']))": "",
         "#| hide\nsecret = 'not for readers'": "",
         "from IPython.display import HTML, Math\nHTML('<img src=\"https://example.org/pixel.png\">')": "",
         "Math(r'\\sum_i x_i')": "",
         "HTML('<table class=\"dataframe\"><tr><td>kept</td></tr></table>')": ""}


SETUP = """from setuptools import setup
setup(name="acme_guest", version="1", packages=["acme_guest"], package_data={"acme_guest": ["*.ipynb"]},
      entry_points={"opml_wb.chapters": ["guest = acme_guest:CHAPTER"]})"""


FEW = """import sys
from opml_wb.core.cli.verbs import main
from opml_wb.core.site import sources
every = sources.modules
sources.modules = lambda root: dict([*every(root).items()][:3])
main(sys.argv[1:])"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    "A folder of packages into which pip installed one that brings a chapter."
    import nbformat
    v4, folder = nbformat.v4, tmp_path_factory.mktemp("acme")
    cells = [v4.new_markdown_cell(s) if kind == "md" else
             v4.new_code_cell(s, metadata={"tags": [kind]} if kind else {}) for s, kind in GUEST.items()]
    (folder/"acme_guest").mkdir()
    (folder/"setup.py").write_text(SETUP)
    (folder/"acme_guest"/"__init__.py").write_text("from pathlib import Path\nCHAPTER = Path(__file__).with_name('guest.ipynb')")
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder/"acme_guest"/"guest.ipynb")
    to = tmp_path_factory.mktemp("packages")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", to, folder], check=True)
    return to


@pytest.fixture(scope="module")
def guest(packages): return packages/"acme_guest"/"guest.ipynb"


@pytest.fixture(scope="module")
def build(tmp_path_factory, packages, executed):
    """build(*options) -> CompletedProcess of `opml docs` with the guest's package installed, in a home of this module that has
    the chapters' runs; what the first build made serves the later ones."""
    home = tmp_path_factory.mktemp("home")
    for chapter in sorted((ROOT/"nbs"/"chapters").glob("*.ipynb")):
        ran = Path(executed(chapter).notebook).parent
        shutil.copytree(ran, home/"runs"/ran.name)
    def call(*options, command="docs"):
        path = os.pathsep.join(filter(None, (str(packages), BEGAN.get("PYTHONPATH"))))
        return subprocess.run([sys.executable, "-m", "opml_wb.core.cli", command, *map(str, options)], cwd=ROOT,
                              env={**BEGAN, "OPML_HOME": str(home), "PYTHONPATH": path}, capture_output=True, text=True)
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


@pytest.fixture
def page(browser):
    "A page; `page.faults` collects what it asks for off this machine, its errors, and what was not found."
    context = browser.new_context(viewport=dict(width=1280, height=1000))
    page = context.new_page()
    page.set_default_timeout(300_000)  # a busy machine is no fault
    page.faults = strangers(page)
    page.on("pageerror", lambda e: page.faults.append(f"page error: {e}"))
    page.on("response", lambda r: r.status >= 400 and page.faults.append(f"{r.status}: {r.url}"))
    page.on("console", lambda m: m.type == "error" and page.faults.append(f"console: {m.text}"))
    yield page
    context.close()


def drawn(page): ready(page)


def shot(page, name):
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS/f"docs-{name}.jpeg", type="jpeg", quality=80, full_page=True)   # a long page as PNG takes longer


def soft(page):
    "The page's colour for text that stands back, as computed styles give it."
    return page.evaluate("""() => { const e = document.createElement('i'); e.style.color = 'var(--pst-color-text-muted)'
      document.body.append(e); const said = getComputedStyle(e).color; e.remove(); return said }""")


def hnsw():
    "The class whose page is looked at."
    from opml_wb.riann import DynamicHNSW
    return DynamicHNSW


def api_page(thing):
    "The page of a module, or of the module of a class."
    name = thing.__name__ if inspect.ismodule(thing) else thing.__module__
    return f"api/{name.removeprefix('opml_wb.').replace('.', '/')}.html"


def figures(notebook):
    "How many plotly figures an executed notebook shows."
    outputs = [o for c in json.loads(notebook.read_text())["cells"] for o in c.get("outputs", ())]
    return sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in outputs)


# formulas wider than their column: a reader would have to scroll
CUT_OFF = """() => [...document.querySelectorAll('mjx-container[display=true]')]
    .filter(e => e.scrollWidth > e.clientWidth + 4).map(e => e.textContent.slice(0, 60))"""
LOADED = re.compile(r"""<(?:script|link|img|iframe|source|video|audio|object|embed)\b[^>]*?\s(?:src|href|data)="([^"]*)\"""")


def test_no_page_is_heavy_or_loads_what_is_not_there(site):
    "What the text of any page loads is a file of the site, and no page has 2 MB."
    faults = []
    for p in site.rglob("*.html"):
        if "_static" in p.parts: continue
        if p.stat().st_size >= 2_000_000: faults.append(f"{p.relative_to(site)}: {p.stat().st_size / 1e6:.1f} MB")
        for address in LOADED.findall(p.read_text()):
            inside = address.startswith(("data:", "#")) or ":" not in address and not address.startswith("//")
            file = p.parent/unquote(re.split("[?#]", address)[0])
            if not inside or not (address.startswith(("data:", "#")) or file.exists()): faults.append(f"{p.relative_to(site)}: {address[:200]}")
    assert faults == []


@browser_only
def test_every_page_is_whole(site, web, page):
    """No outside request, no page error, nothing missing, on any page in a browser (of the pages that are made alike, on every tenth;
    the next test opens the chapters)."""
    pages = [p for p in looked_at(site, 10) if p.parent.name != "chapters" or p.name == "index.html"]
    assert len(pages) > 60
    for p in pages:
        page.goto(f"{web}/{p.relative_to(site)}", wait_until="load")
        if "_static/opml.js" in p.read_text(): drawn(page)
    assert page.faults == []


@browser_only
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_chapter_shows_figures_widget_and_how_to_run(site, build, web, browser, page, theme):
    from opml_wb.core.record.store import Store
    home = Store(build.home)
    for p in sorted((site/"chapters").glob("*.html")):
        if p.stem == "index" or not (run := next(iter(home.ls(1, p.stem)), None)): continue
        page.emulate_media(color_scheme=theme)
        page.goto(f"{web}/chapters/{p.name}", wait_until="load")
        drawn(page)
        shown = page.locator(".opml-fig .main-svg")
        assert page.locator(".opml-fig").count() >= figures(Path(run["notebook"])) and shown.count() > 0
        for box in page.locator(".opml-fig").all(): assert box.bounding_box()["height"] > 100
        assert page.locator(".opml-play :is(input, select)").count() > 0
        texts = page.locator(".opml-fig .main-svg text").evaluate_all("all => [...new Set(all.map(t => getComputedStyle(t).fill))]")
        assert soft(page) in texts                                                     # axes in the page's own colour
        assert page.locator("table:has(th:has-text('meaning'))").count() == 1           # the parameters
        assert page.locator("details:has(summary:has-text('The parameters'))").count() == 1
        assert f"opml run {p.stem}" in page.locator(".opml-bar").inner_text()
        assert f"opml lab {p.stem}" in page.locator(".opml-hint").first.inner_text()
        with page.expect_download() as got: page.locator(".opml-bar a.download").click()
        assert json.loads(Path(got.value.path()).read_text())["nbformat"] == 4
        shot(page, f"{p.stem}-{theme}")
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate(CUT_OFF) == []
        dark = page.evaluate("document.documentElement.dataset.theme")
        assert dark == theme
    assert page.faults == []


@browser_only
def test_controls_answer_without_a_kernel(site, build, web, page):
    "The controls of each chapter change what is drawn or said, and have names; the states are few bytes."
    from opml_wb.core.record.store import Store
    home, moved = Store(build.home), 0
    for p in sorted((site/"chapters").glob("*.html")):
        if p.stem == "index" or not next(iter(home.ls(1, p.stem)), None): continue
        assert sum(map(len, re.findall(r'data-states="([^"]*)"', p.read_text()))) < 500_000
        page.goto(f"{web}/chapters/{p.name}")
        drawn(page)
        for i, form in enumerate(page.locator(".opml-play").all()):
            states = set()
            for control in form.locator("input, select").all():
                assert control.evaluate("e => e.labels.length == 1 && e.labels[0].innerText.trim()")
                for to in 0, 1:
                    control.evaluate(SET, to)
                    states.add(page.evaluate(STATE, i))
            assert len(states) > 1, f"{p.name}: nothing answers the controls of figure {i}"
            moved += 1
    assert moved >= 5 and page.faults == []


def looked_at(site, step=40):
    "Every page but those of the modules and benches, which are made alike: of them one in `step`."
    def alike(p): return p.relative_to(site).parts[0] in ("api", "bench") and p.name != "index.html"
    found = pages.pages_of(site)
    return [*(p for p in found if not alike(p)), *[p for p in found if alike(p)][::step]]


@browser_only
def test_readers_with_any_eyes_and_hands_can_use_the_pages(site, web, browser):
    "axe finds nothing serious: names of controls, alternatives to pictures, landmarks, contrast of words and of code, in both themes."
    context = browser.new_context(viewport=pages.WIDE, color_scheme="light")
    source, found = pages.axe_source(), {}
    for p in looked_at(site):
        page = pages.open_page(context, f"{web}/{p.relative_to(site)}")
        page.set_default_timeout(300_000)
        if "_static/opml.js" in p.read_text(): page.wait_for_selector("html[data-opml]", state="attached")
        lines = pages.serious(page, source)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.dataset.theme == 'dark' && !document.getAnimations().some(a => a instanceof CSSTransition)")
        lines += [f"dark: {line}" for line in pages.serious(page, source, contrast_only=True)]
        if lines: found[str(p.relative_to(site))] = lines
        page.close()
    context.close()
    assert not found


@browser_only
def test_a_phone_shows_everything(site, web, browser):
    "At 390 px only code, tables and formulas are wider than the screen, each in a box that scrolls."
    context = browser.new_context(viewport=pages.PHONE)
    found = {}
    for p in looked_at(site):
        page = pages.open_page(context, f"{web}/{p.relative_to(site)}")
        page.set_default_timeout(300_000)
        lines = pages.off_screen(page)
        if 'class="opml-fig"' in p.read_text():
            drawn(page)
            lines += pages.off_screen(page)
        if lines: found[str(p.relative_to(site))] = lines
        page.close()
    context.close()
    assert not found


@browser_only
def test_a_page_costs_its_reader_little(site, browser):
    "Bytes on the wire with an empty cache, packed as hosts do: a chapter read to its end, and once a figure is touched."
    context = browser.new_context(viewport=pages.WIDE)
    def read(page): page.evaluate("() => { for (const e of document.querySelectorAll('h2, .opml-fig')) e.scrollIntoView() }")
    def touch(page):
        read(page)
        page.locator(".opml-fig").first.hover()
        page.wait_for_selector(".opml-fig .main-svg")
    chapters = [p for p in sorted((site/"chapters").glob("*.html")) if 'class="opml-fig"' in p.read_text()]
    assert len(chapters) >= 5
    with pages.served(site) as address:
        for p in [*chapters, site/"index.html", site/"commands.html"]:
            cost, parts = pages.transferred(context, f"{address}/{p.relative_to(site)}", read)
            assert 20_000 < cost < 2_000_000 and not any("plotly" in name for name in parts), (p.name, cost, parts)
        cost, parts = pages.transferred(context, f"{address}/{chapters[0].relative_to(site)}", touch)
        assert 1_000_000 < next(n for name, n in parts.items() if "plotly.min.js" in name) < 1_700_000 and cost < 3_500_000, (cost, parts)
    context.close()


SET = """(e, to) => { const last = e.max || e.length - 1
  if (e.type == 'checkbox') e.checked = !!to; else e.value = to ? last : 0
  e.dispatchEvent(new Event('input', {bubbles: true})) }"""
STATE = """i => { const form = document.querySelectorAll('.opml-play')[i], box = form.nextElementSibling
  return form.querySelector('.opml-note').textContent + JSON.stringify(box.data) + JSON.stringify(box.layout.title) }"""


@browser_only
def test_a_page_shows_the_state_that_is_asked_for(web, page):
    page.goto(f"{web}/chapters/guest.html")
    drawn(page)
    form = page.locator(".opml-play")
    slope = form.get_by_label("slope")
    slope.focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    form.get_by_label("of").select_option(label="b")
    form.get_by_label("dashed").check()
    page.wait_for_function("() => document.querySelector('.opml-note').textContent == 'slope 4 of b'")
    (line,) = page.evaluate("() => document.querySelector('.opml-play').nextElementSibling.data")
    assert (line["y"], line["line"]["dash"], line["name"]) == ([0, 4, 8], "dash", "b")
    assert page.faults == []


@browser_only
def test_figures_are_there_without_scripts(site, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site/"chapters"/"guest.html").as_uri())
    picture = page.get_by_alt_text("A line: y against x, s")
    assert picture.bounding_box()["width"] > 300
    context.close()


@browser_only
def test_math_output_widgets_and_figure_widgets_of_a_guest(site, web, page):
    page.goto(f"{web}/chapters/guest.html")
    drawn(page)
    page.wait_for_selector("mjx-container svg")
    assert page.locator("mjx-container").count() == 3 and "$" not in page.locator("mjx-container").first.inner_text()
    assert page.locator("[data-mml-node=merror]").count() == 0
    assert page.locator(".opml-fig").first.locator(".scatterlayer .point").count() == 3  # the FigureWidget, as a figure
    assert page.locator(".opml-widget").inner_text().count("said inside") == 1      # the Output widget
    left = page.locator(".opml-widget .noUi-handle")
    left.focus()
    for _ in range(4): page.keyboard.press("ArrowRight")
    assert page.locator(".opml-widget input[type=number]").input_value() == "4"     # linked in the browser
    text = page.locator("article").inner_text()
    assert "echo: false" not in text and "not for readers" not in text and "kept" in text
    page.get_by_role("link", name="the run engine").click()
    page.wait_for_url("**/api/core/engine/run.html")
    assert page.faults == []


@browser_only
@pytest.mark.parametrize("how", ["served", "from the disk"])
def test_search_finds(site, web, page, how):
    base = web if how == "served" else site.as_uri()
    page.goto(f"{base}/search.html?q=DynamicHNSW")
    page.get_by_text("Search finished").wait_for(timeout=15_000)
    found = page.locator("#search-results ul.search li a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    for wanted in (api_page(hnsw()), "chapters/riann.html"): assert any(wanted in href for href in found), found
    if how == "served":
        shot(page, "search")
        page.goto(f"{web}/index.html")
        page.keyboard.press("Control+k")                                               # as a reader asks
        page.keyboard.type("DynamicHNSW")
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=DynamicHNSW*")
        page.get_by_text("Search finished").wait_for(timeout=15_000)
    else: page.faults.clear()                # there the browser refuses Sphinx the excerpts below the hits, and says so
    page.goto(f"{base}/chapters/riann.html")
    drawn(page)
    assert page.locator(".opml-fig .main-svg").count() > 0 and page.locator(".opml-play input").count() > 0
    assert page.faults == []


@browser_only
def test_home_and_api(site, web, page):
    from opml_wb.core.show.overview import PAPERS
    built = {p.stem for p in (site/"chapters").glob("*.html")} - {"index"}
    chapters = [p.package for p in PAPERS if p.package in built] + sorted(built - {p.package for p in PAPERS})
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.goto(f"{web}/index.html")
        folds = page.locator("details.claims")
        assert folds.count() > 1 and not folds.locator("table").first.is_visible()
        for fold in folds.all(): fold.locator("summary").click()
        text = page.locator("article").inner_text()
        assert "indexing speed-up over default HNSW" in text and "guests" in text       # claims, the guest's too
        heads = page.locator(".paper h4").all_inner_texts()
        assert [h for h in heads if h[0].isdigit()] == [f"{p.number} {p.name}" for later in (False, True) for p in PAPERS
                                                        if later == (p.package not in built)]
        assert page.locator(".paper:not(.later) img").count() == len(chapters)
        assert page.locator(".paper h4 a").evaluate_all("l => l.map(a => a.getAttribute('href'))") == [
            f"chapters/{name}.html" for name in chapters]
        shot(page, f"home-{theme}")
        assert page.evaluate(CONTRAST) == []
        page.goto(f"{web}/{api_page(hnsw())}")
        signature = page.locator(f"dt[id='{hnsw().__module__}.DynamicHNSW.insert']")
        assert "deg" in signature.inner_text() and "raises" not in signature.inner_text()
        fold = page.locator("details:has(summary:has-text('DynamicHNSW'))").first
        assert not fold.locator("pre").is_visible()
        fold.locator("summary").click()
        assert "class DynamicHNSW" in fold.locator("pre").inner_text()
        shot(page, f"api-{theme}")
        page.goto(f"{web}/guide/12_publish.html")
        shot(page, f"publish-{theme}")
    assert page.faults == []


def public(cls):
    "The public methods and properties of a class, those of private bases among them."
    def own(c): return c is cls or c.__name__.startswith("_") and c.__module__.startswith("opml_wb.")
    return [a.name for a in inspect.classify_class_attrs(cls)
            if not a.name.startswith("_") and a.kind != "data" and own(a.defining_class)]


def test_the_api_lists_every_public_name_once(site):
    "What `inspect` finds in each module stands on its page: each class, each method once and as a method, each function."
    import opml_wb
    wrong, methods = [], 0
    for found in pkgutil.walk_packages(opml_wb.__path__, "opml_wb."):
        name = found.name
        if name.rpartition(".")[2] in ("__main__", "_modidx"): continue
        module, said = importlib.import_module(name), {}
        html = (site/api_page(module)).read_text()
        for kind, id in re.findall(r'<dl class="py (\w+)">\s*<dt class="sig[^>]*id="([^"]+)"', html): said.setdefault(id, []).append(kind)
        for n, thing in vars(module).items():
            if n.startswith("_") or (getattr(thing, "__module__", 0), getattr(thing, "__name__", 0)) != (name, n): continue
            if inspect.isclass(thing):
                kinds = {f"{name}.{n}": ["class"]} | {f"{name}.{n}.{m}": ["method", "property"] for m in public(thing)}
                methods += len(kinds) - 1
            elif inspect.isfunction(thing): kinds = {f"{name}.{n}": ["function"]}
            else: continue
            wrong += [(id, said.get(id)) for id, right in kinds.items() if len(said.get(id, ())) != 1 or said[id][0] not in right]
        wrong += [id for id, kinds in said.items() if "function" in kinds and not callable(getattr(module, id.rpartition(".")[2], None))]
    assert methods > 300 and not wrong, wrong


def test_rooms_stand_in_reading_order(site):
    "The wings of core and of the papers are sections of the page that lists the modules."
    heads = re.findall(r"<h2>([\w.]+)<", (site/"api"/"index.html").read_text())
    assert [h for h in heads if h.startswith("core.")] == [f"core.{w}" for w in house.WINGS]
    assert heads.index("core.cli") < heads.index("eligibility") < heads.index("riann") < heads.index("riann.graph") < heads.index("flexserve")


def test_the_side_of_an_api_page_shows_where_it_stands(site):
    "All packages, and the modules around the one that is read, which is marked; no page lists those of the others."
    wings = [f"core/{w}" for w in house.WINGS]
    for page, others in (("core/engine/run", [*wings, "core/engine/zygote"]), ("riann/graph/memory", ["riann/graph/links", "riann/disk"]), ("riann", ["riann/index"])):
        html = (site/"api"/f"{page}.html").read_text()
        side = html[html.index('<nav class="bd-docs-nav'):].partition("</nav>")[0]
        found = [urljoin(f"{page}.html", h) for h in re.findall(r'href="([^"]+)"', side)]
        assert {f"{p}.html" for p in ("core", "eligibility", "flexserve", *others)} <= {*found} and len(found) == len({*found}) < 60
        assert not any(p.startswith("pipesim/") for p in found) and side.count('aria-current="page"') == 1


def test_the_reference_has_every_command(site):
    from opml_wb.core.cli.verbs import VERBS
    html = (site/"commands.html").read_text()
    for verb in (*VERBS, "flexserve serve"): assert f">opml {verb}<" in html, verb


def test_the_guide_shows_what_lies_in_its_folder(site):
    listed = re.findall(r'<li><p><a class="reference internal" href="(\w+)\.html"', (site/"guide"/"index.html").read_text())
    assert listed == sorted(p.stem for p in (ROOT/"nbs"/"guide").glob("*") if p.suffix in (".md", ".ipynb"))
    assert "12_publish" in listed and (site/"guide"/"90_publish.html").exists() and all((site/"guide"/f"{name}.html").exists() for name in listed)


def test_links_between_notebooks_lead_somewhere():
    "Each relative link in a notebook or a page of the guide names a file that is there."
    lost = []
    for p in [*(ROOT/"nbs").rglob("*.ipynb"), *(ROOT/"nbs"/"guide").glob("*.md")]:
        cells = json.loads(p.read_text())["cells"] if p.suffix == ".ipynb" else [{"cell_type": "markdown", "source": p.read_text()}]
        prose = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        lost += [f"{p.relative_to(ROOT)}: {to}" for to in re.findall(r"\]\((?!\w+:)([^)\s#]+\.(?:ipynb|md|png|svg))", prose)
                 if not (p.parent/to).exists()]
    assert not lost, lost


def test_a_second_build_executes_nothing(site, build, tmp_path):
    import sqlite3
    def runs(): return sqlite3.connect(build.home/"opml.db").execute("select count(*) from run").fetchone()[0]
    before, was = runs(), (site/"chapters"/"riann.html").read_text()
    done = build("--out", tmp_path/"again")
    assert done.returncode == 0, done.stderr
    assert runs() == before and "riann: unchanged, from the store" in done.stdout
    assert re.search(r"2/3 [01] of \d{3} pages changed", done.stdout), done.stdout       # the home page tells how old runs are
    assert (tmp_path/"again"/"chapters"/"riann.html").read_text() == was


def test_one_changed_chapter_is_one_page_to_make(site, build, guest, tmp_path):
    source, work = guest.read_text(), build.home/"docs-work"/"site"
    try:
        guest.write_text(source.replace("Wait for $5 or so.", "Wait for $6 or more."))
        assert build("--out", tmp_path/"before").returncode == 0
        written = {p: p.stat().st_mtime_ns for p in (work/"api").rglob("*.html")}
        guest.write_text(source.replace("Wait for $5 or so.", "Wait for $7 or more."))
        done = build("--out", tmp_path/"after")
    finally: guest.write_text(source)
    assert done.returncode == 0 and re.search(r"2/3 [12] of \d{3} pages changed", done.stdout), done.stdout + done.stderr
    assert len(written) > 100 and written == {p: p.stat().st_mtime_ns for p in (work/"api").rglob("*.html")}
    assert "$7 or more" in (tmp_path/"after"/"chapters"/"guest.html").read_text()
    assert "$6 or more" in (tmp_path/"before"/"chapters"/"guest.html").read_text()


def test_a_failing_chapter_or_a_stranger_leaves_the_site_alone(site, build, guest, tmp_path):
    was, source = (site/"index.html").read_text(), guest.read_text()
    try:
        guest.write_text(source.replace("log.metric('points', n);", "1 / 0;"))
        done = build("--out", site)
        assert done.returncode == 1 and "guest failed (ZeroDivisionError" in done.stderr and "--no-run" in done.stderr
        guest.write_text(source.replace(f"the run engine](../core/engine/{RUN.name})", "nowhere](nowhere.md)"))
        done = build("--out", site, "--no-run")
        assert done.returncode == 1 and "nowhere.md" in done.stderr and "Sphinx found" in done.stderr
    finally: guest.write_text(source)
    assert (site/"index.html").read_text() == was
    (tmp_path/"thesis.tex").write_text("do not lose me")
    done = build("--out", tmp_path)
    assert done.returncode == 2 and "opml docs --out DIR" in done.stderr and (tmp_path/"thesis.tex").exists()


def test_a_chapter_of_another_package_is_listed_and_claims(site, build):
    assert "guest" in [c["name"] for c in json.loads(build("--json", command="list").stdout)]
    claims = json.loads(build("--json", command="claims").stdout)
    assert [(c["name"], c["measured"]) for c in claims if c["chapter"] == "guest"] == [("guests", 3)]


def test_from_a_wheel(tmp_path):
    "Without a clone the sources come from inside the package, and the site goes into the home."
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT/"opml_wb", tmp_path/"opml_wb", ignore=ignore)
    for carried, folder in (("_nbs", "nbs"), ("_data", "data")):
        shutil.copytree(ROOT/folder, tmp_path/"opml_wb"/carried, ignore=ignore)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OPML_HOME": str(tmp_path/"home")}
    def opml_docs():
        return subprocess.run([sys.executable, "-c", FEW, "docs", "--no-run"], env=env, cwd=tmp_path, capture_output=True, text=True)
    done = opml_docs()
    assert done.returncode == 0, done.stderr
    assert "not run yet" in (tmp_path/"home"/"docs"/"chapters"/"riann.html").read_text()
    shutil.rmtree(tmp_path/"opml_wb"/"_nbs")
    done = opml_docs()
    assert done.returncode == 1 and "from a clone" in done.stderr


def test_a_missing_extra_says_what_to_install(monkeypatch):
    from opml_wb.core.site import build as docs
    monkeypatch.setattr(docs, "NEEDED", {"no_such_package_here": "myst-nb"})
    with pytest.raises(docs.DocsError, match=r"myst-nb: pip install 'opml_wb\[docs\]'"): docs.check()

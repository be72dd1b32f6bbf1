"""Look at the figures of a page: text over text, text outside, log axes without readable ticks, axes without a title.

`opml show KEY --html PAGE.html`, then `python tests/figures.py PAGE.html [--shots DIR] [--moves N]`: the page is opened without a
network in Chromium, 1280 px wide, light and dark; the controls of each figure are moved through their choices (N of each, evenly).
Each line says: figure (counted from 1, with its title and, where it isn't the first one, its state), what is wrong, the texts.
Exit code 1 if there is a line. `--shots` writes each figure as PNG, light, dark and in each state, to look at.

What to do about it, in the chapter's `plots`:
  over       shorten a label or leave it out; textposition / xanchor / yanchor / xshift of an annotation; fewer ticks (`nticks`, `dtick`);
             a legend below (`legend_y=-.25, legend_yanchor="top"`) or names beside the lines instead; more height or margin.
  on a bar   a note or a point's text that lies on a bar: move it beside, or above the axes.
  outside    a longer margin (`margin_r=90` for labels at the right end of lines), `xanchor="right"`, or `cliponaxis=False` with room.
  cut        text of points that ends at the edge of the axes: another textposition, a wider range, or `cliponaxis=False`.
  bare ticks the house template labels log axes 1, 2, 5, 10, 20 ... by itself: leave `dtick`, `tickvals`, `nticks` out.
  few ticks  a log axis that spans less than two ticks: make it linear, or set its range to whole decades.
  taller     the figure of a state hangs over what stands below: the page's script gives each state its height.
  long       an axis title longer than its axis: fewer words, or a `<br>`.
  no title   give the axis a title with its unit (`ui.figure("time, s", "share, %")`; `fig.update_xaxes(title_text=..., row=, col=)`).
`picture:` stands before what the static picture (matplotlib) has that the interactive figure has not.
"""
import argparse
import json
import re
import shutil
import sys
from pathlib import Path

# the shell that Debian has beside the browser draws and prints the same and takes two thirds of the time
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None)
# no name but this machine's is found: pages get nothing from outside, and what they load is kept as it is for readers
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"]
OURS = re.compile(r"((https?|wss?)://(127\.0\.0\.1|localhost)[:/]|file:|data:|blob:|about:)")
PLOTLY = "application/vnd.plotly.v1+json"

# Everything that is written in an SVG as (kind, text, corners); overlapping ones by the separating axis theorem, since ticks may stand
# askew. Boxes of text are higher than its letters: a part of the line's height is taken off.
LOOK = r"""(box) => {
  const gd = box.matches('.js-plotly-plot') ? box : box.querySelector('.js-plotly-plot')
  if (!gd || !gd._fullLayout) return ['not drawn']
  const KINDS = {'.g-gtitle': 'title', '.annotation': 'annotation', '.legend': 'legend', '.colorbar': 'colour bar', '.textpoint': 'label',
    '.bartext': 'label', '.points': 'label', '.heatmap-label': 'cell', '[class*=title]': 'axis title', '[class*=tick]': 'tick'}
  const kind = t => { for (const [s, k] of Object.entries(KINDS)) if (t.closest(s)) return k; return 'text' }
  const seen = t => { for (let e = t; e && e !== gd; e = e.parentElement) { const s = getComputedStyle(e)
      if (s.display === 'none' || s.visibility === 'hidden' || +s.opacity < .1 || +s.fillOpacity < .1) return false } return true }
  // what cuts the texts of points: the axes of their subplot, which the path behind its grid is as large as
  const edge = t => { const id = t.closest('.textpoint') && (t.closest('g[clip-path]') ?? t.parentElement.closest('[clip-path]'))
      ?.getAttribute('clip-path').match(/#([^)"']+)/)?.[1], r = id && document.getElementById(id)?.querySelector('rect')
    if (!r) return null
    const p = t.closest('g[clip-path], g.plot'), m = (p ?? t).getScreenCTM(), x = +(r.getAttribute('x') ?? 0), y = +(r.getAttribute('y') ?? 0)
    return {left: m.e + x, top: m.f + y, right: m.e + x + +r.getAttribute('width'), bottom: m.f + y + +r.getAttribute('height')} }
  const name = s => s.replace(/\s+/g, ' ').trim().slice(0, 50)
  const frame = gd.querySelector('.main-svg').getBoundingClientRect()
  const texts = [...gd.querySelectorAll('.main-svg text')].filter(t => t.textContent.trim() && !t.closest('.hoverlayer') && seen(t)).map(t => {
    const b = t.getBBox(), m = t.getScreenCTM(), line = b.height / (t.querySelectorAll('tspan.line').length || 1), up = .25 * line, down = .08 * line
    const at = (x, y) => [m.a * x + m.c * y + m.e, m.b * x + m.d * y + m.f]
    return {kind: kind(t), edge: edge(t), of_bar: !!t.closest('.barlayer'), said: name(t.textContent), corners: [at(b.x, b.y + up), at(b.x + b.width, b.y + up),
      at(b.x + b.width, b.y + b.height - down), at(b.x, b.y + b.height - down)]} })
  const depth = (p, q) => { let least = Infinity
    for (const s of [p, q]) for (let i = 0; i < 2; i++) {
      const [x, y] = [s[i + 1][0] - s[i][0], s[i + 1][1] - s[i][1]], n = Math.hypot(x, y) || 1
      const on = c => c.map(([u, v]) => (-y * u + x * v) / n)
      const a = on(p), b = on(q)
      least = Math.min(least, Math.min(Math.max(...a), Math.max(...b)) - Math.max(Math.min(...a), Math.min(...b))) }
    return least }
  const faults = [], room = gd.getBoundingClientRect()
  if (frame.height > room.height + 1) faults.push(['taller', `${Math.round(frame.height)} px in a place of ${Math.round(room.height)} px`])
  texts.forEach((t, i) => {
    for (const u of texts.slice(0, i))
      if (depth(t.corners, u.corners) > 1.5) faults.push(['over', `${u.kind} "${u.said}" and ${t.kind} "${t.said}"`])
    const xs = t.corners.map(c => c[0]), ys = t.corners.map(c => c[1])
    const beyond = (e, by) => Math.min(...xs) < e.left - by || Math.max(...xs) > e.right + by || Math.min(...ys) < e.top - by || Math.max(...ys) > e.bottom + by
    if (t.edge && beyond(t.edge, .3)) faults.push(['cut', `${t.kind} "${t.said}"`])
    else if (beyond(frame, 1)) faults.push(['outside', `${t.kind} "${t.said}"`]) })
  const bars = [...gd.querySelectorAll('.barlayer .point > path')].map(b => b.getBoundingClientRect())
    .map(r => [[r.left, r.top], [r.right, r.top], [r.right, r.bottom], [r.left, r.bottom]])
  for (const t of texts) if (['annotation', 'legend'].includes(t.kind) || t.kind === 'label' && !t.of_bar)
    if (bars.some(b => depth(t.corners, b) > 2)) faults.push(['on a bar', `${t.kind} "${t.said}"`])
  const layout = gd._fullLayout, POWER = {G: 9, B: 9, M: 6, k: 3, m: -3, 'μ': -6, 'µ': -6, n: -9, '%': -2}
  const number = s => { const m = s.replace(/[−–]/g, '-').replace(/(\d),(?=\d{3})/g, '$1').match(/^(-?[\d.]+(?:e[-+]?\d+)?)\s*([GBMkmμµn%]?)$/)
    return m ? +m[1] * 10 ** (POWER[m[2]] ?? 0) : NaN }
  const axes = Object.keys(layout).filter(k => /^[xy]axis\d*$/.test(k)).map(k => layout[k])
  const titled = a => a.title?.text?.trim()
  const notes = (layout.annotations ?? []).filter(n => n.text && n.xref === 'paper' && n.yref === 'paper')
  for (const a of axes) {
    if (!a.visible || a.showticklabels === false) continue
    const [low, high] = a.type === 'log' ? [...a.range].sort((p, q) => p - q) : [-Infinity, Infinity], letter = a._id[0]
    const shown = (a._vals ?? []).filter(v => v.text && String(v.text).trim() && v.x > low - 1e-6 && v.x < high + 1e-6)
    const cap = `${a._id} axis "${titled(a) ? name(a.title.text) : ''}"`
    if (a.type === 'log') {
      if (shown.length < 2) faults.push(['few ticks', cap])
      const bare = a.tickmode === 'array' ? [] : shown.filter(v => { const n = number(String(v.text).replace(/<[^>]*>/g, ''))
        return n && Math.abs(Math.log10(n) - v.x) > .01 && /^\d$/.test(String(v.text)) })
      if (bare.length) faults.push(['bare ticks', `${cap}: ${bare.map(v => v.text).join(' ')}`]) }
    const head = gd.querySelector(`.g-${a._id}title text`)?.getBoundingClientRect()
    if (head && Math.max(head.width, head.height) > 1.25 * a._length) faults.push(['long', cap])
    const same = axes.some(b => b._id[0] === letter && titled(b) && (a._matchGroup?.[b._id] || a.overlaying === b._id))
    const noted = notes.some(n => letter === 'x' ? n.y <= 0 : n.textangle === -90 && n.x <= 0)
    if (a.type !== 'category' && a.type !== 'multicategory' && shown.length && !titled(a) && !same && !noted) faults.push(['no title', cap]) }
  return [...new Set(faults.map(f => f.join(': ')))] }"""

# the choices of a control, and setting one as a reader does
CHOICES = "e => e.type == 'checkbox' ? [0, 1] : e.tagName == 'SELECT' ? [...e.options].map((_, i) => i) : [...Array(+e.max + 1).keys()]"
SET = """(e, to) => { if (e.type == 'checkbox') e.checked = !!to; else e.value = to
  e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('change', {bubbles: true})) }"""
NOW = "e => e.type == 'checkbox' ? +e.checked : +e.value"
NAME = "e => e.name || e.closest('label')?.innerText.trim() || 'control'"
SETTLED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def ready(page):
    "Wait until the page has drawn its figures; those that wait for a reader are asked for."
    page.wait_for_selector("html[data-opml]", state="attached")
    page.evaluate("() => window.opml?.drawAll?.()")
    page.wait_for_selector("html[data-opml=drawn]", state="attached")
    page.evaluate("() => document.fonts.ready")


def open_page(context, address):
    "Open a page; what it asked for from outside, in vain, is in `page.outside`."
    page = context.new_page()
    page.outside = strangers(page)
    page.goto(address)
    return page


def strangers(page):
    "A list of the addresses outside of this machine that a page asks for from now on."
    found = []
    for event in ("request", "websocket"): page.on(event, lambda asked: OURS.match(asked.url) or found.append(asked.url))
    return found


def thinned(values, most):
    "`most` of the values, evenly, with both ends."
    if len(values) <= most: return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def shot(box, folder, name):
    if not folder: return
    Path(folder).mkdir(parents=True, exist_ok=True)
    box.screenshot(path=Path(folder) / f"{name}.png")


def states(page, form, box, moves, look):
    "Move each control of a figure alone through its choices, `look(state)` at each, and put it back."
    for control in form.locator("input, select").all():
        home, name = control.evaluate(NOW), control.evaluate(NAME)
        for to in thinned(control.evaluate(CHOICES), moves):
            if to == home: continue
            control.evaluate(SET, to)
            page.evaluate(SETTLED)
            look(f"{name} #{to}")
        control.evaluate(SET, home)
        page.evaluate(SETTLED)


def faults_of_page(page, moves=4, shots=None, theme="light"):
    "List (figure, state, fault) of a page that is open; moves: how many choices of each control are looked at, 0 for none."
    ready(page)
    found = []
    for i, box in enumerate(page.locator(".opml-fig").all(), 1):
        box.scroll_into_view_if_needed()
        drawn = box.evaluate("b => (b.matches('.js-plotly-plot') ? b : b.querySelector('.js-plotly-plot'))?._fullLayout?.title?.text ?? ''")
        title = f"figure {i} {drawn[:40]!r}"
        def look(state, box=box, title=title, name=f"fig{i:02}-{theme}"):
            found.extend((title, state, fault) for fault in box.evaluate(LOOK))
            shot(box, shots, name + (f"-{re.sub(r'[^A-Za-z0-9]+', '-', state)}" if state else ""))
        look("")
        form = box.locator("xpath=preceding-sibling::*[1][contains(@class, 'opml-play')]")
        if moves and form.count(): states(page, form, box, moves, look)
    return found


def plotly_figures(source):
    "The figures `{data, layout}` in the HTML of a page, or in an executed notebook (its path ends in .ipynb)."
    if str(source).endswith(".ipynb"):
        cells = json.loads(Path(source).read_text(encoding="utf-8"))["cells"]
        outs = [o.get("data", {}) for c in cells for o in c.get("outputs", ())]
        return [d[PLOTLY] for d in outs if PLOTLY in d]
    html = Path(source).read_text(encoding="utf-8")
    return [json.loads(s) for s in re.findall(r'class="opml-fig"[^>]*><script type="application/json">(.*?)</script>', html, re.DOTALL)]


def written(sheet):
    "Every text of a drawn sheet: [(kind, text, extent in px)], as matplotlib lays it out."
    page, out = sheet.page, []
    brush = page.canvas.get_renderer()
    def add(kind, t):
        if t.get_visible() and t.get_text().strip(): out.append((kind, t.get_text(), t.get_window_extent(brush), t.get_rotation() % 90))
    for ax in page.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if not axis.get_visible() or not ax.get_visible(): continue
            add("axis title", axis.label)
            for tick in axis._update_ticks(): add("tick", tick.label1)
        for t in ax.texts: add("label", t)
    for t in page.texts: add("title", t)
    for a in page.artists:
        if hasattr(a, "get_text"): add("annotation", a)
    for legend in page.legends:
        for t in legend.get_texts(): add("legend", t)
    return out


def faults_of_picture(fig):
    "List what is wrong in the static picture of a figure `{data, layout}`; [] for one that has no picture."
    from matplotlib import rc_context

    from opml_wb.core.kit.picture import sheet_of
    sheet, out = sheet_of(fig), []
    if sheet is None: return []
    with rc_context(sheet.style):
        sheet.page.draw_without_rendering()
        texts = written(sheet)
    for ax in sheet.page.axes:
        for letter in "xy":
            axis = getattr(ax, f"{letter}axis")
            said = [t for t in axis._update_ticks() if t.label1.get_text()]
            if axis.get_scale() == "log" and axis.get_visible() and len(said) < 2: out.append(f"few ticks: {letter} axis {axis.label.get_text()!r}")
    for i, (kind, said, box, askew) in enumerate(texts):
        for other, words, b, askew_too in texts[:i]:
            across = min(box.x1, b.x1) - max(box.x0, b.x0)
            up = min(box.y1, b.y1) - max(box.y0, b.y0)
            if not (askew or askew_too) and across > 2 and up > 2.5:
                out.append(f"over: {other} {words[:50]!r} and {kind} {said[:50]!r}".replace("\\n", " "))
    return list(dict.fromkeys(out))


def browser_of(playwright): return playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


def look_at(path, moves=4, shots=None, browser=None):
    "List the faults of a page's figures as lines, in both themes and in the static pictures."
    from playwright.sync_api import sync_playwright
    if browser is None:
        with sync_playwright() as p: return look_at(path, moves, shots, browser_of(p))
    lines = {}
    context = browser.new_context(viewport=dict(width=1280, height=1000), color_scheme="light")
    page = open_page(context, Path(path).absolute().as_uri())
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.evaluate(SETTLED)
        # where text stands is the same in both: the states are looked at once
        for title, state, fault in faults_of_page(page, moves if theme == "light" or shots else 0, shots, theme):
            lines.setdefault(f"{title}{f' [{state}]' if state else ''}: {fault}")
    for address in page.outside: lines.setdefault(f"page: asks for {address}")
    context.close()
    for i, fig in enumerate(plotly_figures(path), 1):
        for fault in faults_of_picture(fig): lines.setdefault(f"figure {i}: picture: {fault}")
    return list(lines)


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("page", type=Path, help="what `opml show KEY --html PAGE.html` wrote")
    words.add_argument("--shots", type=Path, help="a folder for screenshots of each figure and state")
    words.add_argument("--moves", type=int, default=4, help="choices of each control that are looked at (default 4)")
    asked = words.parse_args()
    lines = look_at(asked.page, asked.moves, asked.shots)
    n = len(plotly_figures(asked.page))
    print("\n".join([*lines, f"{n} figures, {len(lines)} faults"]))
    return 1 if lines or not n else 0


if __name__ == "__main__": sys.exit(main())

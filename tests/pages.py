"""Look at whole pages: who can't use them (axe), what lies off a phone's screen, what they transfer, what they ask from outside.

`python tests/pages.py FOLDER [PART ...]` looks at the pages of a built site whose path holds a PART, in both themes, and at 390 px.
Exit code 1 if there is a line."""
import contextlib
import sys
import threading
from pathlib import Path

from figures import browser_of, open_page, ready

WIDE, PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}
# thousands of words of a colour take axe nearly all of its time. Its contrast is asked of words of each kind: element, classes, colour,
# ground and size, its parent's; of coloured code CODE measures one of each kind, of figures `figures.py` looks at the texts: both are out
# of the page while axe looks.
AXE = """async only => {
  const out = [...document.querySelectorAll('.highlight pre, .main-svg')].map(e => [e, document.createElement('span')])
  for (const [e, place] of out) e.replaceWith(place)
  const words = [...document.body.querySelectorAll('*')].filter(e => e.checkVisibility({visibilityProperty: true, opacityProperty: true})
    && [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim()))
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c } }
  const kind = e => { const s = getComputedStyle(e), of = e.parentElement
    return [e.localName, e.className, of.localName, of.className, s.color, s.opacity, s.fontSize, s.fontWeight, ground(e)].join('|') }
  const kinds = [...new Map(words.map(e => [kind(e), e])).values()], resultTypes = ['violations']
  try { return [...kinds.length ? (await axe.run({include: kinds}, {resultTypes, runOnly: ['color-contrast']})).violations : [],
      ...only ? [] : (await axe.run(document, {resultTypes, rules: {'color-contrast': {enabled: false}}})).violations]
    .filter(v => ['serious', 'critical'].includes(v.impact))
    .flatMap(v => v.nodes.slice(0, 3).map(n => `${v.id}: ${n.target.join(' ')}: ${n.failureSummary.split('\\n').slice(1, 2).join(' ').trim().slice(0, 160)}`)) }
  finally { for (const [e, place] of out) place.replaceWith(e) } }"""
CODE = """() => {
  const rgb = s => (s.match(/[\\d.]+/g) ?? []).map(Number)
  const light = c => [.2126, .7152, .0722].reduce((sum, w, i) => { const v = c[i] / 255
    return sum + w * (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4) }, 0)
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor)
    if (c.length === 3 || c[3] > .5) return c } return [255, 255, 255] }
  const kinds = new Map([...document.querySelectorAll('.highlight pre span')].filter(e => e.textContent.trim() && e.offsetParent)
    .map(e => [`${e.className} in ${e.closest('.highlight').parentElement.className}`, e]))
  return [...kinds].map(([kind, e]) => {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x)
    return [(a + .05) / (b + .05), kind] }).filter(([ratio]) => ratio < 4.5).map(([ratio, kind]) => `code ${kind}: contrast ${ratio.toFixed(2)}`) }"""
# what reaches beyond the right edge of the screen, outside of a box that scrolls; and pages that scroll sideways themselves
OFF = """() => { const wide = innerWidth, out = []
  const kept = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) {
      const s = getComputedStyle(p); if (/auto|scroll|hidden|clip/.test(s.overflowX) && p.getBoundingClientRect().right <= wide + 1) return true }
    return false }
  for (const e of document.querySelectorAll('body *')) {
    const r = e.getBoundingClientRect()
    if (!r.width || !r.height || r.right <= wide + 1 || r.left > 2 * wide && r.top < 0) continue
    const s = getComputedStyle(e)
    if (s.visibility === 'hidden' || s.position === 'fixed' || e.closest('dialog:not([open]), mjx-assistive-mml, [hidden], .visually-hidden')) continue
    if (kept(e) || e.ownerSVGElement) continue
    out.push(`${e.tagName.toLowerCase()}.${e.className} to ${Math.round(r.right)} px: ${(e.innerText ?? '').slice(0, 40)}`) }
  if (document.documentElement.scrollWidth > wide + 1) out.push(`the page is ${document.documentElement.scrollWidth} px wide`)
  // tables and code scroll in a box of their own; other text that is cut has none
  return out.slice(0, 5) }"""


def axe_source():
    "axe-core, from the package that brings it along."
    import axe_playwright_python
    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def serious(page, source, contrast_only=False):
    "List what axe finds on the open page that is serious or critical, and code that can hardly be read."
    page.evaluate(source)
    return [*page.evaluate(AXE, contrast_only), *page.evaluate(CODE)]


def off_screen(page): return page.evaluate(OFF)


@contextlib.contextmanager
def served(folder):
    "The address of a folder, served as `opml docs --serve` does."
    from opml_wb.core.site.build import server
    with server(folder, 0) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def transferred(context, address, act=None):
    "Bytes on the wire that an open page costs a reader without a cache: (all, {address: bytes}); `act(page)` is what the reader does."
    page = context.new_page()
    client = context.new_cdp_session(page)
    client.send("Network.enable")
    client.send("Network.setCacheDisabled", {"cacheDisabled": True})
    named, sizes = {}, {}
    client.on("Network.responseReceived", lambda e: named.__setitem__(e["requestId"], e["response"]["url"]))
    client.on("Network.loadingFinished", lambda e: sizes.__setitem__(e["requestId"], e["encodedDataLength"]))
    page.goto(address, wait_until="networkidle")
    if act: act(page)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)
    page.close()
    found = {named.get(i, i): n for i, n in sizes.items() if not named.get(i, "").startswith("data:")}
    return sum(found.values()), found


def pages_of(folder, parts=()):
    "The pages of a built site, other than those of Sphinx's own files."
    found = sorted(p for p in Path(folder).rglob("*.html") if "_static" not in p.parts and "http-equiv=\"refresh" not in p.read_text())
    return [p for p in found if not parts or any(part in p.relative_to(folder).as_posix() for part in parts)]


def main():
    from playwright.sync_api import sync_playwright
    folder, parts, bad, source = Path(sys.argv[1]), sys.argv[2:], 0, axe_source()
    with sync_playwright() as p, served(folder) as web:
        browser = browser_of(p)
        contexts = {"light": browser.new_context(viewport=WIDE, color_scheme="light"),
                    "dark": browser.new_context(viewport=WIDE, color_scheme="dark"), "phone": browser.new_context(viewport=PHONE)}
        for path in pages_of(folder, parts):
            for name, context in contexts.items():
                page = open_page(context, f"{web}/{path.relative_to(folder)}")
                if "_static/opml.js" in path.read_text(): ready(page)
                found = off_screen(page) if name == "phone" else serious(page, source)
                for line in [*found, *(f"asks for {a}" for a in page.outside)]:
                    print(f"{path.relative_to(folder)} [{name}]: {line}", flush=True)
                    bad += 1
                page.close()
    print(f"{len(pages_of(folder, parts))} pages, {bad} faults")
    return 1 if bad else 0


if __name__ == "__main__": sys.exit(main())

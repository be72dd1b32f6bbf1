"""The measures of whole pages find what they are for."""
import pages
import pytest
from figures import CHROMIUM

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
HEAD = '<!doctype html><html lang="en"><head><title>t</title><meta name="viewport" content="width=device-width"></head><body><main><h1>t</h1>'


@pytest.fixture
def shown(browser):
    "shown(html, viewport) -> a page with it."
    context = browser.new_context(viewport=pages.PHONE)
    def call(html):
        page = context.new_page()
        page.set_content(HEAD + html)
        return page
    yield call
    context.close()


def test_what_lies_off_the_screen_is_found(shown):
    wide = '<div style="width: 600px">wide</div>'
    assert any("to 6" in line for line in pages.off_screen(shown(wide)))
    assert pages.off_screen(shown(f'<div style="overflow-x: auto">{wide}</div><p>short</p>')) == []


def test_what_axe_and_code_refuse_is_found(shown):
    source = pages.axe_source()
    bad = shown('<input type="range"><img src="data:,"><p style="color: #999">pale</p><div class="highlight"><pre><span class="k" style="color: #aaa">if</span></pre></div>')
    found = " ".join(pages.serious(bad, source))
    for rule in ("label:", "image-alt:", "color-contrast:", "code k"): assert rule in found, found
    assert "label:" not in " ".join(pages.serious(bad, source, contrast_only=True))
    assert pages.serious(shown('<label>n <input type="range"></label><p>dark</p>'), source) == []
    alike, odd = "<li>word</li>" * 300, ('<li style="color: #aaa">pale</li>', '<li><a href="#" style="color: #aaa">pale</a></li>', '<li style="background: #333">dark</li>',
                                         '<li style="opacity: .4">faint</li>')
    for one in odd:
        for page in shown(f"<ul>{alike}{one}{alike}</ul>"), shown(f'<div style="background: #fafafa"><ul>{alike}{one}</ul></div>'):
            assert any(line.startswith("color-contrast: ") for line in pages.serious(page, source, contrast_only=True)), one
    assert pages.serious(shown(f"<ul>{alike}<li>word <b>and</b></li></ul>"), source) == []


def test_bytes_on_the_wire_are_counted(browser, tmp_path):
    (tmp_path / "a.html").write_text(HEAD + '<script src="a.js"></script>')
    (tmp_path / "a.js").write_text("// " + "x" * 100_000)
    (tmp_path / "b.bin").write_bytes(bytes(50_000))
    context = browser.new_context()
    with pages.served(tmp_path) as address:
        cost, parts = pages.transferred(context, f"{address}/a.html")
        more, _ = pages.transferred(context, f"{address}/a.html", lambda page: page.evaluate("() => fetch('b.bin').then(r => r.text())"))
    context.close()
    script = next(n for name, n in parts.items() if name.endswith("a.js"))
    assert 100 < script < 2_000 and script < cost < 5_000 and more - cost > 49_000     # packed; bytes that aren't text as they are

"""The docs site's settings. `opml docs` copies this file beside the pages it makes and runs Sphinx there."""
from os.path import commonprefix

from sphinx.domains.python import PythonDomain

from opml_wb import __version__

project, author, version, release = "opml_wb", "The opml_wb authors", __version__, __version__
copyright = "2026 onwards, the opml_wb authors"
language = "en"

extensions = ["myst_nb"]
exclude_patterns = ["notebooks"]
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "deflist", "dollarmath", "strikethrough"]
myst_heading_anchors, myst_heading_slug_func = 3, "opml_wb.core.site.pages.anchor"  # for links such as glossary.md#recall-k
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}                       # ours draws them: _static/opml.js
suppress_warnings = ["myst.header",         # prose may go from ## to ####
                     "misc.highlighting_failure"]  # %magics and !shell lines in examples
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
mathjax_path = "mathjax/tex-svg.js"

html_theme = "pydata_sphinx_theme"
html_title = "opml_wb"
html_context = {"default_mode": "auto"}    # light or dark as the reader's system says
html_static_path = ["_static"]
html_extra_path = ["extra"]                 # pages at the addresses of before
html_css_files = ["opml.css"]
html_copy_source = html_show_sourcelink = False
templates_path = ["_templates"]
html_sidebars = {"index": [], "api/**": ["rooms"]}
html_theme_options = {
    "logo": {"text": "opml_wb"}, "navbar_end": ["theme-switcher"], "footer_start": ["copyright"], "footer_end": [],
    "secondary_sidebar_items": ["page-toc"], "navigation_depth": 3, "show_toc_level": 2, "primary_sidebar_end": [],
    "pygments_light_style": "a11y-high-contrast-light", "pygments_dark_style": "a11y-high-contrast-dark",
    "search_bar_text": "Search chapters and API", "back_to_top_button": False,
}


class Nearest(PythonDomain):
    "Types in signatures lead to the class that is meant: of several with one name, that of the nearest module."
    narrowed = None

    @property
    def objects(self):
        return self.data.setdefault("objects", {}) if self.narrowed is None else self.narrowed

    def find_obj(self, env, modname, classname, name, type, searchmode=0):
        # Sphinx goes through all objects for each name; those with the same last part will do
        every, last = self.objects, name.removesuffix("()").rpartition(".")[2]
        known = self.__dict__.setdefault("by_last", {})
        if self.__dict__.get("counted") != len(every):
            known.clear()
            for whole, entry in every.items(): known.setdefault(whole.rpartition(".")[2], {})[whole] = entry
            self.counted = len(every)
        self.narrowed = known.get(last, {})
        try: found = super().find_obj(env, modname, classname, name, type, searchmode)
        finally: self.narrowed = None
        def near(match): return len(commonprefix([match[0].split("."), (modname or "").split(".")]))
        return [max(found, key=near)] if len(found) > 1 else found


def scripts(app, pagename, templatename, context, doctree):
    "Only pages with a figure or a widget carry what draws them; plotly is loaded when a reader touches a figure."
    body = context.get("body") or ""
    if 'class="opml-fig"' in body or "vnd.jupyter.widget-view+json" in body: app.add_js_file("opml.js", priority=700)


def rooms(app, pagename, templatename, context, doctree):
    "The side of an API page, for _templates/rooms.html: (page, its name, what stands in it where it is open)."
    if not pagename.startswith("api/"): return
    listed = app.env.toctree_includes["api/index"]
    def inside(room):
        found = [page for page in listed if page.rpartition("/")[0] == room]
        return [(page, page.rpartition("/")[2], inside(page) if f"{pagename}/".startswith(f"{page}/") else []) for page in found]
    context["rooms"] = inside("api")


def setup(app):
    app.add_domain(Nearest, override=True)
    app.connect("html-page-context", scripts)
    app.connect("html-page-context", rooms)

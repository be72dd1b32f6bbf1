"""Measures of the source: imports, classes, names, docstrings, hints, cells. `python tests/house.py [ROOM]` prints them, ROOM such as `riann`.

`test_house.py` holds them against their bounds; nothing of the package is imported here."""
import ast
import gc
import json
import re
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NBS = ROOT / "opml_wb", ROOT / "nbs"
# papers that use another one's public names: what feeds what
JOINTS = {"moderation": {"opml_wb.flexserve", "opml_wb.flexserve.serve", "opml_wb.provenance"}}
WINGS = "kit", "record", "request", "engine", "show", "sweep", "site", "cli"  # of core; each imports from those before it
EXPORT = re.compile(r"#\|\s*exports?\b")
BARE = re.compile(r"(What|Who|Whose|Which|When|Where|How|Whether|Why|That|Whatever)\b")
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


@lru_cache(None)
def modules():
    "{dotted name: (path, syntax tree)} of the package. They stay: the collector is not to look at them again and again."
    out = {}
    gc.disable()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "_modidx.py": continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        out[name] = path, ast.parse(path.read_text(encoding="utf-8"))
    gc.freeze()
    gc.enable()
    return out


@lru_cache(None)
def nodes(name):
    "Every node of a module's syntax tree, walked once for all measures."
    return list(ast.walk(modules()[name][1]))


def checkers_only(name):
    "The nodes of a module under `if TYPE_CHECKING:`, which are not executed."
    ifs = [n for n in nodes(name) if isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"]
    return {id(x) for i in ifs for statement in i.body for x in ast.walk(statement)}


@lru_cache(None)
def imported(name):
    "[(line, module of ours, name from it or None)] that module `name` imports, also inside functions."
    path, _ = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    unseen, out = checkers_only(name), []
    for node in nodes(name):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or id(node) in unseen: continue
        if isinstance(node, ast.Import): out += [(node.lineno, a.name, None) for a in node.names if a.name in modules()]
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[:len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            for a in node.names:
                if f"{base}.{a.name}" in modules(): out.append((node.lineno, f"{base}.{a.name}", None))
                elif base in modules(): out.append((node.lineno, base, a.name))
    return out


def room(name):
    "Where a module stands: a wing (`core.kit`, `riann.graph`), or itself when it lies in no wing."
    parts = name.split(".")[1:]
    return ".".join(parts[:2]) if len(parts) >= 2 else ".".join(parts)


def circles(graph):
    "Sets of nodes that reach each other in `graph`, {node: nodes}: Tarjan's algorithm."
    index, low, stack, out = {}, {}, [], []
    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in graph.get(v, ()):
            if w not in index: visit(w)
            if w in stack: low[v] = min(low[v], low[w])
        if low[v] == index[v]:
            group = [stack.pop()]
            while group[-1] != v: group.append(stack.pop())
            if len(group) > 1: out.append(sorted(group))
    for v in list(graph):
        if v not in index: visit(v)
    return out


def module_circles():
    "Circles among modules; a package's `__init__` stands for nothing but itself."
    return circles({m: {to for _, to, _ in imported(m) if to != m} for m in modules()})


def room_circles():
    "Circles among the rooms: wings and modules in none."
    graph = defaultdict(set)
    for m in modules():
        for _, to, _ in imported(m):
            if room(m) != room(to) and modules()[to][0].name != "__init__.py": graph[room(m)].add(room(to))
    return circles(graph)


def upward():
    "Imports that lead upwards: core to a paper, a wing of core to one above it, paper to paper."
    out = []
    for m in modules():
        here = m.split(".")[1:]
        for line, to, _ in imported(m):
            there = to.split(".")[1:]
            if not here or not there: continue
            if here[0] == "core" != there[0]: out.append(f"{m}:{line} -> {to}: core knows no paper")
            elif "core" not in (here[0], there[0]) and here[0] != there[0] and to not in JOINTS.get(here[0], ()): out.append(f"{m}:{line} -> {to}: paper to paper")
            elif here[0] == there[0] == "core" and len(here) > 1 and len(there) > 1 and WINGS.index(there[1]) > WINGS.index(here[1]):
                out.append(f"{m}:{line} -> {to}: upwards")
    return out


def slices():
    "Private classes of ours with exactly one subclass: [module base -> subclass]."
    below, own = defaultdict(list), {}
    for m in modules():
        for node in nodes(m):
            if isinstance(node, ast.ClassDef):
                own[node.name] = m
                for b in node.bases: below[ast.unparse(b).rpartition(".")[2]].append(node.name)
    return sorted(f"{own[b]} {b} -> {subs[0]}" for b, subs in below.items() if b.startswith("_") and b in own and len(subs) == 1)


def hung():
    "Methods hung on a class by assignment: [module:line Class.name]."
    return [f"{m}:{n.lineno} {ast.unparse(t)}" for m, (_, tree) in modules().items() for n in tree.body if isinstance(n, ast.Assign)
            for t in n.targets if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id[:1].isupper()]


def private_uses():
    "Uses of another module's `_name`: imported, or as an attribute of an imported module."
    out = []
    for m in modules():
        out += [f"{m}:{line} {to}.{name}" for line, to, name in imported(m) if name and re.match(r"_[^_]", name)]
        names = {to.rpartition(".")[2] for _, to, name in imported(m) if name is None}
        out += [f"{m}:{n.lineno} {ast.unparse(n)}" for n in nodes(m) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                and n.value.id in names and re.match(r"_[^_]", n.attr)]
    return sorted(set(out))


@lru_cache(None)
def documented():
    "[(place, docstring)] of every function and class."
    return [(f"{m}:{n.lineno} {n.name}", d) for m in modules() for n in nodes(m)
            if isinstance(n, (*FUNCTIONS, ast.ClassDef)) and (d := ast.get_docstring(n))]


def bare_clauses():
    "Docstrings that open with a bare what / who / when clause: [place 'its first words']."
    return [f"{where} {d.splitlines()[0][:60]!r}" for where, d in documented() if BARE.match(d) and "?" not in d.splitlines()[0]]


def public():
    "[(place, function node, is a method)] of the public functions, and public methods of public classes."
    out = []
    def visit(m, body, method):
        for n in body:
            if isinstance(n, ast.ClassDef) and not n.name.startswith("_"): visit(m, n.body, True)
            if isinstance(n, FUNCTIONS) and not n.name.startswith("_"): out.append((f"{m}:{n.lineno} {n.name}", n, method))
    for m, (_, tree) in modules().items(): visit(m, tree.body, False)
    return out


def unhinted():
    "Public functions and methods whose hints are incomplete: [place]."
    def whole(n, method):
        a = n.args
        args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        if method and args and args[0].arg in ("self", "cls"): args = args[1:]
        return n.returns is not None and all(x.annotation for x in args)
    return [where for where, n, method in public() if not whole(n, method)]


@lru_cache(None)
def cells(path):
    "[(type, source)] of a notebook's cells."
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def sources():
    "The source notebooks: those that export a module."
    found = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    return [p for p in found if any(kind == "code" and re.match(r"#\|\s*default_exp\b", s) for kind, s in cells(p))]


@lru_cache(None)
def exported():
    "[(notebook, source, has a visible example before the next export)] of every exported cell that does more than import."
    out = []
    for p in sources():
        code = [s for kind, s in cells(p) if kind == "code"]
        for i, s in enumerate(code):
            if not EXPORT.match(s): continue
            if all(isinstance(n, (ast.Import, ast.ImportFrom, ast.Expr, ast.If)) for n in ast.parse(s).body): continue
            rest = [t for t in code[i + 1:]]
            until = next((j for j, t in enumerate(rest) if EXPORT.match(t)), len(rest))
            out.append((p.relative_to(NBS).as_posix(), s, any(not re.match(r"#\|", t) for t in rest[:until])))
    return out


def lengths():
    "[(lines, notebook)] of every exported cell, ascending; the directive line doesn't count."
    return sorted((len(s.strip("\n").splitlines()) - 1, p) for p, s, _ in exported())


def wide():
    "Code lines that are too wide: [notebook: line]; 88 columns in chapters, 100 elsewhere."
    out = []
    for p in sorted(NBS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in p.parts: continue
        most = 88 if p.parent.name == "chapters" else 100
        out += [f"{p.relative_to(NBS).as_posix()}: {line[:60]}" for kind, s in cells(p) if kind == "code" for line in s.splitlines() if len(line) > most]
    return out


def module_lines():
    "[(lines, module)], without `__init__` and `__main__`, ascending; nbdev's cell headers and blank lines don't count."
    def count(path): return sum(bool(line.strip()) and not line.startswith("# %%") for line in path.read_text(encoding="utf-8").splitlines())
    return sorted((count(p), m) for m, (p, _) in modules().items() if not p.name.startswith("__"))


SECTIONS = "Claim", "Parameters", "The problem", "The system", "Play", "Experiment", "Ours beside the paper's", "Beyond the paper", "Limits", "Try next"


def chapter_form(path):
    "What a chapter lacks of the form that all have: list of lines."
    all_cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(c["cell_type"], "".join(c["source"])) for c in all_cells]
    prose, code = ("\n".join(t for kind, t in texts if kind == k) for k in ("markdown", "code"))
    found = [m[1].strip() for m in re.finditer(r"^## \d+ (.*)$", prose, re.M)]
    out = [f"sections: {found}"] if [f.replace("’", "'") for f in found] != list(SECTIONS) else []
    if not re.search(r"\]\(https?://", texts[0][1]): out.append("the first cell links the paper")
    box = next((t for kind, t in texts if kind == "markdown" and re.search(r"^> \*\*What you need to know", t, re.M)), "")
    if "](" not in box: out.append("no box `> **What you need to know.**` with links")
    if "glossary.md#" not in prose: out.append("no term leads to the glossary")
    shown = [i for i, (kind, t) in enumerate(texts) if kind == "markdown" for _ in re.findall(r"\$\$.+?\$\$", t, re.S)]
    if len(shown) < 4: out.append(f"{len(shown)} displayed formulas, 4 are asked for")
    for i in sorted(set(shown)):
        below = next((t for kind, t in texts[i + 1:] if kind == "code"), "")
        if "assert" not in below and "test_eq" not in below: out.append(f"no assert below the formula of cell {i}: {texts[i][1][:60]!r}")
    drawn = re.findall(r"\.add_(?:scatter|bar|histogram|heatmap|hline|vline|vrect|hrect|annotation|trace)\w*\(|make_subplots|graph_objects", code)
    if drawn: out.append(f"raw plotly: {sorted(set(drawn))}")
    if code.count("claims_table(") != 1: out.append("claims are shown once, by ui.claims_table")
    if "### Your own data" not in prose: out.append("no section `### Your own data`")
    if prose.count("<details>") < 3: out.append("three exercises, each with its answer folded")
    return out + [f"cell {i}: a line of {len(line)} columns" for i, (kind, t) in enumerate(texts) if kind == "code" for line in t.splitlines() if len(line) > 88]


def report(where=""):
    "Print the measures of the modules and notebooks whose name holds `where`."
    dotted, slashed = where.replace("/", "."), where.replace(".", "/")
    def here(rows): return [r for r in rows if dotted in str(r) or slashed in str(r)]
    def tell(what, rows, most=8): print(f"{what}: {len(rows)}" + "".join(f"\n    {r}" for r in rows[:most]))
    tell("circles of modules", here(module_circles()))
    tell("circles of rooms", here(room_circles()))
    tell("imports upwards", here(upward()))
    tell("private classes with one subclass", here(slices()), 60 if where else 8)
    tell("methods hung on a class", here(hung()))
    tell("uses of another module's _name", here(private_uses()))
    tell("docstrings that open with a bare clause", here(bare_clauses()), 40 if where else 8)
    names = here([w for w, *_ in public()])
    print(f"public functions and methods with complete hints: {len(names) - len(here(unhinted()))} of {len(names)}")
    rows = [r for r in exported() if slashed in r[0]]
    size = sorted(len(s.strip("\n").splitlines()) - 1 for _, s, _ in rows)
    print(f"exported cells: {len(size)}, median {size[len(size) // 2]} lines, 9 in 10 up to {size[len(size) * 9 // 10]}, longest {size[-1]}, "
          f"{sum(n > 60 for n in size)} above 60; with a visible example: {sum(x for *_, x in rows) / len(rows):.0%}")
    tell("lines too wide", here(wide()))
    sizes = [r for r in module_lines() if dotted in r[1]]
    tell("modules outside 60 to 300 lines", [r for r in sizes if not 60 <= r[0] <= 300], 20)
    chars = {m: sum(len(line) + 1 for line in p.read_text().splitlines() if not line.startswith("# %%")) for m, (p, _) in modules().items() if dotted in m}
    for p in sorted((NBS / "chapters").glob("*.ipynb")):
        if slashed.split("/")[0] in p.stem: tell(f"form of chapter {p.stem}", chapter_form(p), 30)
    print(f"characters: {sum(chars.values()):,} without cell headers")


if __name__ == "__main__": report(*sys.argv[1:2])

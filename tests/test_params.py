"""Parameters: properties, every refusal, and stock papermill beside ours."""
import copy
import datetime
import decimal
import enum
import json
import math
import subprocess
import sys
import uuid
import zoneinfo
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from opml_wb.core.request.params import ParamError, canonical, defaults, describe, inject, resolve, schema, validate

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
                    max_leaves=12)
CELL = '''
from typing import Annotated, Literal
from opml_wb.core.request.params import Range
%matplotlib inline
n: Annotated[int, Range(1, 100)] = 10     # how many
rate: Annotated[float, Range(0, 1)] = .5
kind: Literal["a", "b"] = "a"
level: Literal[1, 2] = 1
sizes: list[int] = [1, 2]
share: float | None = None
name = "x"
on = False
free = None
table = {}
'''


def notebook(*sources, parameters=(0,), minor=5):
    """Code cells, those numbered in `parameters` tagged."""
    return dict(nbformat=4, nbformat_minor=minor, metadata={}, cells=[
        dict(cell_type="code", id=f"cell{i}", source=s, outputs=[], execution_count=None,
             metadata={"tags": ["parameters"] if i in parameters else []}) for i, s in enumerate(sources)])


def same(a, b):
    """Equal, and of equal types all the way down (True is not 1, 1 is not 1.0, -0.0 is not 0.0)."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def executed(nb):
    """What the injected cell's source sets."""
    [cell] = [c for c in nb["cells"] if "injected-parameters" in c["metadata"].get("tags", [])]
    scope = {}
    exec("".join(cell["source"]), scope)
    return {k: v for k, v in scope.items() if k != "__builtins__"}


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["n", "été", "_x", "json"]), JSON))
def test_injected_values_come_back_exactly(values):
    from IPython.core.inputtransformer2 import TransformerManager
    nb = notebook("n = 1", "print(n)")
    before = copy.deepcopy(nb)
    new = inject(nb, values)
    assert nb == before
    if not values:
        assert new == nb
        return
    assert same(executed(new), values)
    source = new["cells"][1]["source"]
    assert TransformerManager().transform_cell(source) == source      # no line of it is a magic
    assert inject(new, values) == new and inject(new, {}) == nb


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_canonical_leaves_json_alone_and_is_new(value):
    assert same(canonical(value), value)
    assert same(json.loads(json.dumps(canonical(value))), value)


@settings(max_examples=100, deadline=None)
@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers()), JSON, TEXT)
def test_texts_of_the_command_line(n, x, sizes, free, name):
    nb = notebook("n: int = 0\nx: float = 0\nsizes: list[int] = []\nfree: 'Any' = 0\ntable: dict = {}\n"
                  "name: str = ''\nbare: list[int] = []")
    text = dict(n=str(n), x=repr(x), sizes=json.dumps(sizes), free=json.dumps(free), table=repr({"a": free}), name=name,
                bare=",".join(map(str, sizes)))
    expected = dict(n=n, x=x, sizes=sizes, free=free, table={"a": free}, name=name, bare=sizes)
    assert same(resolve(nb, text=text), expected)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["n", "rate", "kind", "level", "sizes", "share", "name", "on", "free", "table"]),
       st.text() | st.from_regex(r"[\[\{\"'(]{0,3}[0-9a-z,.\-]{0,5}[\]\}\"')]{0,3}", fullmatch=True))
def test_any_text_is_a_value_or_a_parameter_error(name, text):
    nb = notebook(CELL)
    try:
        value = validate(nb, text={name: text})
    except ParamError as error:
        assert error.param == name and repr(name) in str(error)
    else:
        assert same(validate(nb, value), value)       # what was accepted is accepted again
        json.dumps(value, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.lists(st.sampled_from(CELL.splitlines() + ["n += 1", "a, *b = 1, 2", "if n:", "%%time", "x = (",
                                                                 '"""', "del n"])).map("\n".join))
def test_any_cell_is_read_or_refused(source):
    try:
        rows = describe(notebook(source))
    except ParamError as error:
        assert error.cell == 0
    else:
        assert [r["name"] for r in rows if r["known"]] == list(defaults(notebook(source)))
        json.dumps(rows, allow_nan=False)


def test_numpy_values_of_a_preset_arrive_as_numbers():
    nb = notebook(CELL)
    preset = dict(n=np.int64(3), rate=np.float32(.25), kind=np.str_("b"), sizes=np.array([4, 5]), share=np.float64(.1),
                  on=np.bool_(True),
                  free=(np.int8(1), {"a": np.array(2)}), level=np.uint8(2))
    expected = dict(n=3, rate=.25, kind="b", level=2, sizes=[4, 5], share=.1, on=True, free={"$tuple": [1, {"a": 2}]})
    assert same(validate(nb, preset), expected)
    assert executed(inject(nb, validate(nb, preset))) == {**expected, "free": (1, {"a": 2})}
    assert list(resolve(nb, preset)) == [r["name"] for r in describe(nb)]


@pytest.mark.parametrize("given, said", [
    (dict(rates=1), "unknown parameter 'rates'; did you mean 'rate'?"),
    (dict(N=3), "unknown parameter 'N'; did you mean 'n'?"),
    (dict(n=101), "parameter 'n': expected int from 1 to 100, got 101 (int)"),
    (dict(n=0), "expected int from 1 to 100"),
    (dict(n=3.0), "got 3.0 (float)"),
    (dict(n=np.float64(3)), "got 3.0 (float)"),
    (dict(n=True), "got True (bool)"),
    (dict(n="3"), "got '3' (str)"),
    (dict(n=None), "got None (NoneType)"),
    (dict(rate=True), "expected float from 0 to 1, got True"),
    (dict(rate=1.5), "expected float from 0 to 1, got 1.5"),
    (dict(rate=math.nan), "parameter 'rate'"),
    (dict(rate=np.float32("inf")), "parameter 'rate'"),
    (dict(free=[1, {"a": math.nan}]), "got nan at [1]['a']"),
    (dict(kind="c"), "parameter 'kind': expected one of 'a' | 'b', got 'c'"),
    (dict(level=True), "expected one of 1 | 2, got True (bool)"),
    (dict(level=3), "expected one of 1 | 2, got 3 (int)"),
    (dict(sizes=[1, "x"]), "parameter 'sizes': expected list[int], got 'x' (str) at [1]"),
    (dict(sizes=3), "expected list[int], got 3"),
    (dict(share="x"), "expected float | None, got 'x'"),
    (dict(on=1), "expected bool, got 1 (int)"),
    (dict(name=3), "expected str, got 3 (int)"),
    (dict(table=[1]), "expected dict, got [1]"),
    (dict(table={1: 2}), "keys must be str"),
    (dict(free=1j), "got 1j (builtins.complex)"),
    (dict(name=datetime.date(2020, 1, 2)), "expected str, got datetime.date(2020, 1, 2) (date)"),
    (dict(name=Path("x")), "expected str, got Path('x') (PosixPath)"),
    (dict(sizes=(1, 2.5)), "expected list[int], got 2.5 (float) at [1]"),
    (dict(free=object()), "builtins.object"),
])
def test_refused_values(given, said):
    nb = notebook(CELL)
    for check in (resolve, validate):
        with pytest.raises(ParamError) as caught:
            check(nb, given)
        assert said in str(caught.value).replace("PosixPath('", "Path('")   # fastcore, once imported, writes a path so
        assert caught.value.param == next(iter(given)) and caught.value.param in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text, said", [
    (dict(n="abc"), "parameter 'n': expected int from 1 to 100, got 'abc' (str)"),
    (dict(n="1e1"), "expected int"), (dict(n=""), "expected int"), (dict(n="200"), "got 200 (int)"),
    (dict(rate="NaN"), "got nan"), (dict(rate="-inf"), "got -inf"), (dict(free="NaN"), "got nan"),
                                        (dict(free="[1e999]"), "got inf at [0]"),
    (dict(on="maybe"), "expected bool, got 'maybe'"), (dict(sizes="1,x"), "expected list[int]"),
                                        (dict(table="{"), "expected dict"),
    (dict(kind="c"), "expected one of"), (dict(name="a\udcff"), "lone surrogate"),
])
def test_refused_texts(text, said):
    with pytest.raises(ParamError, match="parameter '(n|rate|free|on|sizes|table|kind|name)'") as caught:
        resolve(notebook(CELL), text=text)
    assert said in str(caught.value)


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ParamError) as caught:
        resolve(notebook(CELL), dict(n=0, kind="c", nmae=1))
    for said in ("parameter 'n'", "parameter 'kind'", "did you mean 'name'?"):
        assert said in str(caught.value)
    assert str(caught.value).startswith("unknown") and caught.value.param == "nmae"


def test_a_default_that_is_changed_later_is_not_believed():
    nb = notebook("a = 1\nb = [1]\nc = 2\na += 1\nb[0] = 5\nfor c in range(3): pass\nd = a")
    assert [(r["name"], r["known"], r["type"]) for r in describe(nb)] == [
        ("a", False, "int"), ("b", False, "list"), ("c", False, "int"), ("d", False, "any")]
    assert resolve(nb, dict(a=4)) == dict(a=4)


def test_the_copy_shares_nothing():
    nb = notebook("a = 1", "a")
    before = copy.deepcopy(nb)
    new = inject(nb, dict(a=2))
    for cell in new["cells"]:
        cell["outputs"].append("x")
        cell["metadata"]["tags"].append("y")
    new["metadata"]["z"] = 1
    assert nb == before


def typed(kind):
    """A notebook whose tagged cell is of another kind."""
    nb = notebook("a = 1", "b = 2", parameters=[1])
    nb["cells"][1]["cell_type"] = kind
    return nb


@pytest.mark.parametrize("read", [schema, describe, resolve, validate, defaults, lambda nb: inject(nb, {})])
@pytest.mark.parametrize("nb, said, cell", [
    (notebook("a = 1", "", "a = 2", parameters=[0, 2]), "cells 0, 2 (from 0) are all tagged 'parameters'", 2),
    (typed("markdown"), "cell 1 (from 0) is tagged 'parameters', but is a markdown cell", 1),
    (typed("raw"), "is a raw cell", 1), ({}, "not a notebook", None), ([], "not a notebook", None),
])
def test_cells_that_cannot_be_the_one(nb, said, cell, read):
    with pytest.raises(ParamError) as caught:
        read(nb)
    assert said in str(caught.value) and caught.value.cell == cell and caught.value.param is None


@pytest.mark.parametrize("read", [describe, resolve, validate, defaults])
@pytest.mark.parametrize("source, said, param", [
    ("a = 1\nb = \n", "cell 1, from 0) is not Python: invalid syntax, line 2: 'b ='", None),
    ("a: 'Annotated[int, Range(3, 1)]' = 2", "parameter 'a' (cell 1, from 0): 3 > 1", "a"),
    ("a: 'Annotated[str, Range(0, 1)]' = 2", "bounds belong to int or float, not to str", "a"),
    ("a: 'Annotated[int, Range(3, 4)]' = 2",
     "the default of parameter 'a' (cell 1, from 0): expected int from 3 to 4, got 2", "a"),
    ("a: int = 'x'", "the default of parameter 'a' (cell 1, from 0): expected int, got 'x' (str)", "a"),
    ("a: 'Annotated[int, Field(min_length=1)]' = 3", "doesn't fit", None),
])
def test_cells_that_cannot_be_read(source, said, param, read):
    with pytest.raises(ParamError) as caught:
        read(notebook("", source, parameters=[1]))
    assert said in str(caught.value) and caught.value.cell == 1 and caught.value.param == param


def test_values_without_a_parameters_cell():
    nb = notebook("a = 1", "b = 2", parameters=[])
    nb["cells"].insert(0, dict(cell_type="markdown", id="m", metadata={}, source="# Title"))
    assert describe(nb) == [] and resolve(nb) == {} and inject(nb, {}) == nb and schema(nb).__cell__ is None
    for refuse in (lambda: resolve(nb, dict(a=1)), lambda: validate(nb, text=dict(a="1")),
                   lambda: inject(nb, dict(a=1))):
        with pytest.raises(ParamError, match="no cell is tagged 'parameters'") as caught:
            refuse()
        assert caught.value.cell == 1 and "code cells: 1, 2): tag the one" in str(caught.value)


def test_nothing_is_executed(tmp_path):
    nb = notebook(f"from pathlib import Path\nx = Path({str(tmp_path)!r}, 'seen').write_text('!')\n"
                  f"y = open({str(tmp_path / 'seen')!r}, 'w')\n"
                  "z = [print(1)]\nbig = 9 ** 9 ** 9\nrow = [0] * 10 ** 12\nm: __import__('os').system('exit 3') = 1")
    rows = describe(nb)
    assert [(r["name"], r["known"]) for r in rows] == [("x", False), ("y", False), ("z", False), ("big", False),
                                                       ("row", False), ("m", True)]
    assert not list(tmp_path.iterdir()) and resolve(nb) == {"m": 1}
    assert resolve(nb, dict(x="given")) == {"x": "given", "m": 1}


def test_importing_stays_light():
    code = """if True:
        import sys, opml_wb.core.request.params as p
        p.canonical([1])
        heavy = {"pydantic", "numpy", "IPython", "nbformat", "papermill"} & set(sys.modules)
        assert not heavy, heavy
        nb = {"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "a = 1"}]}
        assert p.resolve(nb, {"a": 2}) == {"a": 2} and "numpy" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_result_is_a_notebook():
    import nbformat
    for minor in (4, 5):
        nb = notebook("n = 1", "n", minor=minor)
        if minor == 4:
            for cell in nb["cells"]:
                del cell["id"]
        nbformat.validate(inject(nb, dict(n=2)))
    node = nbformat.from_dict(notebook("n = 1", "n"))
    new = inject(node, dict(n=2))
    nbformat.validate(new)
    assert new.cells[1].metadata.tags == ["injected-parameters"] and len(node.cells) == 2


SIMPLE = ['a = 1  # the first\nb: float = 2.5\nc = "text"  # a text\nd = [1, 2]\ne = None\nf = True',
          'import os\nalpha: int = 3  # strength\n\n# a heading\n\nbeta = {"k": 1}  # table',
          "x = 10  # type: int  how many\ny = -1.5"]


@pytest.mark.parametrize("source", SIMPLE)
def test_papermill_reads_the_same_parameters(source, tmp_path):
    import papermill
    nb = notebook(source)
    nb["metadata"]["kernelspec"] = dict(name="python3", language="python", display_name="Python 3")
    path = tmp_path / "simple.ipynb"
    path.write_text(json.dumps(nb), encoding="utf-8")
    theirs = papermill.inspect_notebook(str(path))
    ours = {r["name"]: r for r in describe(nb)}
    assert list(theirs) == list(ours)
    for name, p in theirs.items():
        assert eval(p["default"]) == ours[name]["default"] and p["help"] == ours[name]["help"]
        assert p["inferred_type_name"] in ("None", ours[name]["type"])


@pytest.mark.parametrize("values", [dict(a=2), dict(a=True, b=None, c='é "q" \\ \n\t x'),
                                    dict(c=[1, [2.5, {"k": None}]], a=-3), dict(b={"x": [True]})])
def test_papermill_injects_the_same_cell(values):
    import nbformat
    from papermill.parameterize import parameterize_notebook
    nb = notebook("a = 1\nb = 2\nc = 3", "print(a)")
    nb["metadata"] = dict(kernelspec=dict(name="python3", language="python", display_name="Python 3"), papermill={})
    theirs = parameterize_notebook(nbformat.from_dict(copy.deepcopy(nb)), values)
    ours = inject(nb, values)
    assert [c["metadata"].get("tags", []) for c in ours["cells"]] == [c.metadata.get("tags", []) for c in theirs.cells]
    assert same(executed(ours), executed(theirs)) and same(executed(ours), values)
    again = parameterize_notebook(nbformat.from_dict(copy.deepcopy(ours)),
                                  dict(a=9))       # papermill replaces our cell, and we its
    assert len(again.cells) == 3 and executed(again) == {"a": 9} and executed(inject(again, dict(a=8))) == {"a": 8}


# --- values that JSON lacks: on every way they arrive as what they are ---------------------------------------------

TYPED = '''
import opml_wb
import datetime as dt
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from uuid import UUID
import shades
from shades import Level
class Kind(Enum):
    A = 1
    B = "two"
day: date = date(2020, 1, 1)
when: "datetime | None" = None
at = time(9)
span = timedelta(hours=2)
price: Decimal = Decimal("1.1")
code: UUID = UUID("00000000-0000-0000-0000-000000000001")
pair: tuple[int, dt.date] = (1, dt.date(2020, 1, 1))
some: frozenset[int] = frozenset({1})
file: Path = Path("x")
kind: Kind = Kind.A
shade: "shades.Shade" = shades.Shade.LIGHT
level: Level = Level.LOW
days: list[date] = []
either: date | str = "x"
free = None
'''
SHADES = "from enum import Enum, IntEnum\nclass Shade(Enum):\n    LIGHT, DARK = 'l', 'd'\n    BLACK = 'b'\nclass Level(IntEnum):\n    LOW = 1\n    HIGH = 2\n"
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
Kind = enum.Enum("Kind", {"A": 1, "B": "two"})
Shade, Level = enum.Enum("Shade", {"BLACK": "b"}), enum.IntEnum("Level", {"HIGH": 2})
D = datetime
# (parameter, what Python gives, what a command line says, what a record has, what arrives)
ARRIVE = [
    ("day", D.date(2021, 2, 3), "2021-02-03", "2021-02-03", D.date(2021, 2, 3)),
    ("day", np.datetime64("2021-02-03"), "2021-02-03", "2021-02-03", D.date(2021, 2, 3)),
    ("when", D.datetime(2021, 2, 3, 4, 5), "2021-02-03T04:05", "2021-02-03T04:05:00", D.datetime(2021, 2, 3, 4, 5)),
    ("when", D.datetime(2021, 2, 3, 4, tzinfo=D.timezone.utc), "2021-02-03T04:00Z", "2021-02-03T04:00:00+00:00",
     D.datetime(2021, 2, 3, 4, tzinfo=D.timezone.utc)),
    ("when", D.datetime(2021, 7, 3, 4, tzinfo=BERLIN), "2021-07-03T04:00[Europe/Berlin]", "2021-07-03T04:00:00+02:00[Europe/Berlin]",
     D.datetime(2021, 7, 3, 4, tzinfo=BERLIN)),
    ("when", None, "none", None, None),
    ("at", D.time(10, 30), "10:30", "10:30:00", D.time(10, 30)),
    ("span", D.timedelta(days=1), "24h", "1 day, 0:00:00", D.timedelta(hours=24)),
    ("price", decimal.Decimal("2.50"), "2.50", "2.50", decimal.Decimal("2.50")),
    ("code", uuid.UUID(int=7), str(uuid.UUID(int=7)).upper(), str(uuid.UUID(int=7)), uuid.UUID(int=7)),
    ("pair", (np.int64(3), D.date(2021, 2, 3)), "3,2021-02-03", [3, "2021-02-03"], (3, D.date(2021, 2, 3))),
    ("some", frozenset({3, 1}), "3,1", [1, 3], frozenset({1, 3})),
    ("file", Path("/a b/c"), "/a b/c", "/a b/c", Path("/a b/c")),
    ("kind", Kind.B, "B", "B", "Kind.B"), ("kind", "two", "Kind.B", "B", "Kind.B"),
    ("shade", Shade.BLACK, "BLACK", "BLACK", "Shade.BLACK"), ("level", Level.HIGH, "2", "HIGH", "Level.HIGH"),
    ("days", [D.date(2021, 2, 3)], "2021-02-03", ["2021-02-03"], [D.date(2021, 2, 3)]),
    ("either", D.date(2021, 2, 3), "2021-02-03", {"$date": "2021-02-03"}, D.date(2021, 2, 3)),
    ("free", (1, D.date(2021, 2, 3)), '{"$tuple": [1, {"$date": "2021-02-03"}]}', {"$tuple": [1, {"$date": "2021-02-03"}]},
     (1, D.date(2021, 2, 3))),
]


@pytest.fixture
def typed_notebook(tmp_path):
    from opml_wb.core.request.chapter import find
    (tmp_path / "shades.py").write_text(SHADES)
    nb = notebook(TYPED)
    nb["metadata"]["kernelspec"] = dict(name="python3", language="python", display_name="Python 3")
    (tmp_path / "typed.ipynb").write_text(json.dumps(nb))
    return find(tmp_path / "typed.ipynb")


def arrived(source, name, tmp_path, monkeypatch):
    "What the parameters cell and then the injected `source` leave in `name`, members of enums as text."
    monkeypatch.syspath_prepend(str(tmp_path))
    scope = {"__name__": "cell"}
    exec(TYPED, scope)
    exec("".join(source), scope)
    sys.modules.pop("shades", None)
    value = scope[name]
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else value


@pytest.mark.parametrize("name, given, text, record, value", ARRIVE, ids=lambda v: str(v)[:30])
def test_values_arrive_as_what_they_are(typed_notebook, tmp_path, monkeypatch, name, given, text, record, value):
    from opml_wb.core.engine.run import RunRequest
    asked = [RunRequest(typed_notebook, {name: given}), RunRequest(typed_notebook, text={name: text}), RunRequest(typed_notebook, {name: record})]
    for r in asked:
        assert r.params[name] == record and json.loads(json.dumps(r.params)) == r.params
        nb, at = r.notebook()
        got = arrived(nb["cells"][at]["source"], name, tmp_path, monkeypatch)
        assert got == value and type(got) is type(value) and repr(got) == repr(value)
    assert len({r.key for r in asked}) == 1 and asked[0].seed == asked[1].seed
    assert (asked[0].key != RunRequest(typed_notebook).key) == (given is not None)


def test_a_file_is_meant_from_where_the_command_is_given(tmp_path, monkeypatch):
    "A run's folder is the chapter's; `str | Path`, a name or a file, finds the caller's file. Names, and values from Python, stay."
    from opml_wb.core.engine.run import RunRequest
    here, book = tmp_path / "here", tmp_path / "there" / "book.ipynb"
    for folder in (here / "digits", book.parent): folder.mkdir(parents=True)
    cells = notebook('data: "str | Path" = "digits"  # or a file\nname: str = ""\nmore: "Path | str | None" = None',
                     "from pathlib import Path\nsaid = Path(data).read_text()")
    book.write_text(json.dumps(cells))
    (here / "own.csv").write_text("mine")
    monkeypatch.chdir(here)
    def asked(**text): return RunRequest(book, text=text)
    own = str(here / "own.csv")
    assert asked(data="own.csv").params == {"data": own, "name": "", "more": None} and asked(data="../here/own.csv").given == {"data": own}
    assert asked(data="own.csv").key == asked(data=own).key == RunRequest(book, {"data": own}).key != asked(data="no.csv").key
    for text, value in (("digits", "digits"), ("./digits", str(here / "digits")), ("digits/", str(here / "digits")), ("no.csv", "no.csv"), ("", ""),
                        ("a://b.csv", "a://b.csv"), ("x" * 5000, "x" * 5000)):
        assert asked(data=text).params["data"] == value
    assert asked(name="own.csv", more="own.csv").given == {"name": "own.csv", "more": own} and asked(more="none").params["more"] is None
    assert RunRequest(book, {"data": "own.csv"}).params["data"] == "own.csv" and describe(cells)[0]["type"] == "str | Path"


@pytest.mark.parametrize("given, said", [
    (dict(day="soon"), "parameter 'day': expected date, such as 2020-12-31, got 'soon'"), (dict(day=D.datetime(2020, 1, 1, 2)), "expected date"),
    (dict(price=.1), "expected Decimal"), (dict(price="nan"), "expected Decimal"), (dict(kind="C"), "expected one of A | B, got 'C'"),
    (dict(kind=enum.Enum("Other", "A").A), "expected one of A | B"), (dict(free=Kind.A), "annotate the parameter with its class"),
    (dict(span="90"), "such as 1h 30min"), (dict(code="x"), "expected UUID"), (dict(pair=(1,)), "expected tuple"), (dict(some={"a"}), "expected frozenset"),
    (dict(free=b"x"), "builtins.bytes"),
])
def test_what_cannot_arrive_is_refused_by_name(typed_notebook, given, said):
    with pytest.raises(ParamError) as caught: validate(typed_notebook.nb, given)
    assert said in str(caught.value) and caught.value.param == next(iter(given))


def test_a_text_is_no_object_that_only_the_notebook_can_make():
    nb = notebook("import torch\ndevice: 'torch.device' = torch.device('cpu')\nother = torch.device('cpu')\nname: 'Name' = 'a'\nn: 'Count' = 3")
    for name in ("device", "other"):
        for given, text in ((None, {name: "cuda"}), ({name: "cuda"}, None)):
            with pytest.raises(ParamError, match=f"parameter '{name}': a text is no torch.device"): validate(nb, given, text)
    assert validate(nb, dict(name="b", n=4)) == {"name": "b", "n": 4}


def test_papermill_carries_them_or_says_which_it_cannot(typed_notebook, tmp_path, monkeypatch, caplog):
    import papermill
    from papermill.exceptions import PapermillException
    path, out = str(typed_notebook.path), str(tmp_path / "out.ipynb")
    monkeypatch.chdir(tmp_path)
    for engine in (None, "opml"):
        papermill.execute_notebook(path, out, {"day": "2021-02-03", "kind": "B", "pair": [3, "2021-02-03"], "price": "2.50"},
                                   prepare_only=True, engine_name=engine)
        [cell] = [c for c in json.loads(Path(out).read_text())["cells"] if "injected-parameters" in c["metadata"]["tags"]]
        for name, value in (("day", D.date(2021, 2, 3)), ("kind", "Kind.B"), ("pair", (3, D.date(2021, 2, 3))), ("price", decimal.Decimal("2.50"))):
            assert arrived(cell["source"], name, tmp_path, monkeypatch) == value
        for given, said in (dict(day="soon"), "'day': expected date"), (dict(free=D.date(2021, 2, 3)), "'free': papermill keeps parameters as JSON"):
            with pytest.raises(PapermillException, match=said): papermill.execute_notebook(path, out, given, prepare_only=True, engine_name=engine)
    assert "unknown parameter" not in caplog.text
    other = notebook("d: 'date' = None\nn: 'Annotated[int, Range(1, 9)]' = 3")       # a stranger's: written as ever, read better
    other["metadata"] = typed_notebook.nb["metadata"]
    (tmp_path / "other.ipynb").write_text(json.dumps(other))
    papermill.execute_notebook(str(tmp_path / "other.ipynb"), out, {"d": "2021-02-03", "n": 4}, prepare_only=True)
    assert 'd = "2021-02-03"' in "".join(json.loads(Path(out).read_text())["cells"][1]["source"]) and "unknown parameter" not in caplog.text


def test_they_arrive_from_a_file_a_form_and_a_sweep(typed_notebook, tmp_path, home, typed):
    from opml_wb.core.show.form import Form
    from opml_wb.core.sweep.search_space import space
    file = tmp_path / "p.yaml"
    file.write_text("day: 2021-02-03\nwhen: 2021-02-03 04:05:00\nkind: B\npair: [3, 2021-02-03]\nprice: '2.50'\nfree: 2021-02-03\n")
    done = typed("run", typed_notebook.path, "--params", file, "-p", "price", "3", "--json")
    assert json.loads(done.stdout)["params"] | {"day": "2021-02-03", "when": "2021-02-03T04:05:00", "kind": "B", "pair": [3, "2021-02-03"],
                                                "price": "3", "free": {"$date": "2021-02-03"}} == json.loads(done.stdout)["params"], done.stderr
    assert '"2021-02-03"' in typed("show", json.loads(done.stdout)["key"]).stdout
    assert typed("run", typed_notebook.path, "--params", tmp_path / "none.yaml").returncode == 2
    form = Form(typed_notebook)
    form.fields["day"].control.value, form.fields["kind"].control.value = "2021-02-03", "B"
    assert form.asked.check() and validate(typed_notebook.nb, *form.asked.values()) == {"day": "2021-02-03", "kind": "B"}
    form.fields["day"].control.value = "soon"
    assert not form.asked.check() and "expected date" in form.fields["day"].error.value
    dims = space(typed_notebook.nb, {"day": [D.date(2021, 2, 3), "2021-02-04"], "kind": [Kind.A, "B"]}, {"pair": "(1,2021-02-03),(2,2021-02-04)"}).dims
    assert (dims["day"].values, dims["kind"].values) == (("2021-02-03", "2021-02-04"), ("A", "B"))
    assert dims["pair"].values == ([1, "2021-02-03"], [2, "2021-02-04"])

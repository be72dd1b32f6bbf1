"""Canaries in all that a collector comes near: none of them, and no name of a user, is in what telemetry keeps, prints or exports."""
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from opml_wb.analyzer import Event, Events
from opml_wb.analyzer.watch.collect import error_name
from opml_wb.analyzer.logs.events import EventError

CANARY = "s3cret"
CELLS = [f"{CANARY}_parameter = 'a'", f"%%writefile {CANARY}-magic.txt\n{CANARY}-source",
         f"import os, sys\nos.environ['{CANARY}_ENV'] = '{CANARY}-value'\nprint('{CANARY}-out'); print('{CANARY}-err', file=sys.stderr)",
         f"raise type('{CANARY}Class', (KeyError,), {{}})('{CANARY}-text')"]


def notebook(path, cells=CELLS):
    "Write a notebook, its first cell tagged as parameters, its kernel with a name of its own."
    made = [nbformat.v4.new_code_cell(c) for c in cells]
    made[0].metadata.tags = ["parameters"]
    nb = nbformat.v4.new_notebook(cells=made)
    nb.metadata.kernelspec = {"name": "python3", "display_name": f"{CANARY}-kernel", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def surroundings(folder):
    "A user's environment, each name in it a canary."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPML_", "JUPYTER_"))}
    return {**env, "OPML_HOME": str(folder/"home"), "IPYTHONDIR": str(folder/"ipython"), "JUPYTER_CONFIG_DIR": str(folder/"config"),
            "OPML_USER": f"{CANARY}-ada", "TOKEN": f"{CANARY}-token", "CONDA_DEFAULT_ENV": f"{CANARY}-conda", f"{CANARY}_NAME": "1"}


def opml(env, *args, cwd=None):
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", *args], env=env, cwd=cwd, capture_output=True, text=True)
    return done.stdout + done.stderr


def kept(folder, env):
    "All that telemetry holds: {name: bytes} of its files, of exports, and of what the commands print."
    opml(env, "telemetry", "export", str(folder/"out.csv"))
    opml(env, "telemetry", "export", str(folder/"out.parquet"))
    files = [*(folder/"home").glob("telemetry*"), *folder.glob("out.*"), *(folder/"ipython").rglob("*telemetry*"), *(folder/"config").rglob("*.json")]
    said = {f"opml {' '.join(a)}": opml(env, *a).encode() for a in (("telemetry", "show", "-n", "999"), ("telemetry", "status"), ("analyzer", "report"))}
    return {**{str(f.relative_to(folder)): f.read_bytes() for f in files}, **said}


def test_canaries_stay_out(tmp_path):
    "A path, a notebook's and a kernel's name, parameters, a sweep, magics, environment, output, an error's class and text, a mistyped command."
    place = tmp_path/"work"
    env = surroundings(place)
    place.mkdir()
    opml(env, "telemetry", "on")
    path = notebook(place/f"{CANARY}-folder"/f"{CANARY}-name.ipynb")
    opml(env, "run", str(path), "-p", f"{CANARY}_parameter={CANARY}-argument", "--quiet", cwd=path.parent)
    opml(env, "sweep", str(path), f"{CANARY}_parameter={CANARY}-one,{CANARY}-two", cwd=path.parent)
    opml(env, f"{CANARY}verb")
    opml(env, "run", f"{CANARY}-nothing")
    subprocess.run([sys.executable, "-m", "papermill", str(path), str(place/"o.ipynb"), "-k", "python3", "-p", f"{CANARY}_parameter", f"{CANARY}-p"],
                   env=env, cwd=path.parent, capture_output=True)
    found = Events(place/"home"/"telemetry.db").frame()
    assert {"kernel", "run", "cli"} <= set(found.source) and {"ok", "KeyError", "other", "sweep"} <= set(found.name)
    assert not (set(found.columns) - {"ts", "user", "session", "stage", "feature", "kind", "name", "seconds", "source", "data"})
    bad = [name for name, text in kept(place, env).items() if CANARY.encode() in text.lower()]
    assert not bad, bad


def test_forget_and_purge_leave_nothing(tmp_path):
    "Neither the id, nor a session, nor a count of what was refused is in any file; another user's events stay."
    env = surroundings(tmp_path)
    opml(env, "telemetry", "on")
    opml(env, "ls")
    opml({**env, "OPML_USER": "other"}, "ls")
    log = Events(tmp_path/"home"/"telemetry.db")
    mine, others = log.frame().iloc[0], log.frame().iloc[1]
    log.add([{"ts": 0, "user": mine.user}])
    log.close()
    assert mine.user != others.user and "1 events deleted" in opml(env, "telemetry", "forget", "me")
    files = [*(tmp_path/"home").glob("telemetry*")]
    assert not [f for f in files if mine.user.encode() in f.read_bytes()] and [f for f in files if others.user.encode() in f.read_bytes()]
    opml(env, "telemetry", "purge", "--older-than", "0d")
    log = Events(tmp_path/"home"/"telemetry.db")
    assert not len(log) and not len(log.dead) and not [f for f in files if f.exists() and others.user.encode() in f.read_bytes()]


def test_what_cannot_be_removed_now_is_told(tmp_path):
    "A reader in the middle of the file keeps its old pages: that is said, and done the next time."
    event = Event(ts=1.6e9, user="Grace Hopper", session="s", stage="data", feature="f", kind="action", name="run")
    log, reader = Events(tmp_path/"e.db", wait=.2), sqlite3.connect(tmp_path/"e.db", isolation_level=None)
    log.add([event])
    reader.execute("begin")
    reader.execute("select * from event").fetchone()
    with pytest.raises((EventError, sqlite3.OperationalError)): log.forget("Grace Hopper")
    reader.execute("rollback")
    log.forget("Grace Hopper")
    assert not [p for p in tmp_path.iterdir() if b"Grace" in p.read_bytes()]


@pytest.mark.parametrize("bad", [dict(ts=CANARY), dict(ts=f"{CANARY} 2020"), dict(stage=CANARY), dict(kind=CANARY), dict(name=CANARY * 99), dict(user=[CANARY]),
                                 dict(seconds=CANARY), {CANARY: 1}, dict(ts={CANARY: 1}), dict(feature=f"{CANARY}\n")])
def test_dead_letters_tell_the_field_only(bad):
    log = Events()
    row = dict(ts=1.6e9, user="u", session="s", stage="data", feature="f", kind="action", name="run")
    assert log.add([{**row, **bad}]) == 0 and log.dead.n.sum() == 1
    assert CANARY not in "".join(log.db.iterdump())
    assert next(iter(bad)) in log.dead.reason[0] or CANARY in bad


def test_an_error_that_the_user_named_is_told_as_its_base():
    "Classes of Python and of packages keep their names, also from modules without a file; all others are told as their base."
    import sqlite3 as lite
    import zlib

    from numpy.linalg import LinAlgError
    here = type("Here", (LinAlgError,), {"__module__": "numpy.linalg"})   # says it stands there, and doesn't
    own = type(sys)("mine")
    own.Own, own.Own.__module__, own.__file__ = (c := type("Own", (LookupError,), {})), "mine", "/somewhere/mine.py"
    sys.modules["mine"] = own
    try: names = [error_name(e) for e in (KeyError(), lite.OperationalError(), zlib.error(), json.JSONDecodeError("", "", 0), LinAlgError(), here(), c(),
                                          type("A", (BaseException,), {})(), EventError())]
    finally: del sys.modules["mine"]
    assert names == ["KeyError", "OperationalError", "error", "JSONDecodeError", "LinAlgError", "LinAlgError", "LookupError", "BaseException", "EventError"]


def test_a_failed_export_leaves_no_part(tmp_path):
    log = Events()
    (tmp_path/"out.parquet").mkdir()
    with pytest.raises(OSError): log.export(tmp_path/"out.parquet")
    assert [p.name for p in Path(tmp_path).iterdir()] == ["out.parquet"]

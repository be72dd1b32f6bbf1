"""Whatever a notebook does to its process: the right status, a reason, nothing left behind, the store whole."""
import signal
import sqlite3

import pytest
from conftest import processes, until

from opml_wb.core.engine.run import run
from opml_wb.core.record.store import Store

GIL = "import ctypes\nctypes.PyDLL(None).usleep.argtypes = [ctypes.c_uint]\nwhile True: ctypes.PyDLL(None).usleep(60_000_000)"


def went(r, status, **error):
    assert r.status == status, (r.status, r.error)
    for name, value in error.items(): assert r.error[name] == value, r.error
    return r


def test_segfault_names_the_signal_and_keeps_what_was_shown(home, notebook):
    nb = notebook("n = 1", "print('before')", "import os, signal\nprint('last words')\nos.kill(os.getpid(), signal.SIGSEGV)")
    r = went(run(nb), "failed", kind="signal", signal="SIGSEGV", cell=2, line=3)
    text = r.notebook.read_text()
    assert "before" in text and "last words" in text


@pytest.mark.parametrize("code,status,error", [
    ("import os; os._exit(7)", "failed", {"kind": "exit", "exitcode": 7, "cell": 1}),
    ("import os; os._exit(0)", "failed", {"kind": "exit", "exitcode": 0, "cell": 1}),
    ("import sys; sys.exit(1)", "failed", {"kind": "exit", "exitcode": 1, "cell": 1}),
    ("import sys; sys.exit('text')", "failed", {"kind": "exit", "exitcode": 1}),
    ("input()", "failed", {"ename": "StdinNotImplementedError", "cell": 1, "line": 1}),
    ("x = 1\n\nraise KeyError('k')", "failed", {"ename": "KeyError", "evalue": "'k'", "cell": 1, "line": 3}),
    ("x = (", "failed", {"cell": 1, "line": 1}),
    ("import os; os.abort()", "failed", {"signal": "SIGABRT"}),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", {"signal": "SIGKILL"}),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "killed", {"signal": "SIGTERM"}),
    ("raise MemoryError", "failed", {"ename": "MemoryError"}),
    ("import ctypes; ctypes.string_at(0)", "failed", {"signal": "SIGSEGV"}),
])
def test_ends(home, notebook, code, status, error):
    went(run(notebook("n = 1", code)), status, **error)


def test_exit_0_is_done_and_stops(home, notebook):
    r = went(run(notebook("n = 1", "import sys; sys.exit(0)", "1/0", " ", "2")), "done")
    assert r.error is None and r.doc["exit"] == {"cell": 1, "execution_count": 2, "after": 2}


def test_exit_ends_the_kernel_and_the_record_tells_it(home, notebook, capsys):
    from opml_wb.core.show import terminal
    nb = notebook("n = 1", "exit", "import time; time.sleep(.3)", "1/0", "2", name="left")
    r = went(run(nb, n=2), "failed", kind="exit", ename="DeadKernelError", cell=1)
    assert r.doc["exit"]["cell"] == 1 and r.doc["exit"]["after"] in (2, 3)  # what begins within .1 s is executed, as in a kernel
    terminal.show_run(r)
    assert "ended by exit in In[3]" in capsys.readouterr().out
    r = went(run(notebook("n = 1", "exit", name="last")), "done")
    assert "exit" not in r.doc


@pytest.mark.parametrize("code, ended_by", [
    ("while True: pass", "SIGTERM"), (GIL, "SIGTERM"),
    ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", "SIGKILL")])
def test_timeout(home, notebook, code, ended_by):
    r = went(run(notebook("n = 1", "print('shown')", code), timeout=3), "timeout", kind="timeout", cell=2, signal=ended_by)
    assert "shown" in r.notebook.read_text()
    assert not processes(str(r.dir))


@pytest.mark.parametrize("code", [
    "import numpy as np\nx = np.ones(10**9)", "import numpy as np\nx = np.empty(10**9)", "x = bytearray(8 << 30)",
    "import torch\nx = torch.ones(10**9)",
    "import mmap\nm = mmap.mmap(-1, 8 << 30)\nfor i in range(0, 8 << 30, 4096): m[i] = 1",
    "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'x = []\\nwhile True: x.append(bytearray(50 << 20))'], check=True)",
    "import os, time\nfor i in range(6):\n    if os.fork() == 0: x = bytearray(os.urandom(1 << 20)) * 300; time.sleep(600)\ntime.sleep(600)",
])
def test_memory(home, notebook, code):
    r = run(notebook("n = 1", code), mem_gb=1, timeout=120)
    if "subprocess" in code: assert r.status in ("oom", "failed"), r.error  # the child may meet the limit and tell by its exit code
    else: went(r, "oom", kind="memory", cell=1)
    assert not processes(str(r.dir))


def test_memory_leaves_room(home, notebook):
    nb = notebook("n = 1", "import torch, numpy as np\nx = np.ones(10_000_000)\ny = torch.ones(10_000_000)\nprint(x.sum())")
    went(run(nb, mem_gb=1), "done")


def test_what_is_left_behind_is_killed(home, notebook):
    code = ("import subprocess, sys, os\nargs = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
            "subprocess.Popen(args)\nsubprocess.Popen(args, start_new_session=True)\n"
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(600)\n    os._exit(0)")
    r = went(run(notebook("n = 1", code)), "done")
    assert not processes(str(r.dir))


def test_threads_that_do_not_end_do_not_hang_the_run(home, notebook):
    went(run(notebook("n = 1", "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"), timeout=120), "done")


def test_many_outputs_are_cut(home, notebook):
    r = went(run(notebook("n = 1", "for i in range(300): print('x' * 100_000)")), "done")
    assert r.notebook.stat().st_size < 12 << 20 and "cut after" in r.notebook.read_text()


def test_sigkill_of_the_driver_leaves_no_orphan_and_a_readable_store(opml, home, notebook):
    nb = notebook("n = 1", "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
                           "from opml_wb import log\nlog.metric('seen', 1)\ntime.sleep(600)")
    driver = opml("run", nb, "--json", start=True)
    assert until(lambda: any("seen" in p.read_text() for p in home.glob("runs/*/log.jsonl")), 60)
    driver.kill(); driver.wait()
    assert until(lambda: not processes(str(home)), 60), processes(str(home))
    home_store = Store(home)
    [doc] = home_store.ls()
    assert doc["status"] == "killed" and doc["metrics"] == {"seen": 1}
    assert sqlite3.connect(home / "opml.db").execute("pragma integrity_check").fetchone() == ("ok",)
    assert opml("ls").returncode == 0


def test_sigkill_of_the_zygote_is_survived(home, notebook):
    marker = home.parent / "first"
    nb = notebook("n = 1", f"import os, psutil, pathlib\np = pathlib.Path({str(marker)!r})\nif not p.exists():\n    p.touch()\n"
                           "    psutil.Process().parent().parent().kill(); import time; time.sleep(30)\nprint('second time')")
    r = run(nb)
    assert r.status in ("done", "killed"), r.error
    assert until(lambda: not processes(str(r.dir)), 60)
    assert run(nb).status in ("done", "cached")


def test_ctrl_c(opml, home, notebook):
    driver = opml("run", notebook("n = 1", "import time; time.sleep(600)"), start=True)
    assert until(lambda: list(home.glob("runs/*/progress.jsonl")), 60)
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert Store(home).ls()[0]["status"] == "killed"
    assert until(lambda: not processes(str(home)), 60)


def test_a_failed_run_is_no_hit(home, notebook):
    nb = notebook("n = 1", "1/0")
    a, b = run(nb), run(nb)
    assert a.status == b.status == "failed" and a.dir != b.dir


def test_a_full_disk_fails_the_run_and_not_the_store(home, notebook):
    nb = notebook("n = 1", "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
                           "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nprint('x' * 100_000)")
    r = run(nb)
    assert r.status == "failed", r.status
    assert Store(home).ls()[0]["status"] == "failed"

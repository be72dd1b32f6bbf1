"""The decision log: two writers that are killed, bytes that flip, tails that are cut, erasures, what a notebook cannot hold."""
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from opml_wb.explain.record.anchor import Anchor
from opml_wb.explain.record.decision_log import DecisionLog
from opml_wb.explain.record.sealing import PAGE, LogError, seal_of
from opml_wb.explain.record.verifying import verify


def decision(i, **more):
    "A decision of the size that a table model makes."
    values = {f"field_{k}": (i * k % 97) / 10 for k in range(14)}
    return {"input": {**values, "n": i}, "answer": i % 2 == 0, "model": "adult", "version": 1, "score": .5,
            "explanation": {"method": "shap", "base": .2, "values": values, "fidelity": 1., "agrees": True},
            "texts": {a: f"{a}: decided for {i}" for a in ("regulator", "business", "customer")}, **more}


@pytest.fixture
def log(tmp_path):
    made = DecisionLog(tmp_path / "log.db")
    yield made
    made.close()


def copied(log, to):
    "A copy of a log's files, under the same names in folder `to`."
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for p in log.path.parent.glob(f"{log.path.name}*"): shutil.copy(p, to / p.name)
    return to / log.path.name


def answers(path, ids):
    "{id: its answers, or the error} of a log at `path`, and its head."
    try: log = DecisionLog(path)
    except Exception as e: return type(e).__name__
    out = {}
    for id in ids:
        try: out[id] = [log.answer(id, a) for a in ("regulator", "business", "customer")]
        except Exception as e: out[id] = type(e).__name__
    log.close()
    return out


# --- kill -9

def writer(path, told):
    "Append until killed; each acknowledged id is a line of file `told`."
    log, fd = DecisionLog(path), os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    i = 0
    while True:
        ids = log.extend([decision(i), decision(i + 1)]) if i % 5 == 0 else [log.append(decision(i))]
        os.write(fd, "".join(f"{id}\n" for id in ids).encode())
        i += 1


def started(path, told):
    "A forked writer's process id."
    pid = os.fork()
    if pid == 0:
        try: writer(path, told)
        finally: os._exit(1)
    return pid


def test_two_writers_that_are_killed_lose_nothing(log, tmp_path):
    "100 kill -9 during more than 1,000 writes by two processes: all that was acknowledged is there, and the log is whole."
    told, rng, kills = tmp_path / "told", random.Random(0), 0
    told.write_text("")
    def count(): return told.read_bytes().count(b"\n")
    pids = [started(log.path, told) for _ in range(2)]
    try:
        while kills < 100 or count() < 1000:
            before = count()
            until = time.monotonic() + 30
            while count() < before + rng.randint(1, 30) and time.monotonic() < until: time.sleep(rng.random() * .004)
            victim = rng.randrange(2)
            os.kill(pids[victim], signal.SIGKILL)
            _, status = os.waitpid(pids[victim], 0)
            assert os.WIFSIGNALED(status), "the writer ended by itself"
            kills += 1
            pids[victim] = started(log.path, told)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    acknowledged = told.read_text().split()
    assert len(acknowledged) == len(set(acknowledged)) >= 1000 and kills >= 100
    there = set(log.frame().id)
    assert set(acknowledged) <= there
    report = log.verify()
    assert report.ok, report.why
    assert report.count >= len(acknowledged)
    log.append(decision(1))
    assert log.verify().ok


def test_a_writer_killed_before_its_anchor_is_no_damage(log):
    "Between the commit and the anchor's line: the entry is there, was never acknowledged, and the next append goes on."
    log.append(decision(1))
    pid = os.fork()
    if pid == 0:
        try:
            child = DecisionLog(log.path)
            child.anchor.add = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
            child.append(decision(2))
        finally: os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert (len(log), log.verify().ok) == (2, True)
    log.append(decision(3))
    assert (len(log), log.verify().ok) == (3, True)


def test_threads_and_a_fork_share_a_log(log):
    def work(k):
        for i in range(20): log.append(decision(i, id=f"t{k}-{i}"))
    log.append(decision(0))                                  # the fork inherits an open connection
    pid = os.fork()
    if pid == 0:
        try: log.append(decision(0, id="child")); os._exit(0)
        finally: os._exit(1)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert os.waitpid(pid, 0)[1] == 0
    assert len(log) == 82 and log.verify().ok


# --- bytes that flip

@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    "A sealed log of 1,000 decisions, three of them erased, with its answers."
    log = DecisionLog(tmp_path_factory.mktemp("sealed") / "log.db")
    ids = log.extend(decision(i) for i in range(1000))
    for id in ids[100:103]: log.erase(id)
    log.seal()
    some = ids[::25] + ids[100:103]
    return log, some, answers(log.path, some)


def test_each_flipped_byte_of_a_sealed_log_is_found_and_placed(sealed, tmp_path):
    "200 single bytes of the file, anywhere: the report names the page; an entry that it names is one that was changed."
    log, some, before = sealed
    data, rng = log.path.read_bytes(), random.Random(1)
    path = copied(log, tmp_path / "copy")
    named = 0
    for _ in range(200):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
        report = verify(path)
        assert not report.ok and report.pages == (at // PAGE + 1,), (at, report)
        assert report.first_bad, (at, report)
        named += not report.first_bad.startswith("page ")
    assert named > 100, "most bytes belong to an entry, which is named"
    path.write_bytes(data)
    assert verify(path).ok and answers(path, some) == before


def test_a_flipped_byte_of_an_open_log_is_found_or_changes_no_answer(tmp_path):
    "Without a seal, the chain and the anchor: what they don't see changes no answer."
    log = DecisionLog(tmp_path / "log.db")
    ids = log.extend(decision(i) for i in range(60))
    log.db.execute("pragma wal_checkpoint(truncate)")
    log.close()
    data, rng, before, unseen = log.path.read_bytes(), random.Random(2), answers(log.path, ids), 0
    for _ in range(60):
        at = rng.randrange(len(data))
        path = copied(log, tmp_path / "copy")
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
        if verify(path).ok:
            unseen += 1
            assert answers(path, ids) == before, at
    assert unseen < 30


def test_answers_are_never_given_from_a_changed_entry(log):
    first, second = log.extend([decision(1), decision(2)])
    log.db.execute("drop trigger only_erased")
    log.db.execute("update entry set body=cast(replace(cast(body as text), 'decided for 2', 'decided for 3') as blob) where id=?", (second,))
    assert "decided for 1" in log.answer(first, "customer")
    with pytest.raises(LogError, match="isn't what was logged"): log.answer(second, "customer")
    assert log.verify().first_bad == second


# --- tails and write-ahead logs

def flip_in_wal(path, share):
    "Flip one byte of the write-ahead log at `share` of its length."
    wal = path.with_name(path.name + "-wal")
    data = bytearray(wal.read_bytes())
    data[int(len(data) * share)] ^= 4
    wal.write_bytes(data)


@pytest.mark.parametrize("share", [.05, .3, .6, .97])
def test_a_flipped_frame_of_the_write_ahead_log_is_found(tmp_path, share):
    "SQLite drops that frame and all later ones without a word; the chain that is left is valid."
    log = DecisionLog(tmp_path / "log.db")
    ids = [log.append(decision(i)) for i in range(60)]
    path = copied(log, tmp_path / "copy")          # as a crash leaves it: nothing is in the file itself yet
    assert verify(path).ok
    path = copied(log, tmp_path / "copy")
    flip_in_wal(path, share)
    report = verify(path)
    assert not report.ok and "anchor" in report.why or "read" in report.why, report
    if report.first_bad: assert report.first_bad in ids
    with pytest.raises(LogError): DecisionLog(path).append(decision(1))
    log.close()


def test_a_cut_tail_is_found(log, tmp_path):
    ids = log.extend(decision(i) for i in range(30))
    last = [log.append(decision(i)) for i in range(3)]
    log.close()
    path = copied(log, tmp_path / "copy")
    db = sqlite3.connect(path)
    db.execute("drop trigger no_delete")
    db.execute("delete from entry where seq > 31")
    db.commit()
    db.close()
    report = verify(path)
    assert (report.ok, report.first_bad, report.count) == (False, last[1], 31)
    os.truncate(path, path.stat().st_size // 2)
    assert not verify(path).ok
    Anchor(f"{log.path}.anchor").path.unlink()
    assert "anchor is missing" in log.verify().why and ids


def test_another_whole_log_under_the_same_anchor_is_found(log, tmp_path):
    log.extend(decision(i) for i in range(5))
    forged = DecisionLog(tmp_path / "forged.db")
    forged.extend(decision(i + 1) for i in range(5))
    forged.close()
    report = verify(forged.path, log.anchor.path)
    assert not report.ok and "isn't the one" in report.why


def test_a_sealed_log_is_read_as_its_bytes_are(sealed, tmp_path):
    "A write-ahead log or journal laid beside it changes no answer."
    log, some, before = sealed
    path = copied(log, tmp_path / "copy")
    other = DecisionLog(tmp_path / "other.db")
    other.extend(decision(7) for _ in range(40))
    shutil.copy(f"{other.path}-wal", f"{path}-wal")
    shutil.copy(f"{other.path}-wal", f"{path}-journal")
    other.close()
    assert verify(path).ok and answers(path, some) == before


def test_a_seal_taken_away_is_missed(sealed, tmp_path):
    path = copied(sealed[0], tmp_path / "copy")
    seal_of(path).unlink()
    assert "its seal is missing" in verify(path).why


# --- erasure, audiences, bad input

def test_an_erasure_leaves_no_byte_and_the_chain_holds(log):
    ids = log.extend(decision(i, texts={"customer": f"Dear Zaphod Beeblebrox {i}"}) for i in range(40))
    log.append(decision(99))
    for id in ids: log.erase(id, "he asked")
    files = b"".join(p.read_bytes() for p in log.path.parent.iterdir())
    assert b"Zaphod" not in files
    report = log.verify()
    assert report.ok and report.erased == 40
    assert "erased on" in log.answer(ids[3], "customer") and "he asked" in log.answer(ids[3], "regulator")
    with pytest.raises(LogError, match="was erased at"): log.erase(ids[3])


def test_a_body_taken_away_without_an_erasure_is_found(log):
    ids = log.extend(decision(i) for i in range(4))
    log.db.execute("update entry set salt=null, body=null where id=?", (ids[2],))      # the triggers let it
    assert log.verify().first_bad == ids[2] and "no erasure" in log.verify().why
    with pytest.raises(LogError, match="without an erasure"): log.answer(ids[2], "customer")


def test_three_audiences_and_a_missing_model(log):
    id = log.append(decision(4, version=77))
    said = {a: log.answer(id, a) for a in ("regulator", "business", "customer")}
    assert len(set(said.values())) == 3
    for a, text in said.items(): assert f"{a}: decided for 4" in text and "no longer in the model store" in text


@pytest.mark.parametrize("wrong, names", [
    ({"input": {}, "answer": 1, "model": "m"}, "input"), ({"answer": 1, "model": "m"}, "input"),
    ({"input": {"a": object()}, "answer": 1, "model": "m"}, "input.a"), ({"input": {"a": 1}, "answer": 1, "model": 3}, "model"),
    ({"input": {"a": 1}, "answer": 1, "model": "m", "texts": {"kings": ""}}, "kings"), (7, "int")])
def test_what_is_no_decision_is_refused_and_nothing_written(log, wrong, names):
    with pytest.raises((TypeError, ValueError), match=names): log.extend([decision(1), wrong])
    assert len(log) == 0 and log.verify().ok


def test_the_log_is_light():
    "A server that logs its answers imports no pandas, no plotly for it."
    code = ("import sys; from opml_wb.explain.record.decision_log import DecisionLog\n"
            "assert not {'plotly', 'sklearn', 'numba', 'torch'} & set(sys.modules), sorted(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

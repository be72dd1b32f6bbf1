"""The README as a newcomer uses it: each of its commands, from top to bottom, in a fresh clone. What a command ends with and prints is checked.

`python tests/newcomer.py` installs as the README says and runs all (a quarter of an hour on two cores); `--venv DIR` takes that
environment for the one that would be installed, `--only TEXT` the commands with TEXT in them, `--list` prints them.
Checked at the end: git sees no change in the clone, every path that was printed exists, no run was executed twice."""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HAS = "import pandas as pd; df = pd.DataFrame({'a': [1]}); model = {'weights': [1]}\n"   # what the reader has already
INSTALL = "-m venv .venv"            # in the lines that make the environment
SERVES = {"--serve", "lab", "demo", "serve"}  # words of commands that serve until they are interrupted
ROOT_REFUSED = "Running as root is not recommended"
ANSWERS = {"opml compare riann": 1}   # the exit code says what was found: they differ
PATH = re.compile(r"(?:(?<=\s)|^)(~?\.{0,2}(?:/?[\w.+-]+/)+[\w.+-]+\.(?:ipynb|html|csv|parquet|json|py|txt|md))(?=[\s,;:)]|$)", re.M)

# what each command must print, by the words that it begins with; a command of the README that isn't here fails
EXPECTED: dict[str, str] = {
    "python - <<'END'": r"",
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/opml run riann --show": r"riann +(done|cached)[\s\S]*exceeded",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest -q": r"\d+ passed",
    ". .venv/bin/activate": r"^$",
    "opml list": r"riann[\s\S]*done",
    "opml params riann": r"load[\s\S]*busy processes",
    "opml run riann": r"riann +cached|not answered from the store: [\s\S]*riann +done",
    "opml run riann load=2 step=200": r"riann +done",
    "opml ls": r"(riann[\s\S]*){2}",
    "opml compare riann": r"load[^\n]*2[^\n]*0",
    "opml why riann": r"store|cached|answer",
    "opml show riann --html": r"page +riann.html",
    "opml claims": r"2\.42",
    "opml lab riann": r"http://",
    "opml flexserve demo": r"curl",
    "opml provenance trace": r"opml provenance lineage",
    "opml provenance lineage": r"created",
    "opml new mine && opml run mine": r"mine +done",
    "opml reproduce": r"reproduced.html",
    "opml sweep riann": r"4",
    "opml data fetch riann/sift_photos_full && opml run riann --preset paper": r"riann +done",
    "opml docs --serve": r"http://",
    "papermill": r"Executing|100%",
    "opml dlspec init": r"model/digits.yml: its licence",
    "opml dlspec check": r"all good",
    "opml dlspec run": r"digits.onnx[\s\S]*as the outputs say",
    "opml flexserve add": r"(pets|digits|churn) version 1",
    "opml flexserve serve": r"http://127.0.0.1:808",
}


def commands(text):
    "What a README has to type, in its order: the lines of its ```sh blocks without their comments, its ```python blocks whole."
    out = []
    for kind, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.M | re.S):
        lines = [re.sub(r"\s+#.*$", "", line).rstrip() for line in block.splitlines()]
        out += [f"python - <<'END'\n{HAS}{block}END"] if kind == "python" else [line for line in lines if line and line[0] != "#"]
    return out


def expected(command):
    "The pattern that the output of `command` must match: that of the longest entry it begins with, or KeyError."
    return EXPECTED[max((k for k in EXPECTED if command.startswith(k)), key=len)] if any(map(command.startswith, EXPECTED)) else _unknown(command)


def _unknown(command): raise KeyError(f"tests/newcomer.py expects nothing of {command!r}: say what it prints")


def serves(command): return command.startswith("opml") and bool(SERVES & set(command.split()))


def own_files(folder):
    "Write what a reader has of his own, by the names that the README gives it; the paths."
    import numpy as np
    import pandas as pd
    import torch
    from PIL import Image
    from torch import nn
    draw, steps = np.random.default_rng(0), pd.date_range("2024-01-01", periods=600, freq="10min")
    tickets = pd.DataFrame(dict(ticket=np.arange(600) // 3, updated=steps.strftime("%Y-%m-%d %H:%M"), priority=draw.integers(1, 4, 600),
                                group=[None, "a", "b"] * 200, close_code=[None, None, "solved"] * 200))
    jobs = pd.DataFrame(dict(submitted=steps.strftime("%Y-%m-%d %H:%M:%S"), seconds=draw.exponential(3600, 600).round(), gpus=draw.integers(1, 3, 600)))
    prices = pd.DataFrame(dict(item=["a", "b", "a"], day=["2024-01-01", "2024-01-01", "2024-01-02"], price=[1., 2., 3.]))
    for name, table in ("tickets", tickets), ("jobs", jobs), ("prices", prices), ("data", prices): table.to_csv(folder / f"{name}.csv", index=False)
    usage = pd.DataFrame(dict(who=draw.integers(0, 90, 9000), at=pd.date_range("2024-01-01", periods=9000, freq="7min").strftime("%Y-%m-%dT%H:%M:%SZ"),
                              what=draw.choice(["compile", "debug"], 9000), result=draw.choice(["ok", "FAIL"], 9000)))
    loans = pd.DataFrame(dict(age=draw.integers(20, 70, 400), income=draw.normal(3000, 900, 400).round(), job=draw.choice(["cook", "pilot"], 400)))
    loans["decision"] = np.where(loans.income + 10 * loans.age > 3400, "yes", "no")
    listings = pd.DataFrame(dict(id=np.arange(900), title=draw.choice(["old lamp", "red bicycle", "army knife"], 900), price=draw.integers(5, 90, 900),
                                 time=pd.date_range("2024-01-01", periods=900, freq="9min").strftime("%Y-%m-%d %H:%M")))
    listings["violates"] = (listings.title.eq("army knife") & (draw.random(900) < .8)).astype(int)
    runs = pd.DataFrame(dict(t=np.arange(300.), size_kb=draw.choice([4, 64, 1024], 300), depth=draw.integers(1, 33, 300)))
    runs["latency_ms"] = runs.size_kb / 500 + runs.depth / 9 + draw.exponential(.2, 300)
    for name, table in ("usage", usage), ("loans", loans), ("listings", listings), ("runs", runs): table.to_csv(folder / f"{name}.csv", index=False)
    np.save(folder / "vectors.npy", draw.random((1000, 64), np.float32))
    Image.fromarray(draw.integers(0, 255, (48, 48, 3), np.uint8)).save(folder / "cat.jpg")
    net = "nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))"
    (folder / "model.py").write_text(f"from torch import nn\n\ndef make(): return {net}\n")
    model = eval(net, {"nn": nn}).eval()
    torch.save(model.state_dict(), folder / "net.pt")
    made = "net.pt", "cat.jpg", "model.py", *models(folder, model)
    return [folder / n for n in ("usage.csv", "loans.csv", "listings.csv", "runs.csv", "manifests", "tickets.csv", "jobs.csv", "prices.csv", "data.csv", "vectors.npy", "features", *made)] + [folder / "nbs" / "chapters" / "11_mine.ipynb"]


def models(folder, net):
    "Model files as a stranger has them: an ONNX network of 8 x 8 pictures, and XGBoost's JSON with rows; their names."
    import contextlib
    import io
    import numpy as np
    import pandas as pd
    import torch
    import xgboost
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), str(folder / "digits.onnx"), dynamo=False, dynamic_axes={"x": {0: "b"}}, input_names=["x"])
    draw = np.random.default_rng(1)
    rows = pd.DataFrame({"age": draw.normal(40, 9, 200).round(1), "job": pd.Categorical(draw.choice(["cook", "pilot"], 200))})
    xgboost.XGBClassifier(n_estimators=9, max_depth=2, enable_categorical=True, n_jobs=1).fit(rows, (rows.age > 40).astype(int)).save_model(folder / "churn.json")
    rows[:5].to_csv(folder / "rows.csv", index=False)
    return "digits.onnx", "churn.json", "rows.csv"


class Newcomer:
    "A clone in which commands are run one after another. venv: an environment that stands for the one to install."
    def __init__(self, folder, venv=None):
        self.clone, self.venv, self.said = folder / "opml_wb", venv, []
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, self.clone], check=True)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("OPML_", "VIRTUAL_ENV", "PYTHONPATH", "PYTEST"))}
        if venv: (self.clone / ".venv").symlink_to(venv)
        Path("/tmp/sorted.txt").unlink(missing_ok=True)     # what the README makes outside of the clone: made anew
        self.own = own_files(self.clone)

    def bash(self, command):
        "The arguments that run `command` as in a terminal where the environment is active once it is there."
        return ["bash", "-c", f"[ -e .venv ] && . .venv/bin/activate; {command}"]

    def run(self, command):
        "Run `command` to its end, or until what it serves answers; (exit code, output)."
        if command.startswith("export "):
            name, _, value = command.split(maxsplit=1)[1].partition("=")
            self.env[name] = value
            return 0, ""
        if serves(command): return self.serve(command)
        done = subprocess.run(self.bash(command), cwd=self.clone, env=self.env, text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout

    def serve(self, command, limit=600):
        "Start `command`, ask the first address that it prints until it answers, then interrupt it."
        from urllib.request import urlopen
        with tempfile.TemporaryFile("w+") as out:
            p = subprocess.Popen(self.bash("exec " + command), cwd=self.clone, env=self.env, text=True, stdin=subprocess.DEVNULL,
                                 stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
            end, answered = time.monotonic() + limit, None
            while time.monotonic() < end and p.poll() is None and not answered:
                time.sleep(.5)
                out.seek(0)
                for url in re.findall(r"http://(?:localhost|127\.0\.0\.1):\d+[^\s'\";,)]*", out.read()):
                    try: answered = urlopen(url, timeout=5).status
                    except OSError as e: answered = getattr(e, "code", None)   # an answer, too
            os.killpg(p.pid, signal.SIGINT) if p.poll() is None else None
            try: rc = p.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, signal.SIGKILL)
                rc = p.wait()
            out.seek(0)
            return (0 if answered and rc in (0, 130, -2) else rc or 1), out.read()

    def follow(self, command):
        "Run one command of the README; what is wrong with it, or ''."
        pattern, began = expected(command), time.monotonic()
        if self.venv and INSTALL in command:
            command = command.rpartition("&& .venv")[2] and "true" if "pytest" in command else ".venv" + command.rpartition("&& .venv")[2]
            if command == "true": return ""
        rc, out = self.run(command)
        self.said.append(out)
        if ROOT_REFUSED in out: rc, pattern = 0, ROOT_REFUSED      # Jupyter's own rule; a newcomer is not root
        wrong = [f"exit code {rc}"] * (rc != ANSWERS.get(command, 0)) + [f"no {pattern!r} in what it prints"] * (not re.search(pattern, out))
        print(f"{'FAILED' if wrong else 'ok':7}{time.monotonic() - began:7.1f} s  {command.partition(chr(10))[0]}", flush=True)
        return f"{command}: {'; '.join(wrong)}\n{out[-3000:]}" if wrong else ""

    def left(self):
        "What is wrong at the end: list of lines."
        out = []
        for path in self.own: shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=self.clone, capture_output=True, text=True).stdout.strip()
        if status: out.append(f"git sees changes in the clone:\n{status}")
        printed = {p for said in self.said for p in PATH.findall(re.sub(r"\x1b\[[\d;]*m", "", said))}
        out += [f"printed, but not there: {p}" for p in sorted(printed) if not (self.clone / Path(p).expanduser()).exists()]
        rc, text = self.run("opml ls -n 0 --json")
        keys = [r["key"] for r in json.loads(text) if r["status"] == "done"]
        out += [f"executed twice: {k}" for k in sorted({k for k in keys if keys.count(k) > 1})]
        return out


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--venv", type=Path, help="an environment that stands for the one to install")
    ask.add_argument("--only", help="only commands that contain this text")
    ask.add_argument("--list", action="store_true", help="print the commands")
    ask.add_argument("--keep", action="store_true", help="leave the clone where it is")
    given = ask.parse_args()
    steps = [c for c in commands((ROOT / "README.md").read_text(encoding="utf-8")) if not given.only or given.only in c]
    if given.list: return print("\n".join(steps))
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))
    try:
        one = Newcomer(folder, given.venv and given.venv.absolute())
        wrong = [w for c in steps if (w := one.follow(c))] + one.left()
    finally:
        if not given.keep: shutil.rmtree(folder, ignore_errors=True)
    print("\n\n".join(wrong) or "all of it works")
    return 1 if wrong else 0


if __name__ == "__main__": sys.exit(main())

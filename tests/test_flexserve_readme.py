"""A stranger's torch model, ONNX file and XGBoost JSON, from files to answers by the README alone: two commands each."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import newcomer
import numpy as np
import pandas as pd
import pytest
from PIL import Image

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
NET = "nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))"


def pairs():
    "{name: (the add line, the serve line)} of the README, and its curls in order."
    part = README[README.index("Chapter 8 serves models"):README.index("**Your own notebook**")]
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", part, re.M | re.S) for line in block.splitlines()]
    found = {add.split()[3]: (add, serve) for add, serve in zip(lines[::2], lines[1::2])}
    return found, re.findall(r"`(curl [^`]+)`", part)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with the stranger's files, and a home in it."
    import torch
    from torch import nn
    folder = tmp_path_factory.mktemp("stranger")
    torch.manual_seed(0)
    net = eval(NET, {"nn": nn}).eval()
    (folder / "model.py").write_text(f"from torch import nn\n\ndef make(): return {NET}\n")
    torch.save(net.state_dict(), folder / "net.pt")
    newcomer.models(folder, net)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "cat.png")
    return folder, net


def by_hand(net, folder, name):
    "The answer of the stranger's own model, by his own few lines: probabilities."
    import torch
    import xgboost
    if name == "churn":
        model = xgboost.XGBClassifier()
        model.load_model(folder / "churn.json")
        rows = pd.read_csv(folder / "rows.csv")
        return model.predict_proba(rows.assign(job=pd.Categorical(rows.job, ["cook", "pilot"])))
    size, mean, std = (32, .5, .25) if name == "pets" else (8, 0., 1.)
    image = np.asarray(Image.open(folder / "cat.png").convert("RGB").resize((size, size), Image.Resampling.BILINEAR)) / 255
    x = torch.tensor(((image - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    with torch.inference_mode(): return torch.softmax(net(x), 1).numpy()


@pytest.mark.parametrize("name", ["pets", "digits", "churn"])
def test_from_files_to_answers_by_the_readme(place, name):
    "`add` and `serve` as the README has them, then its curl: the model's own probabilities, to 1e-6."
    folder, net = place
    found, curls = pairs()
    add, serve = found[name]
    port = "0"
    env = {**os.environ, "OPML_HOME": str(folder / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(add, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"{name} version 1" in done.stdout, done.stdout + done.stderr
    words = re.sub(r"--port \d+", f"--port {port}", serve)
    server = subprocess.Popen(shlex.split(words), cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        [curl] = [c for c in curls if serve.split("--port ")[1] in c] or [curls[0]]
        curl = re.sub(r"http://127\.0\.0\.1:\d+", url, curl).replace("cat.jpg", "cat.png").replace("image/jpeg", "image/png")
        curl = curl if "probs" in curl else re.sub(r"(\S+/v1/predict)", r"'\1?probs=true'", curl)
        said = json.loads(subprocess.run(["bash", "-c", curl.replace("curl", "curl -s", 1)], cwd=folder, capture_output=True, text=True, check=True).stdout)
        np.testing.assert_allclose(said["probs"][name], by_hand(net, folder, name), atol=1e-6)
        assert set(said["models"][name]) <= ({"cat", "dog"} if name == "pets" else {"0", "1"})
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0

"""Attempts that were offline become one run when they are uploaded, whose steps go on: asked of wandb's own command."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pytorch_lightning.loggers import WandbLogger

from adaptive_merge.callbacks import protect

HISTORY = "wandb-history.jsonl"


class Server(BaseHTTPRequestHandler):
    """As much of a server of Weights & Biases as `wandb sync` asks; `runs` has the lines of each run's history."""

    protocol_version = "HTTP/1.1"
    runs: dict[str, dict[int, str]] = {}

    def log_message(self, *_):
        pass

    def do_PUT(self):
        self.content()
        self.answer({})

    def do_POST(self):
        content = json.loads(self.content())
        if self.path.endswith("/file_stream"):
            history = content.get("files", {}).get(HISTORY, {"offset": 0, "content": []})
            lines = dict(enumerate(history["content"], history["offset"]))
            self.runs.setdefault(self.path.split("/")[-2], {}).update(lines)
            return self.answer({"exitcode": None, "limits": {}})
        operation, asked = content.get("operationName"), content.get("variables") or {}
        make = {"UpsertBucket": self.bucket, "RunResumeStatus": self.status, "CreateRunFiles": self.files}
        user = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}, "email": "a@b"}
        data = make[operation](asked) if operation in make else {"viewer": user} if "iewer" in (operation or "") else {}
        return self.answer({"data": data})

    def bucket(self, asked):
        name = asked.get("name") or asked["id"].removeprefix("storage-")
        new = name not in self.runs
        self.runs.setdefault(name, {})
        project = {"id": "p", "name": "merging", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": f"storage-{name}", "name": name, "config": "{}", "project": project, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def status(self, asked):
        lines = self.runs.get(asked["name"])
        found = {
            "id": f"storage-{asked['name']}",
            "name": asked["name"],
            "historyLineCount": len(lines or ()),
            "historyTail": json.dumps([lines[max(lines)]] if lines else []),
            **dict.fromkeys(("logLineCount", "eventsLineCount"), 0),
            **{"eventsTail": "[]", "summaryMetrics": "{}", "config": "{}", "tags": []},
            "wandbConfig": json.dumps({"t": {"1": []}}),
        }
        model = {"id": "p", "name": "merging", "entity": {"id": "e", "name": "me"}}
        return {"model": model | {"bucket": None if lines is None else found}}

    def files(self, asked):
        address = f"http://127.0.0.1:{self.server.server_port}/put"
        files = [{"name": name, "uploadUrl": address} for name in asked["files"]]
        return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}

    def content(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()


@pytest.mark.slow
def test_attempts_are_appended_to_one_another(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", minversion="0.30")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "mine").mkdir()
    for resumed, steps in ((False, (0, 1)), (True, (2, 3, 4))):
        logger = protect(WandbLogger(project="merging"), tmp_path / "mine", resumed)
        assert logger.experiment
        for step in steps:
            logger.log_metrics({"loss": 10.0 + step}, step)
        wandb.finish()
        time.sleep(1.1)  # wandb names a folder by the second
    monkeypatch.delenv("WANDB_MODE")
    attempts = sorted((tmp_path / "mine" / "wandb").glob("offline-run-*"), reverse=True)
    with server() as address:
        environment = os.environ | {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}
        command = [sys.executable, "-m", "wandb", "sync", *map(str, attempts)]
        told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    ((name, lines),) = Server.runs.items()
    assert name == json.loads((tmp_path / "mine" / "wandb.json").read_text())["id"]
    rows = [json.loads(lines[number]) for number in sorted(lines)]
    assert [(row["_step"], row["trainer/global_step"], row["loss"]) for row in rows] == [
        (step, step, 10.0 + step) for step in range(5)
    ]

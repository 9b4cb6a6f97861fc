"""A W&B server that goes away in the middle of a run: on this machine, and only as much of one as a run talks to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import pytorch_lightning as pl
import wandb
from command import TINY, command

from diffusion_lab.commands import train
from diffusion_lab.training import loggers


class Server(BaseHTTPRequestHandler):
    """Answers the questions of wandb-core: who asks, a new run, and lines of its files."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        self.asked.append(self.path)
        answer: dict = {}
        if self.path.endswith("/graphql"):
            query = json.loads(body)
            variables = query.get("variables") or {}
            project = {"id": "p", "name": "diffusion-lab", "entity": {"id": "e", "name": "me"}}
            bucket = {
                "id": "r",
                "name": variables.get("name") or "run",
                "displayName": "run",
                "description": "",
                "config": "{}",
                "summaryMetrics": "{}",
                "sweepName": None,
                "project": project,
                "historyLineCount": 0,
            }
            person = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            server = {"cliVersionInfo": {"max_cli_version": wandb.__version__}, "features": []}
            data = {"viewer": person, "serverInfo": server, "QueryType": {"fields": []}, "MutationType": {"fields": []}}
            data |= {"upsertBucket": {"bucket": bucket, "inserted": True}, "model": {"bucket": None}}
            answer = {"data": data}
        raw = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        pass


class GoesAway(pl.Callback):
    """Ends the server at step 3."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.server = server

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 3:
            self.server.shutdown()
            self.server.server_close()


@pytest.mark.integration
def test_a_server_that_goes_away_costs_nothing_but_a_warning(tmp_path, capfd, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 1.0)
    monkeypatch.setattr(train, "added_callbacks", lambda settings: [GoesAway(server)])
    run = tmp_path / "run"
    arguments = [
        *(a for a in TINY if a != "logger=csv"),
        "logger=wandb",
        "logger.wandb.mode=online",
        "trainer.max_steps=6",
    ]
    code, out, _ = command("train", [*arguments, f"hydra.run.dir={run}"], capfd)
    assert "/graphql" in Server.asked
    assert code == 0
    assert "6 steps done" in out
    assert len((run / "metrics.csv").read_text().splitlines()) == 7
    assert list((run / "wandb").glob("run-*/*.wandb"))  # what `wandb sync` sends later


@pytest.fixture(autouse=True)
def _service_of_its_own():
    """W&B's process reads its settings once."""
    wandb.teardown()
    yield
    wandb.teardown()

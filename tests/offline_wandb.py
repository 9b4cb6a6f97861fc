"""Read the file of an offline W&B run, which `wandb sync` sends.

Its format is LevelDB's log format (github.com/google/leveldb, doc/log_format.md) after a header of seven bytes; a record is one
protocol buffer of W&B's own definition.
"""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, FULL, LAST = 32768, 7, 1, 4
PATIENCE = 20.0  # seconds for the last record


class Recorded(NamedTuple):
    """The records of one run."""

    run: Any  # its id, name, group, tags
    config: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, Any]  # name → its definition
    alerts: list[tuple[str, str]]
    summary: dict[str, Any]
    files: Path


def _records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if kind == 0:
            break
        whole += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield whole
            whole = b""


def _kind(raw: bytes) -> str | None:
    record = wandb_internal_pb2.Record()
    record.ParseFromString(raw)
    return record.WhichOneof("record_type")


def read(folder: Path) -> Recorded:
    """Return the records of the only offline run below a run folder. W&B's process may still be writing the last ones."""
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + PATIENCE
    while "exit" not in map(_kind, _records(path)) and time.monotonic() < end:
        time.sleep(0.1)
    run, config, history, metrics, alerts, summary = None, {}, [], {}, [], {}
    for raw in _records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            history.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
        elif kind == "metric":
            metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "alert":
            alerts.append((record.alert.title, record.alert.text))
        elif kind == "summary":
            summary |= {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.summary.update}
    return Recorded(run, config, history, metrics, alerts, summary, path.parent / "files")

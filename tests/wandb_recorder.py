"""A server that speaks as much of W&B's protocol as the online client was seen to use, and notes everything.

It keeps runs, artifacts and the edges between them, and answers only what it knows: any other request, and any field
of a known one that it has no data for, is noted in ``unknown`` and refused. It was written from the requests of
wandb 0.31's client, so it shows what that client asks for and sends; how W&B's own server answers it cannot show.

One rule of the server is assumed, W&B's documented one: an artifact of a known name and digest is the version that is
there already.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from graphql_reader import answer, operation_of

ENTITY, PROJECT = "team", "pedigree"
EPOCH = "2026-01-01T00:00:00Z"
ENTITY_FACTS = {"id": f"entity:{ENTITY}", "name": ENTITY}
PROJECT_FACTS = {
    "__typename": "Project",
    "id": f"project:{PROJECT}",
    "internalId": "1",
    "name": PROJECT,
    "entity": ENTITY_FACTS,
}
NEW_RUN = {
    "description": None, "sweepName": None, "displayName": None, "config": "{}", "summaryMetrics": None, "tags": [],
    "notes": None, "wandbConfig": None, "logLineCount": 0, "historyLineCount": 0, "eventsLineCount": 0,
    "historyTail": "[]", "eventsTail": "[]",
}  # fmt: skip


class Recorder:
    """What the server was told; ``url`` is where it listens."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.url = ""
        self.unknown: list[str] = []
        self.operations: list[tuple[str, dict[str, Any]]] = []
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.exits: dict[str, list[int]] = {}
        self.preempted: list[str] = []
        self.refused: set[str] = set()
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.uses: list[tuple[str, str]] = []
        self.alerts: list[tuple[str, str, str]] = []
        self.stored: dict[str, bytes] = {}

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to one GraphQL request."""
        name = operation_of(query)
        self.operations.append((name, variables))
        handler = getattr(self, f"on_{name}", None)
        if name in self.refused:
            return {"errors": [{"message": f"{name} is refused for the test's sake"}]}
        if handler is None:
            return self.refuse(f"operation {name}: {query}")
        try:
            return {"data": answer(query, variables, handler(variables))}
        except LookupError as error:
            return self.refuse(f"field {error}")

    def on_RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """A run as it was left, or none."""
        run = self.runs.get(asked["name"])
        return {
            "model": {"id": PROJECT, "name": asked["project"], "entity": {"id": ENTITY, "name": ENTITY}, "bucket": run}
        }

    def on_UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """A run begun, taken up again, or renewed in a field."""
        name, inserted = asked["name"], asked["name"] not in self.runs
        run = self.runs.setdefault(name, dict(NEW_RUN, id=f"run:{name}", name=name, project=PROJECT_FACTS))
        given = {"displayName": "displayName", "groupName": "group", "jobType": "jobType", "config": "config"}
        run |= {kept: asked[sent] for sent, kept in given.items() if asked.get(sent) is not None}
        own = json.loads(run["config"]).get("_wandb", {}).get("value", {})
        run["wandbConfig"] = json.dumps({"t": own.get("t")})
        return {"upsertBucket": {"bucket": run, "inserted": inserted}}

    def on_Viewer(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """Whose key it is."""
        facts = {"id": "user:u", "entity": ENTITY, "username": "u", "email": "u@example.org", "flags": "{}"}
        return {"viewer": facts | {"teams": {"edges": []}}}

    def on_CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """Where the run's own files may be put."""
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{asked['run']}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def on_ServerFeaturesQuery(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """No optional feature."""
        return {"serverInfo": {"features": []}}

    def on_ArtifactType(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """Type of the newest artifact of a name."""
        found = [
            one for one in self.artifacts.values() if one["artifactSequence"]["name"] == asked["name"].split(":")[0]
        ]
        return {"project": {"artifact": found[-1] if found else None}}

    def on_CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """The version of that name and digest, made where there is none; its maker is the run that is named, if any."""
        given = asked["input"]
        name, digest = given["artifactCollectionName"], given["digest"]
        same = [
            one for one in self.artifacts.values() if (one["artifactSequence"]["name"], one["digest"]) == (name, digest)
        ]
        found = same[0] if same else self._new_artifact(name, digest, given)
        return {"createArtifact": {"artifact": found}}

    def _versions(self, name: str) -> list[dict[str, Any]]:
        return [one for one in self.artifacts.values() if one["artifactSequence"]["name"] == name]

    def _new_artifact(self, name: str, digest: str, given: dict[str, Any]) -> dict[str, Any]:
        identity = f"artifact:{len(self.artifacts) + 1}"
        sequence: dict[str, Any] = {"__typename": "ArtifactSequence", "name": name, "project": PROJECT_FACTS}
        facts = {
            "__typename": "Artifact", "id": identity, "artifactSequence": sequence, "digest": digest,
            "artifactType": {"name": given["artifactTypeName"]}, "metadata": given["metadata"],
            "maker": given["runName"], "state": "PENDING",
        }  # fmt: skip
        facts |= {
            "versionIndex": 0, "description": None, "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [],
            "historyStep": given["historyStep"], "size": 0, "digestAlgorithm": given["digestAlgorithm"],
            "commitHash": identity, "fileCount": 1, "createdAt": EPOCH, "updatedAt": EPOCH, "aliases": [],
        }  # fmt: skip
        sequence["latestArtifact"] = None
        self.artifacts[identity] = facts
        return facts

    def on_CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """Where an artifact's list of files may be put."""
        return {"createArtifactManifest": {"artifactManifest": self._manifest(asked["artifactID"])}}

    def on_UpdateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """The same, when the list is complete."""
        identity = asked["artifactManifestID"].removeprefix("manifest:")
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(identity)}}

    def _manifest(self, identity: str) -> dict[str, Any]:
        url = f"{self.url}/storage/manifests/{identity}"
        return {"id": f"manifest:{identity}", "file": {"id": f"file:{identity}", "uploadUrl": url, "uploadHeaders": []}}

    def on_CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """All of it is there."""
        found = self.artifacts[asked["artifactID"]]
        found["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": found}}

    def on_UseArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """An input edge."""
        given = asked["input"]
        self.uses.append((given["runName"], given["artifactID"]))
        return {"useArtifact": {"artifact": self.artifacts[given["artifactID"]]}}

    def on_NotifyScriptableRunAlert(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """Something an operator should read."""
        self.alerts.append((asked["runName"], asked["title"], asked["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def on_ArtifactByID(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        """All facts of one artifact."""
        return {"artifact": self.artifacts.get(asked["id"])}

    def refuse(self, what: str) -> dict[str, Any]:
        """Note a request that is not known, and refuse it."""
        self.unknown.append(what)
        return {"errors": [{"message": f"the recorder does not know {what}"}]}

    def put(self, path: str, body: bytes) -> None:
        """Keep an uploaded file."""
        self.stored[path] = body

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take in rows, summary and the end of a run."""
        files = body.get("files") or {}
        self.preempted += [run] * bool(body.get("preempting"))
        for name, chunk in files.items():
            lines = [json.loads(line) for line in chunk["content"] if line.startswith("{")]
            if name == "wandb-history.jsonl":
                self._history(run, chunk["offset"], lines)
            elif name == "wandb-summary.json":
                self.runs[run]["summaryMetrics"] = json.dumps(lines[-1])
            elif name != "wandb-events.jsonl":
                self.unknown.append(f"streamed file {name}")
        strange = set(body) - {"files", "complete", "exitcode", "uploaded", "dropped", "preempting"}
        self.unknown += [f"streamed {name}" for name in sorted(strange)]
        if body.get("complete"):
            self.exits.setdefault(run, []).append(body["exitcode"])
        return {"limits": {}}

    def _history(self, run: str, offset: int, lines: list[dict[str, Any]]) -> None:
        rows = self.rows.setdefault(run, [])
        # The place of a line is the client's to say: one that is sent again does not count twice.
        rows[offset : offset + len(lines)] = lines
        tail = json.dumps([json.dumps(rows[-1])])
        self.runs[run] |= {"historyLineCount": len(rows), "historyTail": tail}


class _Handler(BaseHTTPRequestHandler):
    recorder: Recorder
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on the console."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _note(self) -> bytes:
        body = self._body()
        self.recorder.bodies.append(body)
        self.recorder.paths.append(f"{self.command} {self.path}")
        return body

    def do_POST(self) -> None:
        with self.recorder.lock:
            body, parts = self._note(), self.path.strip("/").split("/")
            if self.path == "/graphql":
                asked = json.loads(body)
                found = self.recorder.graphql(asked["query"], asked.get("variables") or {})
                self._reply(found, 400 if "errors" in found else 200)
            elif parts[:3] == ["files", ENTITY, PROJECT] and parts[4:] == ["file_stream"]:
                self._reply(self.recorder.stream(parts[3], json.loads(body)))
            else:
                self._reply(self.recorder.refuse(f"POST {self.path}"), 404)

    def do_PUT(self) -> None:
        with self.recorder.lock:
            body = self._note()
            if not self.path.startswith("/storage/"):
                self._reply(self.recorder.refuse(f"PUT {self.path}"), 404)
                return
            self.recorder.put(self.path, body)
            self._reply({})

    def do_GET(self) -> None:
        with self.recorder.lock:
            self._note()
            self._reply(self.recorder.refuse(f"GET {self.path}"), 404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is at its end."""


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """A recorder that listens on this machine, ended on leaving."""
    recorder = Recorder()
    handler = type("Handler", (_Handler,), {"recorder": recorder})
    server = _Server(("127.0.0.1", 0), handler)
    recorder.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

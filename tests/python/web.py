"""Asking agents over HTTP, and being told by them: what tests of hooks, probes and the page share."""

import contextlib
import http.client
import http.server
import json
import threading
import time

from mesh import PATIENCE, POLL, Failure


class Web:
    """A node's HTTP, by the standard library."""

    def __init__(self, agent=None, address=None):
        self.address = address or agent.status()["http"]

    def ask(self, path, method="GET", body=None, **headers):
        """Status and body of one call; the body is parsed where it is JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body, headers=named)
            answer = connection.getresponse()
            content = answer.read().decode()
            kind = answer.getheader("content-type", "")
            return answer.status, json.loads(content) if kind.startswith("application/json") else content
        finally:
            connection.close()

    def get(self, path):
        status, body = self.ask(path)
        if status != 200:
            raise Failure(f"{path}: {status} {body}")
        return body

    def wait(self, path, what, fits):
        """Asks until status and body fit; returns the body."""
        deadline = time.monotonic() + PATIENCE
        while True:
            status, body = self.ask(path)
            if fits(status, body):
                return body
            if time.monotonic() > deadline:
                raise Failure(f"not within {PATIENCE} s: {what}; last: {status} {body}")
            time.sleep(POLL)

    def metrics(self):
        """``{name: {frozenset of (label, value): number}}``."""
        found = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith("#") or not line:
                continue
            series, value = line.rsplit(" ", 1)
            name, _, labels = series.partition("{")
            pairs = [pair.split("=", 1) for pair in labels.rstrip("}").split(",") if pair]
            found.setdefault(name, {})[frozenset((k, v.strip('"')) for k, v in pairs)] = float(value)
        return found

    @contextlib.contextmanager
    def events(self, last=None, count=0):
        """An open ``/v1/events``: an iterator over events as ``(kind, id, data)``."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        connection.request("GET", f"/v1/events?last={count}", headers={"Last-Event-ID": last} if last else {})
        answer = connection.getresponse()
        if answer.status != 200:
            raise Failure(f"/v1/events: {answer.status}")
        try:
            yield _events(answer)
        finally:
            connection.close()


def _events(answer):
    fields = {}
    while True:
        line = answer.readline().decode().rstrip("\n")
        if line == "":
            if "data" in fields:
                yield fields["event"], fields["id"], json.loads(fields["data"])
            fields = {}
            continue
        name, _, value = line.partition(":")
        if name:
            fields[name] = value.removeprefix(" ")


class Receiver:
    """A webhook's other end. ``respond`` gets each request's number and JSON, and returns a status, or ``None`` to hang up."""

    def __init__(self, respond=lambda n, event: 204, port=0):
        self.seen = []
        self.headers = []
        self._changed = threading.Condition()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                event = json.loads(body)
                with outer._changed:
                    number = len(outer.seen) + 1
                    outer.headers.append((dict(self.headers), body))
                    outer.seen.append(event)
                    outer._changed.notify_all()
                status = respond(number, event)
                if status is None:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            # One that was stopped is to be there again at once.
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def wait(self, what, fits):
        """Until what has been seen fits; returns it."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while not fits(self.seen):
                if not self._changed.wait(deadline - time.monotonic()):
                    raise Failure(f"the receiver: not within {PATIENCE} s: {what}; seen: {kinds(self.seen)}")
            return list(self.seen)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def kinds(events):
    return [event["event"] for event in events]

"""What an agent says over HTTP: readiness, state, metrics, events; and who may write."""

import json
import os
import socket
import sys
import unittest

import fleet
from mesh import CHANNEL, PATIENCE, ROOT, needs_program
from web import Web, kinds

try:
    import jsonschema
except ImportError:
    jsonschema = None

TOKEN = "0123456789abcdef0123456789abcdef"


@needs_program()
class Http(fleet.Fleet):
    def token(self):
        path = self.site.path("token")
        with open(path, "w", encoding="ascii") as file:
            file.write(TOKEN + "\n")
        return path

    def test_readiness_says_why_not_and_agrees_with_status_and_engine(self):
        self.publish(1)
        web = Web(self.node)
        status, body = web.ask("/readyz")
        self.assertEqual((status, body["reason"]), (503, "no engine has registered yet"))
        engine = self.start_engine()
        code = "import os, sys; sys.exit('it is wrong' if os.environ['AQUIFER_SEQ'] == '2' else 0)"
        engine.tell("check", command=[sys.executable, "-c", code])
        engine.tell("allocate", twin=None)
        self.assertEqual(web.ask("/readyz?engine=nobody")[0], 503)
        engine.tell("wait")
        ready = web.wait("/readyz", "it is ready", lambda status, body: status == 200)
        view = self.node.status()
        channel = ready["channels"][0]
        self.assertEqual((channel["channel"], channel["seq"], channel["ready"]), (CHANNEL, 1, True))
        self.assertEqual(channel["manifest"], view["engines"][0]["serving"])
        self.assertTrue(view["readiness"]["ready"] and view["engines"][0]["ready"])
        self.assertEqual(web.ask("/readyz?engine=engine&channel=" + CHANNEL)[0], 200)
        self.assertEqual(web.ask("/readyz?channel=other/channel")[0], 503)
        # A release that the engine's check refuses: it is where it was, and that is not where its channel is.
        second = self.publish(2)
        body = web.wait("/readyz", "the check has failed", lambda status, body: "it is wrong" in body["reason"])
        self.assertFalse(body["ready"])
        self.assertEqual(body["channels"][0]["manifest"], second)
        self.assertEqual(web.ask("/readyz?engine=engine")[0], 503)
        self.assertEqual(web.get("/healthz"), {"status": "ok"})
        engine.kill()
        web.wait("/readyz", "the engine is gone", lambda status, body: status == 503 and not body["engines"])

    def test_what_is_said_is_what_the_document_says(self):
        _, first = self.engine()
        web = Web(self.node)
        web.wait("/readyz", "it is ready", lambda status, _: status == 200)
        document = web.get("/v1/openapi.json")
        with open(os.path.join(ROOT, "docs", "openapi.json"), encoding="utf-8") as file:
            self.assertEqual(document, json.load(file))
        if jsonschema is None:
            self.skipTest("no Python here has jsonschema")
        resolver = jsonschema.RefResolver("", document)
        asked = set()
        for path, calls in document["paths"].items():
            if "get" not in calls or path in ("/metrics", "/v1/events", "/v1/openapi.json"):
                continue
            schema = calls["get"]["responses"]["200"]["content"]["application/json"]["schema"]
            jsonschema.Draft202012Validator(schema, resolver=resolver).validate(web.get(path))
            asked.add(path)
        self.assertGreaterEqual(asked, {"/readyz", "/v1/status", "/v1/releases", "/v1/autoscale", "/v1/swarm"})

        def shown(_, body):
            return body["channels"][0]["manifest"] == first

        # Readiness is told a moment before the rest is shown.
        web.wait("/v1/channels", "the release is shown", shown)
        self.assertEqual(web.get("/v1/releases")["releases"][0]["seq"], 1)
        swarm = web.get("/v1/swarm?channel=" + CHANNEL)
        self.assertEqual(swarm["manifest"], first)
        self.assertTrue(swarm["buckets"])
        peers = self.node.status()["peers"]
        web.wait("/v1/peers", "peers are those of the status", lambda _, body: body["peers"] == peers)
        self.assertEqual(web.ask("/v1/releases?channel=no/such")[0], 404)
        for path in ("/v1/autoscale?nodes=many", "/v1/events?last=-1"):
            status, body = web.ask(path)
            self.assertEqual((status, list(body)), (400, ["error"]), path)
        self.assertEqual(web.ask("/v2")[0], 404)
        self.assertEqual(web.ask("/v1/status", host="evil.example")[0], 421)

    def test_metrics_count_what_happened(self):
        engine, _ = self.engine()
        web = Web(self.node)
        self.assert_takes(engine, 2)

        measured = f'aquifer_phase_seconds_count{{channel="{CHANNEL}",phase="ready"}} 2\n'
        served = f'aquifer_served_release_sequence{{channel="{CHANNEL}"}} 2\n'
        web.wait("/metrics", "both releases were measured", lambda _, body: measured in body and served in body)
        metrics = web.metrics()
        view = self.node.status()

        def value(name, **labels):
            return metrics["aquifer_" + name][frozenset(labels.items())]

        self.assertEqual(value("ready"), 1)
        self.assertEqual(value("engines", channel=CHANNEL, state="ready"), 1)
        self.assertEqual(value("release_sequence", channel=CHANNEL), 2)
        self.assertEqual(value("served_release_sequence", channel=CHANNEL), 2)
        self.assertEqual(value("release_lag_seconds", channel=CHANNEL), 0)
        self.assertEqual(value("phase_seconds_count", channel=CHANNEL, phase="ready"), 2)
        self.assertEqual(value("engine_pause_seconds_count", channel=CHANNEL, engine="engine"), 1)
        self.assertEqual(value("chunks_verified_total"), view["traffic"]["chunks_verified"])
        received = sum(metrics["aquifer_received_bytes_total"].values())
        self.assertEqual(received, view["traffic"]["bytes_in"])
        self.assertTrue(all(dict(labels)["channel"] == CHANNEL for labels in metrics["aquifer_received_bytes_total"]))
        self.assertEqual(value("check_failures_total", channel=CHANNEL), 0)

    def test_a_release_that_is_followed_at_once_is_counted_and_told(self):
        """Many things are looked at five times a second; what a release comes to is not one of them."""
        engine, first = self.engine()
        web = Web(self.node)
        served = [first]
        for number in range(2, 14):
            served.append(self.publish(number))
            engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == served[-1], f"it serves {number}")
        measured = f'aquifer_phase_seconds_count{{channel="{CHANNEL}",phase="ready"}} {len(served)}\n'
        web.wait("/metrics", "each was measured", lambda _, body: measured in body)
        activated = []
        with web.events(count=1000) as events:
            for kind, _, event in events:
                if kind == "activated":
                    activated.append(event["manifest"])
                if activated[-1:] == served[-1:]:
                    break
        self.assertEqual(activated, served)

    def test_a_publisher_answers_where_it_is_asked_to(self):
        engine, first = self.engine()
        silent = self.publishers[0].published
        self.assertIsNone(silent["http"])
        options = ("--http", "127.0.0.1:0", "--http-token", self.token())
        publisher = self.publish_with(2, *options)
        web = Web(address=publisher.published["http"])
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == publisher.manifest, "it serves 2")
        ready = web.wait("/readyz", "what it publishes is announced", lambda status, _: status == 200)
        channel = ready["channels"][0]
        self.assertEqual((channel["channel"], channel["seq"], channel["manifest"]), (CHANNEL, 2, publisher.manifest))
        self.assertEqual(web.get("/v1/status")["publication"]["manifest"], publisher.manifest)
        web.wait("/metrics", "it counts what it sent", lambda _, body: "aquifer_sent_bytes_total{" in body)
        self.assertNotEqual(first, publisher.manifest)
        self.assertEqual(web.ask("/v1/drain", "POST")[0], 401)
        self.assertEqual(web.ask("/v1/drain", "POST", authorization="Bearer " + TOKEN)[0], 202)
        self.assertEqual(publisher.wait(), 0)

    def test_a_publisher_is_ready_whomever_its_release_is_for_and_whatever_comes_after(self):
        self.publish(1)
        publisher = self.publish_with(2, "--http", "127.0.0.1:0", "--subset", "zone=elsewhere")
        web = Web(address=publisher.published["http"])
        web.wait("/readyz", "its release is out", lambda status, _: status == 200)
        self.publish(3)
        newest = f'aquifer_release_sequence{{channel="{CHANNEL}"}} 3\n'
        body = web.wait("/metrics", "it has heard of the next", lambda _, body: newest in body)
        self.assertIn(f'aquifer_release_lag_seconds{{channel="{CHANNEL}"}} 0\n', body)
        self.assertEqual(web.ask("/readyz")[0], 200)
        # What is not there any more cannot be had from it.
        with open(os.path.join(self.site.path("release-2"), "model.safetensors"), "r+b") as file:
            file.truncate(1 << 20)
        body = web.wait("/readyz", "its files changed", lambda status, _: status == 503)
        self.assertIn("the published files changed", body["reason"])

    def test_a_holder_whose_engine_is_gone_is_not_behind(self):
        engine, _ = self.engine(options=("--hold", "all"))
        web = Web(self.node)
        engine.kill()
        second = self.publish(2)
        self.node.wait_holds(second)
        web.wait("/readyz", "it holds all", lambda status, body: status == 200)
        served = f'aquifer_served_release_sequence{{channel="{CHANNEL}"}} 2'
        lags = f'aquifer_release_lag_seconds{{channel="{CHANNEL}"}} 0\n'
        web.wait("/metrics", "it is behind nothing", lambda _, body: served in body and lags in body)

    def test_a_crowd_that_never_finishes_asking_keeps_nobody_out(self):
        self.publish(1)
        web = Web(self.node)
        host, port = web.address.split(":")
        crowd = [socket.create_connection((host, int(port))) for _ in range(100)]
        for half in crowd:
            half.sendall(b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n")
        self.assertEqual(web.get("/healthz"), {"status": "ok"})
        for half in crowd:
            half.settimeout(PATIENCE)
            # Turned away, or closed without a word.
            while half.recv(4096):
                pass
            half.close()

    def test_events_tell_a_release_from_heard_to_activated(self):
        engine, first = self.engine()
        web = Web(self.node)
        with web.events() as events:
            second = self.publish(2)
            seen = []
            for kind, identity, event in events:
                seen.append(event)
                self.assertEqual((kind, identity), (event["event"], event["id"]))
                if kind == "activated" and event["manifest"] == second:
                    break
        # Whoever hears of it finds it so.
        self.assertEqual(web.ask("/readyz")[0], 200)
        self.assertEqual(web.get("/v1/status")["engines"][0]["serving"], second)
        self.assertEqual(web.metrics()["aquifer_served_release_sequence"][frozenset([("channel", CHANNEL)])], 2)
        of_second = [event for event in seen if event["manifest"] == second]
        self.assertEqual([k for k in kinds(of_second) if k != "hydrating"], ["heard", "hydrated", "activated"])
        self.assertEqual([e["seq"] for e in seen], list(range(seen[0]["seq"], seen[0]["seq"] + len(seen))))
        with web.events(last=seen[0]["id"]) as events:
            self.assertEqual(next(events)[2], seen[1])
        with web.events(count=1) as events:
            self.assertEqual(next(events)[2], seen[-1])

    def test_only_who_has_the_token_makes_it_leave(self):
        self.options = ("--http-token", self.token())
        self.publish(1)
        web = Web(self.node)
        self.assertEqual(web.ask("/v1/drain", "POST")[0], 401)
        self.assertEqual(web.ask("/v1/drain", "POST", authorization="Bearer " + TOKEN[:-1])[0], 401)
        self.assertEqual(web.ask("/v1/drain", "GET")[0], 405)
        self.node.process.check_alive()
        status, body = web.ask("/v1/drain", "POST", authorization="Bearer " + TOKEN, body='{"grace_seconds": "x"}')
        self.assertEqual(status, 400, body)
        # However long it is given, it leaves when nothing is left to do.
        long = '{"grace_seconds": 1e19}'
        status, body = web.ask("/v1/drain", "POST", authorization="Bearer " + TOKEN, body=long)
        self.assertEqual((status, body["draining"], body["ready"]), (202, True, False))
        self.assertEqual(self.node.process.wait(), 0)

    def test_without_a_token_nobody_writes_and_the_socket_does(self):
        self.publish(1)
        self.assertEqual(Web(self.node).ask("/v1/drain", "POST", authorization="Bearer x")[0], 403)
        done = self.site.run("drain", "--socket", self.node.socket, "--json")
        self.assertTrue(json.loads(done.stdout)["whole"])
        self.assertEqual(self.node.process.wait(), 0)


if __name__ == "__main__":
    unittest.main()

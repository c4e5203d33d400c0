"""Hooks: events arrive in order and at least once, whatever their receiver does, and the agent waits for none."""

import base64
import hashlib
import hmac
import json
import threading
import unittest

import fleet
from mesh import needs_program
from web import Receiver, Web, kinds


def check_order(test, events, node):
    """Each process's events come in order, none is missing up to the last, and repeats repeat what they repeat."""
    lives = {}
    for event in events:
        test.assertEqual(event["node"], node)
        life, seq = event["id"].rsplit("-", 1)
        test.assertEqual(int(seq), event["seq"])
        known = lives.setdefault(life, [])
        if event["seq"] not in known:
            test.assertTrue(not known or event["seq"] > known[-1], kinds(events))
            known.append(event["seq"])
    return lives


@needs_program()
class Hooks(fleet.Fleet):
    def secret(self):
        path = self.site.path("secret")
        with open(path, "w", encoding="ascii") as file:
            file.write("whsec_" + base64.b64encode(b"s" * 32).decode() + "\n")
        return path

    def node_id(self):
        return self.node.status()["node"]

    def test_a_receiver_that_is_down_gets_everything_once_it_is_back(self):
        absent = Receiver()
        absent.close()
        engine, first = self.engine(options=("--webhook", absent.url, "--webhook-secret", self.secret()))
        self.assert_takes(engine, 2)
        web = Web(self.node)
        web.wait("/readyz", "it is ready while nobody hears its events", lambda status, _: status == 200)
        self.assertGreater(sum(web.metrics()["aquifer_hook_pending"].values()), 0)
        receiver = Receiver(port=absent.port)
        self.addCleanup(receiver.close)
        seen = receiver.wait("both releases", lambda seen: kinds(seen).count("activated") == 2)
        self.assertEqual(len(check_order(self, seen, self.node_id())), 1)
        told = [event["event"] for event in seen if event["manifest"] == first]
        self.assertEqual(told, ["heard", "hydrated", "activated"])
        for headers, body in receiver.headers:
            signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
            expected = base64.b64encode(hmac.new(b"s" * 32, signed, hashlib.sha256).digest()).decode()
            self.assertEqual(headers["webhook-signature"], f"v1,{expected}")
            self.assertEqual(headers["webhook-id"], json.loads(body)["id"])
        web.wait("/metrics", "nothing waits", lambda _, body: 'aquifer_queue_depth{queue="hooks"} 0' in body)

    def test_a_slow_one_and_one_that_errs_hold_nothing_up(self):
        let = threading.Event()
        self.addCleanup(let.set)

        def slow(number, event):
            let.wait()
            return 204

        def erring(number, event):
            # Every first attempt, by an error or by hanging up; the second is taken.
            return 204 if number % 3 == 0 else (500 if number % 3 == 1 else None)

        slow_one, erring_one = Receiver(slow), Receiver(erring)
        self.addCleanup(slow_one.close)
        self.addCleanup(erring_one.close)
        options = ("--webhook", slow_one.url, "--webhook", erring_one.url)
        options += ("--hook-event", "activated", "--hook-event", "heard")
        engine, _ = self.engine(options=options)
        self.assert_takes(engine, 2)
        self.assertEqual(len(slow_one.seen), 1, "it has not answered the first")
        let.set()
        for receiver in (slow_one, erring_one):
            seen = receiver.wait("both releases", lambda seen: kinds(seen).count("activated") >= 2)
            self.assertEqual(set(kinds(seen)), {"heard", "activated"})
            check_order(self, seen, self.node_id())

    def test_what_was_not_delivered_outlives_the_agent(self):
        absent = Receiver()
        absent.close()
        engine, first = self.engine(options=("--webhook", absent.url))
        web = Web(self.node)
        web.wait("/readyz", "it is ready", lambda status, _: status == 200)
        with web.events(last="from the start") as events:
            for kind, identity, _ in events:
                if kind == "activated":
                    activated = identity
                    break
        node = self.node_id()
        self.node.kill()
        self.node.start()
        receiver = Receiver(port=absent.port)
        self.addCleanup(receiver.close)
        seen = receiver.wait("the event of the life before", lambda seen: activated in [e["id"] for e in seen])
        seen = receiver.wait("and of this one", lambda seen: len({e["id"].rsplit("-", 1)[0] for e in seen}) == 2)
        lives = list(check_order(self, seen, node).values())
        self.assertEqual(lives[0], sorted(lives[0]))
        # All of its life before the restart come before any of this one.
        first_life = [e["id"].rsplit("-", 1)[0] for e in seen]
        self.assertEqual(first_life, sorted(first_life, key=first_life.index))

    def test_a_command_gets_events_on_its_standard_input(self):
        place = self.site.path("told")
        command = f"cat >> {place}; echo $AQUIFER_EVENT >> {place}.kinds"
        self.engine(options=("--hook", command, "--hook-event", "activated"))

        def told():
            try:
                with open(f"{place}.kinds", encoding="utf-8") as file:
                    return file.read().split()
            except FileNotFoundError:
                return []

        self.node.wait_until("the command has run", lambda status: told())
        with open(place, encoding="utf-8") as file:
            events = [json.loads(line) for line in file]
        self.assertEqual((kinds(events), told()), (["activated"], ["activated"]))

    def test_what_cannot_be_a_hook_is_refused_at_the_start(self):
        for options, problem in [
            (("--webhook", "ftp://example.test/"), "neither http nor https"),
            (("--hook-event", "explodes"), "events are joined, heard"),
            (("--http", "here"), "is not ip:port"),
            (("--drain-grace", "soon"), "--drain-grace: 'soon' is not a duration"),
        ]:
            own = ("--channel", "a/b", "--trust", self.site.trust, "--socket", self.site.path("x.sock"), *options)
            command = self.site.node("agent", *own, name="refused", peers=[])
            done = self.site.run(*command[3:], code=1)
            self.assertIn(problem, done.stderr)


if __name__ == "__main__":
    unittest.main()

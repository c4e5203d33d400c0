"""A real Prometheus that asks real agents and judges them by the rules of ``deploy/prometheus``."""

import collections
import http.client
import itertools
import json
import os
import re
import shutil
import time
import urllib.parse

from mesh import PATIENCE, POLL, ROOT, Failure, Process

RULES = os.path.join(ROOT, "deploy", "prometheus", "rules.yml")

#: So much shorter is every time in the rules: 10 minutes are 10 seconds.
FACTOR = 60
#: The shortest ``for`` is three of them: one scrape that comes late on a busy machine raises no alert.
SCRAPE = "1s"
#: Comparisons with a number of seconds, which a duration's unit does not give away.
SECONDS = ["aquifer_release_lag_seconds > 900", "aquifer_hook_oldest_seconds > 600", "aquifer_uptime_seconds < 900"]

_UNIT_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_ports = itertools.count(17404)

Shortened = collections.namedtuple("Shortened", "text times thresholds")


def program():
    return shutil.which("prometheus")


def promtool():
    return shutil.which("promtool")


def shorten(text):
    """The rules with every ``for:``, every range of an expression and each of :data:`SECONDS` divided by
    :data:`FACTOR`. All else stays as it is: what is tested is what is deployed, only faster."""
    times = 0

    def faster(match):
        nonlocal times
        times += 1
        return f"{match[1]}{int(match[2]) * _UNIT_MS[match[3]] // FACTOR}ms{match[4]}"

    text = re.sub(r"(\n +for: )(\d+)([smhd])(?=\n)()", faster, text)
    text, thresholds = re.sub(r"([\w}]\[)(\d+)([smhd])(\])", faster, text), 0
    for seconds in SECONDS:
        before, _, number = seconds.rpartition(" ")
        thresholds += text.count(seconds)
        text = text.replace(seconds, f"{before} {int(number) / FACTOR}")
    return Shortened(text, times, thresholds)


def free_address():
    """A place to listen at that is nobody else's, and stays so while its owner is down: all of 127/8 is this machine,
    the address is made of this process's id, and nobody listens at these ports everywhere."""
    high, middle, low = (os.getpid() >> 16) & 0x7F, (os.getpid() >> 8) & 0xFF, os.getpid() & 0xFF
    return f"127.{high | 0x80}.{middle}.{low}:{next(_ports)}"


class Prometheus(Process):
    """Scrapes what :meth:`watch` names."""

    def __init__(self, site):
        self.address = free_address()
        self._targets = site.path("targets.json")
        self._named = {}
        self._write_targets()
        with open(RULES, encoding="utf-8") as file:
            rules = shorten(file.read())
        with open(site.path("rules.yml"), "w", encoding="utf-8") as file:
            file.write(rules.text)
        # JSON is YAML.
        config = {
            "global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": "500ms"},
            "rule_files": [site.path("rules.yml")],
            "scrape_configs": [
                {"job_name": "aquifer", "file_sd_configs": [{"files": [self._targets], "refresh_interval": "1s"}]}
            ],
        }
        with open(site.path("prometheus.yml"), "w", encoding="utf-8") as file:
            json.dump(config, file)
        options = ["--config.file", site.path("prometheus.yml"), "--storage.tsdb.path", site.path("prometheus")]
        options += ["--web.listen-address", self.address, "--log.level", "warn"]
        super().__init__(site, "prometheus", [program(), *options], site.environment)
        self._wait("it is ready", lambda: self._ask("/-/ready")[0] == 200)

    def watch(self, **addresses):
        """Scrapes these besides, each under its name as ``instance``."""
        self._named.update(addresses)
        self._write_targets()

    def unwatch(self, name):
        del self._named[name]
        self._write_targets()

    def get(self, path, **parameters):
        """The ``data`` of an answer of the API."""
        query = urllib.parse.urlencode(parameters)
        status, body = self._ask(f"/api/v1/{path}?{query}")
        if status != 200:
            raise Failure(f"prometheus: {path} {parameters}: {status} {body}")
        return json.loads(body)["data"]

    def alerts(self):
        """All that are pending or firing: ``(name, labels, state)``."""
        return [
            (alert["labels"]["alertname"], alert["labels"], alert["state"])
            for alert in self.get("alerts")["alerts"]
        ]

    def rules(self):
        """Names of all alerts that it has loaded."""
        groups = self.get("rules")["groups"]
        return [rule["name"] for group in groups for rule in group["rules"] if rule["type"] == "alerting"]

    def wait_scraped(self):
        """Until all that are watched have answered, twice: from then on what increases is seen to."""

        def scraped():
            health = {t["labels"]["instance"]: t["health"] for t in self.get("targets")["activeTargets"]}
            counts = self.get("query", query='count_over_time(up{job="aquifer"}[1m]) > 1')["result"]
            twice = {result["metric"]["instance"] for result in counts}
            return set(health.values()) == {"up"} and set(health) == set(self._named) <= twice

        self._wait("all are up", scraped)

    def wait_firing(self, alert, instance, **labels):
        """Until this alert fires for this node. Returns its labels."""
        found = {}

        def firing():
            for name, seen, state in self.alerts():
                if (name, seen.get("instance"), state) == (alert, instance, "firing"):
                    if all(seen.get(label) == value for label, value in labels.items()):
                        found.update(seen)
                        return True
            return False

        self._wait(f"{alert} fires for {instance} {labels or ''}", firing)
        return found

    def wait_clear(self, alert, instance):
        """Until this alert neither fires nor is about to."""
        self._wait(
            f"{alert} is over for {instance}",
            lambda: not any((name, seen.get("instance")) == (alert, instance) for name, seen, _ in self.alerts()),
        )

    def wait_silent(self, seconds=0.0):
        """Until no alert fires or is about to, and for so long none was. One that is about to, as when a scrape came
        too late on a busy machine, begins that time anew; one that fires in it is a failure."""
        since = None

        def silent():
            nonlocal since
            alerts, now = self.alerts(), time.monotonic()
            firing = [alert for alert in alerts if alert[2] == "firing"]
            if since is not None and firing:
                raise Failure(f"prometheus: all is well, and there are alerts: {firing}")
            if alerts:
                since = None if since is None else now
                return False
            since = now if since is None else since
            return now >= since + seconds

        self._wait(f"all is well for {seconds} s", silent)

    def firing_for(self):
        """Nodes of which something fires."""
        return {labels["instance"] for _, labels, state in self.alerts() if state == "firing"}

    def _wait(self, what, fits):
        deadline = time.monotonic() + PATIENCE
        while True:
            self.check_alive()
            try:
                if fits():
                    return
            except OSError:
                pass  # It does not listen yet.
            if time.monotonic() > deadline:
                raise Failure(f"prometheus: not within {PATIENCE} s: {what}; {self._state()}")
            time.sleep(5 * POLL)

    def _state(self):
        targets = [(t["labels"]["instance"], t["health"], t["lastError"]) for t in self.get("targets")["activeTargets"]]
        return f"alerts: {self.alerts()}; targets: {targets}"

    def _write_targets(self):
        groups = [{"targets": [address], "labels": {"instance": name}} for name, address in self._named.items()]
        # Prometheus reads it whenever it changes: never half of it.
        with open(f"{self._targets}.new", "w", encoding="utf-8") as file:
            json.dump(groups, file)
        os.replace(f"{self._targets}.new", self._targets)

    def _ask(self, path):
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

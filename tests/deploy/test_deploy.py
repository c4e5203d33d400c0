"""deploy/ as it is has nothing wrong with it, and each check finds the mistake that it is for.

python3 -m unittest discover -v -s tests/deploy -t tests/deploy
"""

import os
import re
import shutil
import tempfile
import unittest

import checks


def lacking(*modules):
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            return f"the Python package {module} is not here (tests/deploy/requirements.txt)"
    return None


def skip(reason):
    return unittest.skipIf(reason is not None, reason or "")


class Deploy(unittest.TestCase):
    """Copies of deploy/ with a mistake in them."""

    def planted(self, name, old, new):
        """A copy in which `old`, which must be there, is `new` in the file `name`."""
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        tree = os.path.join(temporary.name, "deploy")
        shutil.copytree(checks.DEPLOY, tree)
        path = os.path.join(tree, name)
        with open(path) as file:
            text = file.read()
        self.assertIn(old, text)
        with open(path, "w") as file:
            file.write(text.replace(old, new, 1))
        return tree

    def found(self, problems, pattern):
        self.assertTrue(any(re.search(pattern, p, re.DOTALL) for p in problems), f"{pattern} is not in {problems}")

    def clean(self, problems):
        self.assertEqual(list(problems), [])


@skip(lacking("yamllint"))
class Yaml(Deploy):
    def test_it_is_tidy(self):
        self.clean(checks.yaml_problems(checks.DEPLOY))

    def test_a_key_that_is_there_twice_is_found(self):
        tree = self.planted(
            "kubernetes/base/service.yaml", "  clusterIP: None\n", "  clusterIP: None\n  clusterIP: None\n"
        )
        self.found(checks.yaml_problems(tree), "duplication")


@skip(None if os.path.exists(checks.PROGRAM) else f"{checks.PROGRAM} is not built")
class Options(Deploy):
    def test_the_program_has_them(self):
        self.clean(checks.option_problems(checks.DEPLOY))

    def test_one_that_it_has_not_is_found(self):
        tree = self.planted("kubernetes/base/daemonset.yaml", "AQUIFER_SHM_DIR", "AQUIFER_SHM_PATH")
        self.found(checks.option_problems(tree), "AQUIFER_SHM_PATH")
        tree = self.planted("kubernetes/base/aquifer.toml", "\nmdns =", "\nmulticast =")
        self.found(checks.option_problems(tree), "multicast")
        tree = self.planted("systemd/aquifer.service", "--mesh-key", "--key")
        self.found(checks.option_problems(tree), "--key")


class Http(Deploy):
    def test_the_agent_has_what_is_asked_for(self):
        self.clean(checks.http_problems(checks.DEPLOY))

    def test_what_it_has_not_is_found(self):
        tree = self.planted("kubernetes/base/daemonset.yaml", "{path: /healthz", "{path: /health")
        self.found(checks.http_problems(tree), "the agent has no /health$")
        tree = self.planted("kubernetes/overlays/keda/scaledobject.yaml", "/v1/autoscale", "/v1/scale")
        self.found(checks.http_problems(tree), "the agent has no /v1/scale")
        tree = self.planted(
            "kubernetes/overlays/keda/scaledobject.yaml", "valueLocation: ready_replicas", "valueLocation: ready_nodes"
        )
        self.found(checks.http_problems(tree), "no answer has ready_nodes")


@skip(checks.missing("systemd-analyze"))
class Systemd(Deploy):
    UNIT = "systemd/aquifer.service"

    def test_the_unit_is_sound_and_confined(self):
        self.clean(checks.systemd_problems(checks.DEPLOY))
        print(f"exposure {checks.exposure(checks.DEPLOY)} of at most {checks.EXPOSURE_MOST}", end=" ... ")

    def test_so_it_is_with_the_drop_ins(self):
        for drop_in in ("rdma-gpu.conf.example", "http-token.conf.example"):
            self.clean(checks.systemd_problems(checks.DEPLOY, [drop_in]))

    def test_a_directive_that_is_none_is_found(self):
        tree = self.planted(self.UNIT, "WatchdogSec=30", "WatchdogSecs=30")
        self.found(checks.systemd_problems(tree), "WatchdogSecs")

    def test_an_open_unit_is_found(self):
        with open(os.path.join(checks.DEPLOY, self.UNIT)) as file:
            confined = re.search(r"NoNewPrivileges=.*(?=\[Install\])", file.read(), re.DOTALL)[0]
        tree = self.planted(self.UNIT, confined, "")
        self.found(checks.systemd_problems(tree), "more exposed than")

    def test_it_is_given_longer_than_a_drain_takes(self):
        with open(os.path.join(checks.DEPLOY, self.UNIT)) as file:
            stop = int(re.search(r"^TimeoutStopSec=(\d+)$", file.read(), re.MULTILINE)[1])
        self.assertGreater(stop, checks.DRAIN_GRACE_S + 5)


@skip(checks.missing("promtool") or lacking("yaml", "jsonschema"))
class Prometheus(Deploy):
    RULES = "prometheus/rules.yml"

    def test_config_and_rules_are_sound_and_alerts_fire_when_they_should(self):
        self.clean(checks.prometheus_problems(checks.DEPLOY))
        self.clean(checks.alert_problems(checks.DEPLOY))

    def test_an_alert_that_never_fires_is_found(self):
        tree = self.planted(self.RULES, "aquifer_release_lag_seconds > 900", "aquifer_release_lag_seconds > 90000")
        self.found(checks.prometheus_problems(tree), "AquiferReleaseLag")

    def test_an_alert_that_fires_too_easily_is_found(self):
        tree = self.planted(self.RULES, "aquifer_ready == 0 and aquifer_draining == 0", "aquifer_ready == 0")
        self.found(checks.prometheus_problems(tree), "AquiferNotReady")

    def test_a_query_that_is_none_is_found(self):
        tree = self.planted(self.RULES, 'up{job="aquifer"} == 0', 'up{job="aquifer" == 0')
        self.found(checks.prometheus_problems(tree), "promtool")

    def test_a_field_that_is_none_is_found(self):
        tree = self.planted("prometheus/scrape.yml", "refresh_interval", "refresh_every")
        self.found(checks.prometheus_problems(tree), "refresh_every")
        tree = self.planted(
            "prometheus/scrape.yml", "- role: pod\n        selectors", "- roles: pod\n        selectors"
        )
        self.found(checks.prometheus_problems(tree), "roles")

    def test_an_alert_without_words_or_test_is_found(self):
        tree = self.planted(self.RULES, "runbook: docs/operate.md#aquiferstorefull", "runbook: docs/operate.md#full")
        self.found(checks.alert_problems(tree), "AquiferStoreFull: runbook")
        tree = self.planted(self.RULES, "alert: AquiferDrainStuck", "alert: AquiferDrainSlow")
        self.found(checks.alert_problems(tree), "AquiferDrainSlow: never shown to fire")

    def test_the_contract_is_kept(self):
        """Those that docs and runbooks speak of."""
        names = (
            "AgentDown NotReady ReleaseLag HydrationStalled CorruptChunks ReleaseRejected CheckFailed NoPeers"
            " HookBacklog StoreFull ChannelProblem DrainStuck"
        )
        self.assertEqual(set(checks.alerts(checks.DEPLOY)), {f"Aquifer{name}" for name in names.split()})


@skip(lacking("yaml"))
class Metrics(Deploy):
    def test_the_agent_has_all_that_are_asked_for(self):
        self.assertGreater(len(checks.metrics()), 40)
        self.clean(checks.metric_problems(checks.DEPLOY))

    def test_one_that_it_has_not_is_found(self):
        tree = self.planted("grafana/aquifer.json", "aquifer_leased_bytes{", "aquifer_lent_bytes{")
        self.found(checks.metric_problems(tree), "Under lease: no metric is called aquifer_lent_bytes")
        tree = self.planted("prometheus/rules.yml", "aquifer_peers{state=", "aquifer_peers{stat=")
        self.found(checks.metric_problems(tree), "AquiferNoPeers: aquifer_peers has no label stat")
        tree = self.planted("grafana/aquifer.json", "sum by (transport)", "sum by (transports)")
        self.found(checks.metric_problems(tree), "transports")

    def test_one_that_became_a_histogram_is_found(self):
        tree = self.planted("prometheus/rules.yml", "aquifer_phase_seconds_bucket", "aquifer_phase_seconds")
        self.found(checks.metric_problems(tree), "aquifer_phase_seconds")


@skip(checks.missing("promtool") or lacking("yaml", "jsonschema", "grafana_foundation_sdk"))
class Grafana(Deploy):
    BOARD = "grafana/aquifer.json"

    def test_grafana_knows_all_of_it(self):
        self.clean(checks.grafana_problems(checks.DEPLOY))
        self.clean(checks.promql_problems(checks.DEPLOY))

    def test_a_field_that_grafana_does_not_know_is_found(self):
        tree = self.planted(self.BOARD, '"displayMode": "list"', '"displayMod": "list"')
        self.found(checks.grafana_problems(tree), "displayMod: Grafana's types do not know it")

    def test_a_panel_without_unit_or_over_another_is_found(self):
        tree = self.planted(self.BOARD, '"unit": "Bps"', '"unit": "bytes/s"')
        self.found(checks.grafana_problems(tree), "panels")
        tree = self.planted(self.BOARD, '"x": 4,', '"x": 3,')
        self.found(checks.grafana_problems(tree), "lies over")

    def test_a_data_source_of_somebody_else_is_found(self):
        tree = self.planted(self.BOARD, '"uid": "${datasource}"', '"uid": "PBFA97CFB590B2093"')
        self.assertNotEqual(checks.grafana_problems(tree), [])

    def test_a_query_that_is_none_is_found(self):
        tree = self.planted(self.BOARD, "sum by (transport) (", "sum by (transport) ((")
        self.assertNotEqual(checks.promql_problems(tree), [])


@skip(checks.old_kustomize() or lacking("yaml", "jsonschema", "kubernetes_validate"))
class Kubernetes(Deploy):
    DAEMONSET, SIDECAR = "kubernetes/base/daemonset.yaml", "kubernetes/overlays/sidecar/deployment.yaml"

    def test_every_overlay_is_sound(self):
        for overlay in checks.OVERLAYS:
            with self.subTest(overlay):
                self.clean(checks.kubernetes_problems(checks.DEPLOY, overlay))

    def test_overlays_are_what_they_say(self):
        def of(overlay):
            return {(o["kind"], o["metadata"]["name"]): o for o in checks.rendered(checks.DEPLOY, overlay)}

        agent = of("base")[("DaemonSet", "aquifer")]["spec"]["template"]["spec"]
        self.assertNotIn("hostNetwork", agent)
        self.assertTrue(agent["securityContext"]["runAsNonRoot"])
        self.assertTrue(of("base")[("Service", "aquifer-mesh")]["spec"]["publishNotReadyAddresses"])
        rdma = of("overlays/rdma")[("DaemonSet", "aquifer")]["spec"]["template"]["spec"]
        self.assertTrue(rdma["hostNetwork"])
        capabilities = {c["name"]: c["securityContext"]["capabilities"].get("add") for c in rdma["containers"]}
        self.assertEqual(capabilities, {"agent": ["IPC_LOCK"]})
        settings = {e["name"]: e.get("value") for e in rdma["containers"][0]["env"]}
        self.assertEqual((settings["AQUIFER_RDMA"], settings["AQUIFER_PEER"]), ("auto", "aquifer-mesh:7401"))
        sidecar = of("overlays/sidecar")
        self.assertNotIn(("DaemonSet", "aquifer"), sidecar)
        (agent,) = sidecar[("Deployment", "engine")]["spec"]["template"]["spec"]["initContainers"]
        self.assertEqual(agent["restartPolicy"], "Always")
        self.assertIn(("ScaledObject", "engine"), of("overlays/keda"))
        self.assertIn(("HorizontalPodAutoscaler", "engine"), of("overlays/hpa"))

    def found_in(self, overlay, name, old, new, pattern):
        self.found(checks.kubernetes_problems(self.planted(name, old, new), overlay), pattern)

    def test_mistakes_are_found(self):
        for old, new, pattern in (
            ("terminationGracePeriodSeconds", "terminationGracePeriod", "terminationGracePeriod"),
            ("maxUnavailable: 1", "maxUnavailable: {}", "maxUnavailable|not"),
            ("terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds: 25", "ended before a drain"),
            ("port: aquifer-http}", "port: http}", "startupProbe asks port http"),
            ("{name: state, mountPath", "{name: stat, mountPath", "mounts stat"),
            ("secretName: aquifer-mesh", "secretName: aquifer-key", "no Secret aquifer-key"),
            ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "write to its root"),
            ("add: [CHOWN, DAC_READ_SEARCH]", "add: [SYS_ADMIN]", "adds the capability SYS_ADMIN"),
            ("value: host=$(NODE_NAME)", "value: host=$(NODE)", "uses NODE, which is not set"),
            ("image: aquifer\n          args", "image: aquifers\n          args", "not the placeholder"),
        ):
            with self.subTest(new):
                self.found_in("base", self.DAEMONSET, old, new, pattern)

    def test_a_service_that_selects_nobody_is_found(self):
        self.found_in(
            "base",
            "kubernetes/base/service.yaml",
            "    app.kubernetes.io/name: aquifer\n  ports",
            "    app: aquifer\n  ports",
            "selects no pod",
        )

    def test_a_capability_that_would_not_be_had_is_found(self):
        self.found_in(
            "overlays/rdma",
            "kubernetes/overlays/rdma/daemonset.yaml",
            "runAsUser: 0\n",
            "runAsUser: 10001\n",
            "who does not get them",
        )

    def test_a_sidecar_that_is_none_is_found(self):
        self.found_in(
            "overlays/sidecar", self.SIDECAR, "restartPolicy: Always", "restartPolicy: Sometimes", "neither a sidecar"
        )

    def test_what_keda_would_refuse_is_found(self):
        scaled = "kubernetes/overlays/keda/scaledobject.yaml"
        for old, new, pattern in (
            ("valueLocation: ready_replicas", "location: ready_replicas", "valueLocation|location"),
            ("maxReplicaCount", "maxReplicas", "maxReplicas"),
            ("name: hydrating\n", "name: fetching\n", "hydrating, which is no trigger"),
            ("kind: Deployment\n    name: engine", "kind: Deployment\n    name: engines", "scales engines"),
        ):
            with self.subTest(new):
                self.found_in("overlays/keda", scaled, old, new, pattern)


@skip(None if checks.hadolint() else "hadolint is not here (tests/deploy/requirements.txt)")
class Container(Deploy):
    FILE = "container/Containerfile"

    def test_it_is_sound(self):
        self.clean(checks.container_file_problems(checks.DEPLOY))

    def test_mistakes_are_found(self):
        for old, new, pattern in (
            ("USER 10001:10001", "USER root", "not root"),
            ("COPY --from=build", "COPY --form=build", "unexpected|form"),
            ("FROM debian:${DEBIAN}-slim", "FROM debian", "DL3006"),
            ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "STOPSIGNAL"),
        ):
            with self.subTest(new):
                self.found(checks.container_file_problems(self.planted(self.FILE, old, new)), pattern)


if __name__ == "__main__":
    unittest.main()

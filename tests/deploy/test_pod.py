"""The agent's container as the manifests have it: its environment, user, files and modes, with the real program in
namespaces of its own. What it cannot show is the cluster around it: scheduling, networks, device plug-ins.

    AQUIFER_BIN=target/release/aquifer python3 -m unittest discover -v -s tests/deploy -t tests/deploy
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest

import checks

#: In namespaces of its own: the volumes as the kubelet makes them (root's, with the pod's group), the agent as the
#: pod's user with nothing but the pod's environment, the probe until it passes, preStop, and the agent's end.
POD = r"""
set -eu
place=$1 uid=$2 gid=$3 prestop=$4
ip link set lo up
for over in /run /etc /var/lib; do mount -t tmpfs -o mode=755 tmpfs $over; done
for volume in /run/aquifer /var/lib/aquifer; do mkdir $volume; chown 0:$gid $volume; chmod 2777 $volume; done
cp -r "$place"/etc/. /etc; chown -R 0:$gid /etc/aquifer*; chmod 440 /etc/aquifer-*/*
pod() { setpriv --reuid $uid --regid $gid --clear-groups --no-new-privs --bounding-set=-all env -i "${ENV[@]}" "$@"; }
mapfile -t ENV < "$place/env"
pod "$place/aquifer" agent 2> "$place/log" & agent=$!
for _ in $(seq 300); do
  ! "$PYTHON" "$place/probe.py" "$PROBE" || break
  kill -0 $agent || { cat "$place/log"; exit 1; }
  sleep 0.1
done
"$PYTHON" "$place/probe.py" "$PROBE"
pod $prestop
wait $agent; echo "the agent ended with $?"
"""

PROBE = "import sys, urllib.request\nprint(urllib.request.urlopen('http://127.0.0.1:7404' + sys.argv[1]).status)\n"


def lacking():
    if not os.path.exists(checks.PROGRAM):
        return f"{checks.PROGRAM} is not built"
    if os.geteuid() != 0:
        return "only root makes these namespaces"
    return checks.old_kustomize() or checks.missing("unshare", "setpriv", "ip")


WHY_NOT = lacking()


@unittest.skipIf(WHY_NOT, WHY_NOT or "")
class Pod(unittest.TestCase):
    def begin(self, overlay, kind, name, change=lambda env: None):
        """What the agent's container of this workload said, run from begin to end."""
        objects = {(o["kind"], o["metadata"]["name"]): o for o in checks.rendered(checks.DEPLOY, overlay)}
        pod = objects[(kind, name)]["spec"]["template"]["spec"]
        (agent,) = [c for c in checks.containers(pod) if c["name"] == "agent"]
        self.assertEqual(agent["args"], ["agent"])
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        place = temporary.name
        os.chmod(place, 0o755)
        self.files(place, objects)
        env = {"NODE_NAME": "node-1", "POD_NAME": "engine-7"}
        for variable in agent["env"]:
            value = env.get(variable["name"], variable.get("value", ""))
            env[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda used: env[used[1]], value)
        change(env)
        with open(os.path.join(place, "env"), "w") as out:
            out.writelines(f"{name}={value}\n" for name, value in env.items())
        security = pod["securityContext"]
        prestop = agent["lifecycle"]["preStop"]["exec"]["command"]
        prestop = " ".join(prestop).replace("/usr/bin/aquifer", os.path.join(place, "aquifer"))
        users = [str(security["runAsUser"]), str(security["runAsGroup"])]
        done = subprocess.run(
            ["unshare", "--mount", "--net", "bash", "-c", POD, "pod", place, *users, prestop],
            env={**os.environ, "PYTHON": shutil.which("python3"), "PROBE": agent["startupProbe"]["httpGet"]["path"]},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        try:
            with open(os.path.join(place, "log")) as log:
                return done, log.read()
        except FileNotFoundError:
            self.fail(f"the agent was not begun: {done.stderr}")

    def files(self, place, objects):
        """The program, and what volumes of ConfigMaps and Secrets hold, with keys that are some."""
        shutil.copy(checks.PROGRAM, os.path.join(place, "aquifer"))
        os.chmod(os.path.join(place, "aquifer"), 0o755)
        with open(os.path.join(place, "probe.py"), "w") as out:
            out.write(PROBE)
        for directory in ("aquifer", "aquifer-mesh", "aquifer-http"):
            os.makedirs(os.path.join(place, "etc", directory))
        keygen = [checks.PROGRAM, "keygen"]
        mesh = os.path.join(place, "etc", "aquifer-mesh", "mesh.key")
        subprocess.run([*keygen, "mesh", "--out", mesh], check=True, stdout=subprocess.DEVNULL)
        publisher = [*keygen, "publisher", "--out", os.path.join(place, "publisher.key"), "--json"]
        public = json.loads(subprocess.run(publisher, check=True, capture_output=True, text=True).stdout)["public"]
        with open(os.path.join(place, "etc", "aquifer-http", "http.token"), "w") as out:
            out.write("a-token-for-a-test-of-no-use-elsewhere\n")
        (config,) = [o for (kind, _), o in objects.items() if kind == "ConfigMap"]
        with open(os.path.join(place, "etc", "aquifer", "aquifer.toml"), "w") as out:
            out.write(config["data"]["aquifer.toml"].replace("0" * 64, public))

    def test_it_starts_passes_its_probe_and_drains(self):
        for overlay, kind, name in (("base", "DaemonSet", "aquifer"), ("overlays/sidecar", "Deployment", "engine")):
            with self.subTest(overlay):
                done, log = self.begin(overlay, kind, name)
                self.assertIn("the agent ended with 0", done.stdout, done.stdout + done.stderr + log)
                self.assertIn("http://0.0.0.0:7404", log)
                self.assertNotIn(" ERROR ", log)

    def test_a_mount_that_is_not_where_the_environment_says_is_found(self):
        """This test's own test."""
        done, log = self.begin(
            "base", "DaemonSet", "aquifer", lambda env: env.update(AQUIFER_MESH_KEY="/etc/aquifer/mesh.key")
        )
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("cannot read the mesh key", log)


if __name__ == "__main__":
    unittest.main()

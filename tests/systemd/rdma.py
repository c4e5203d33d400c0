"""rdma.py PROGRAM: on a machine with RDMA devices (tests/rdma-vm), the unit as it is has none of them, and with the
drop-in for RDMA and GPUs the agent reads and serves by them, as confined as before otherwise."""

import json
import os
import subprocess
import sys
import tempfile

import guest

DROP_IN = "/etc/systemd/system/aquifer.service.d/rdma-gpu.conf"
SOCKET = "/run/aquifer/agent.sock"


def ports(machine):
    """The RDMA ports that the agent uses once it is up."""
    if machine.run("systemctl", "restart", "aquifer").returncode:
        raise SystemExit(machine.journal("aquifer"))
    status = machine.run("aquifer", "status", "--json", "--socket", SOCKET, check=True)
    said = machine.journal("aquifer")
    if wrong := [line for line in said.splitlines() if " ERROR " in line]:
        raise SystemExit("\n".join(wrong))
    return json.loads(status.stdout)["rdma_ports"]


def main(program):
    if why_not := guest.missing():
        raise SystemExit(why_not)
    example = os.path.join(guest.UNITS, "aquifer.service.d", "rdma-gpu.conf.example")
    with tempfile.TemporaryDirectory() as place:
        mesh = os.path.join(place, "mesh.key")
        subprocess.run([program, "keygen", "mesh", "--out", mesh], check=True, stdout=subprocess.DEVNULL)
        publisher = [program, "keygen", "publisher", "--out", os.path.join(place, "publisher.key"), "--json"]
        said = subprocess.run(publisher, check=True, capture_output=True, text=True).stdout
        public = json.loads(said)["public"]
        config = f'channel = ["systemd/rdma"]\ntrust = ["{public}"]\nmdns = false\n'
        machine = guest.Guest(
            {
                "/usr/bin/aquifer": (program, 0o755),
                "/etc/systemd/system/aquifer.service": (os.path.join(guest.UNITS, "aquifer.service"), 0o644),
                DROP_IN: (example, 0o644),
                "/usr/lib/sysusers.d/aquifer.conf": (os.path.join(guest.UNITS, "aquifer.sysusers.conf"), 0o644),
                "/etc/aquifer/mesh.key": (mesh, 0o600),
                "/etc/aquifer/aquifer.toml": (config.encode(), 0o644),
            },
            own_network=False,
        )
    try:
        with_it = ports(machine)
        pid = machine.properties("aquifer", "MainPID")["MainPID"]
        limits = machine.run("grep", "Max locked memory", f"/proc/{pid}/limits", check=True).stdout
        machine.run("rm", DROP_IN, check=True)
        machine.run("systemctl", "daemon-reload", check=True)
        without = ports(machine)
    finally:
        machine.close()
    print(f"with the drop-in: {with_it}; without: {without}; {' '.join(limits.split())}")
    if not with_it or without or "unlimited" not in limits:
        raise SystemExit("the drop-in is to make the difference, and memory is to be locked without a limit")


if __name__ == "__main__":
    main(sys.argv[1])

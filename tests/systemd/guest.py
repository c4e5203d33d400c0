"""A real systemd, as process 1 of namespaces of its own, with the units of deploy/systemd installed.

Its root is this machine's, read-only underneath and a tmpfs above; network, processes, host name, IPC and
control groups are its own, so nothing that it does is seen outside, and its agent may have the usual ports.
No container manager, no virtual machine: mount(2), pivot_root(2) and util-linux. Needs root, overlayfs and
cgroup v2 (which may be mounted beside v1). What it makes, it removes.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
UNITS = os.path.join(ROOT, "deploy", "systemd")
SYSTEMD = "/lib/systemd/systemd"
#: Seconds until the guest must have booted, and a command in it must have ended.
BOOT_S, COMMAND_S = 120, 120
POLL_S = 0.05

#: In a mount namespace: a control group of the guest's own, then the other namespaces.
OUTER = r"""
set -e
mount --make-rprivate /
mkdir "$1/cgroup"; mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$2"; echo $$ > "$1/cgroup/$2/cgroup.procs"
exec unshare --fork --kill-child --pid --mount --uts --ipc --cgroup ${5-} bash -c "$3" inner "$1" "$4"
"""

INNER = r"""
set -e
W=$1 R=$1/over/root
mount --make-rprivate /
mkdir "$W/over"; mount -t tmpfs -o mode=755 tmpfs "$W/over"; mkdir "$W"/over/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$W/over/upper,workdir=$W/over/work" "$R"
cd "$R"
mount -t proc proc proc; mount -t sysfs -o ro sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run; mount -t tmpfs -o mode=1777 tmpfs tmp; mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
mkdir dev/shm dev/pts; mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts; ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
[ ! -d /dev/infiniband ] || cp -a /dev/infiniband dev/
ip link set lo up
hostname aquifer-guest
# Nothing of this machine's own services: the agent's unit, and what every unit stands on.
rm -rf etc/systemd/system var/lib/aquifer etc/aquifer; mkdir -p etc/systemd/system etc/aquifer usr/lib/sysusers.d
printf '[Unit]\nRequires=basic.target\nAfter=basic.target\nWants=aquifer.service\n' > etc/systemd/system/guest.target
cp -r "$W"/install/. .
systemd-sysusers --root="$R" aquifer.conf
mkdir -p outside; mount --bind "$W/shared" outside
mkdir -p old; pivot_root . old; umount -l old
# As systemd finds it outside of containers: units get credentials by mounts that are seen everywhere.
mount --make-rshared /
exec env -i container=aquifer-guest PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  "$2" --unit=guest.target --log-target=journal --show-status=no
"""


def end_with_parent():
    """Should this program be killed, so is the guest (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def missing():
    """Why this machine cannot have a guest, or None."""
    if os.geteuid() != 0:
        return "only root makes these namespaces"
    for program in ("unshare", "nsenter", "ip", SYSTEMD, "systemd-sysusers"):
        if shutil.which(program) is None:
            return f"{program} is not here"
    with open("/proc/filesystems") as known:
        names = known.read().split()
    lacking = [name for name in ("overlay", "cgroup2") if name not in names]
    if lacking:
        return f"the kernel has no {' and no '.join(lacking)}"
    return None


class Guest:
    """`files` are copied in before it boots: path inside -> (path here or text as bytes, mode). RDMA devices work in
    their own network alone, so who wants them has the guest share this machine's."""

    def __init__(self, files, own_network=True):
        self.directory = tempfile.mkdtemp(prefix="aquifer-systemd.")
        self.shared = os.path.join(self.directory, "shared")
        self.group = os.path.basename(self.directory)
        install = os.path.join(self.directory, "install")
        for path in (self.shared, install):
            os.mkdir(path)
        for inside, (content, mode) in files.items():
            place = os.path.join(install, inside.lstrip("/"))
            os.makedirs(os.path.dirname(place), exist_ok=True)
            if isinstance(content, bytes):
                with open(place, "wb") as out:
                    out.write(content)
            else:
                shutil.copyfile(content, place)
            os.chmod(place, mode)
        with open(os.path.join(self.directory, "errors"), "wb") as errors:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "bash", "-c", OUTER, "outer", self.directory, self.group, INNER, SYSTEMD]
                + (["--net"] if own_network else []),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                preexec_fn=end_with_parent,
            )
        try:
            self._boot()
        except BaseException:
            self.close()
            raise

    def _boot(self):
        limit = time.monotonic() + BOOT_S
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                raise RuntimeError(f"the guest ended: {self.errors()}")
            self.init = self._init()
            # It answers as soon as it can be asked, and then waits for the end of the boot.
            if self.init and self.run("systemctl", "is-system-running", "--wait").stdout.strip() in (
                "running",
                "degraded",
            ):
                return
            time.sleep(POLL_S)
        raise RuntimeError(f"the guest did not boot in {BOOT_S} s: {self.errors()}")

    def _init(self):
        """The guest's process 1, as numbered here: the only child of unshare, once that has become systemd."""
        try:
            with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as children:
                child = children.read().split()[0]
            with open(f"/proc/{child}/comm") as name:
                return int(child) if name.read().strip() == "systemd" else None
        except (OSError, IndexError):
            return None

    def command(self, *command):
        return ["nsenter", "--target", str(self.init), "--all", "--", *command]

    def run(self, *command, check=False, timeout=COMMAND_S):
        done = subprocess.run(
            self.command(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(self, *command, **streams):
        return subprocess.Popen(self.command(*command), text=True, **streams)

    def properties(self, unit, *names):
        shown = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names), check=True).stdout
        return dict(line.split("=", 1) for line in shown.splitlines())

    def journal(self, unit):
        """What the unit said, and systemd of it."""
        self.run("journalctl", "--sync", check=True)
        return self.run("journalctl", "--unit", unit, "--no-pager", "--output=cat", check=True).stdout

    def errors(self):
        with open(os.path.join(self.directory, "errors"), errors="replace") as text:
            return text.read()[-2000:]

    def close(self):
        """Ends all of it: process 1 of a pid namespace takes the rest with it."""
        self.process.kill()
        self.process.wait()
        remove = (
            'mount -t cgroup2 cgroup2 "$1" && cd "$1/$2" && echo 1 > cgroup.kill; '
            'for _ in $(seq 100); do find "$1/$2" -depth -type d -exec rmdir {} + 2>/dev/null && break; sleep 0.1; done'
        )
        place = os.path.join(self.directory, "cgroup")
        os.makedirs(place, exist_ok=True)
        subprocess.run(
            ["unshare", "--mount", "bash", "-c", remove, "remove", place, self.group],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        shutil.rmtree(self.directory, ignore_errors=True)

"""Several hosts on one machine: namespaces on a bridge, each with an sshd and files of its own.

Needs root and the Debian packages openssh-server, rsync and iproute2.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NETWORK, USER, START_S = "10.77.0", "ubuntu", 120.0
BRIDGE, GATEWAY = "opdbr", f"{NETWORK}.254"

# The first process of a host. USER is a second name of root: one home serves Ray, sshd and ssh.
INSIDE = f"""
set -eu
hostname "$1"; home=$2; kept=$3; hidden=$4; shift 4
mount --make-rprivate /
mount --bind "$kept/passwd" /etc/passwd
mount --bind "$kept/hosts" /etc/hosts
# Without this each look-up of a name waits for a server that is not there.
mount --bind /dev/null "$(readlink -f /etc/resolv.conf)"
mount -t tmpfs tmpfs /mnt
for path in "$@"; do mkdir -p "/mnt$path"; mount --rbind "$path" "/mnt$path"; done
mkdir -p /mnt/own-home; mount --bind "$home" /mnt/own-home
mount -t tmpfs -o mode=755 tmpfs /home; mkdir /home/{USER}; mount --bind /mnt/own-home /home/{USER}
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /tmp
for path in /root "$hidden"; do [ ! -d "$path" ] || mount -t tmpfs tmpfs "$path"; done
for path in "$@"; do mkdir -p "$path"; mount --rbind "/mnt$path" "$path"; done
options="-o PidFile=none -o UsePAM=no -o StrictModes=no -o PermitRootLogin=yes"
exec /usr/sbin/sshd -D -e -h /home/{USER}/.ssh/host_key $options
"""


class HostsUnavailable(Exception):
    """This machine has no namespaces for us, or lacks a program."""


@dataclass
class Host:
    """One of them; all that runs on it ends with `process`."""

    address: str
    name: str
    process: subprocess.Popen = field(repr=False)

    def command(self, *command: str, folder: str = "") -> list[str]:
        """What runs `command` on it, in a folder of its user's home."""
        home = f"/home/{USER}"
        path = f"{home}/.venvs/video-opd/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return [
            *self._enter(),
            "env",
            "-i",
            "-C",
            f"{home}/{folder}",
            f"HOME={home}",
            f"PATH={path}",
            "OMP_NUM_THREADS=1",
            *command,
        ]

    def set_link(self, up: bool) -> None:
        """Takes its cable out, or puts it in again."""
        _ip(f"link set v{self.name} {'up' if up else 'down'}")

    def processes(self) -> list[str]:
        """Whole command lines of all that runs on it, but its sshd and what asks. `ps` cuts to $COLUMNS."""
        inside = subprocess.run(
            [*self._enter(), "ps", "-wweo", "args="], capture_output=True, text=True, check=True
        )
        return [
            line
            for line in inside.stdout.splitlines()
            if not line.startswith(("ps ", "sshd: ", "/usr/sbin/sshd "))
        ]

    def _enter(self) -> list[str]:
        (first,) = psutil.Process(self.process.pid).children()
        return ["nsenter", f"--target={first.pid}", "--mount", "--pid", "--uts", "--ipc", "--net"]


@contextmanager
def hosts(count: int, folder: Path, shared: Sequence[Path], hidden: Path) -> Iterator[list[Host]]:
    """`count` hosts that see nothing of /home, /root, /tmp, /dev/shm and `hidden` but the folders `shared`.

    Raises HostsUnavailable.
    """
    _check_possible()
    key = folder / "id_ed25519"
    _run(f"ssh-keygen -q -t ed25519 -N '' -f {key}")
    names = {f"opdhost{i}": f"{NETWORK}.{10 + i}" for i in range(count)}
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in names.items())
    )
    passwd = Path("/etc/passwd").read_text()
    (folder / "passwd").write_text(f"{USER}:x:0:0::/home/{USER}:/bin/bash\n{passwd}")
    Path("/run/sshd").mkdir(exist_ok=True)
    with ExitStack() as undo:
        _ip(f"link add {BRIDGE} type bridge")
        undo.callback(_ip, f"link del {BRIDGE}")
        _ip(f"addr add {GATEWAY}/24 dev {BRIDGE}")
        _ip(f"link set {BRIDGE} up")
        made = []
        for name, address in names.items():
            home = folder / name
            (home / ".ssh").mkdir(parents=True)
            shutil.copy(key, home / ".ssh")
            (home / ".ssh" / "config").write_text("StrictHostKeyChecking accept-new\n")
            shutil.copy(f"{key}.pub", home / ".ssh" / "authorized_keys")
            _run(f"ssh-keygen -q -t ed25519 -N '' -f {home}/.ssh/host_key")
            _ip(f"netns add {name}")
            undo.callback(_ip, f"netns del {name}")
            _ip(f"link add v{name} type veth peer name eth0 netns {name}")
            undo.callback(
                _ip, f"link del v{name}"
            )  # else it stays until the last process that sees it is gone
            _ip(f"link set v{name} master {BRIDGE} up")
            for command in (
                f"addr add {address}/24 dev eth0",
                "link set eth0 up",
                "link set lo up",
                f"route add default via {GATEWAY}",
            ):
                _ip(f"-n {name} {command}")
            unshare = "unshare --mount --pid --uts --ipc --fork --kill-child --mount-proc"
            command = [
                *shlex.split(f"ip netns exec {name} {unshare} bash -c"),
                INSIDE,
                "_",
                name,
                str(home),
                str(folder),
                str(hidden),
                *map(str, shared),
            ]
            with (folder / f"{name}.log").open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            undo.callback(_end, process)
            made.append(Host(address, name, process))
        for host in made:
            _wait_for_ssh(host, folder / f"{host.name}.log")
        yield made


def _check_possible() -> None:
    missing = [
        p
        for p in ("ip", "sshd", "ssh", "rsync", "unshare", "nsenter")
        if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    if missing:
        raise HostsUnavailable(
            f"not installed: {', '.join(missing)} (Debian: openssh-server, rsync, iproute2)"
        )
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"],
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        raise HostsUnavailable(f"namespaces are not permitted: {probe.stderr.strip()}")


def _wait_for_ssh(host: Host, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return socket.create_connection((host.address, 22), 1).close()
        except OSError:
            if host.process.poll() is not None or time.monotonic() > deadline:
                raise HostsUnavailable(f"{host.name} did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.1)


def _end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(START_S)


def _ip(command: str) -> None:
    _run(f"ip {command}")


def _run(command: str) -> None:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")

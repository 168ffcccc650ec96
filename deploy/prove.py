#!/usr/bin/env python3
"""Build a Containerfile's image without a container engine, in a fresh Debian root, and try its service.

    sudo deploy/prove.py [deploy/Containerfile] --work DIR

Needs root, Linux, debootstrap, iproute2 and util-linux. What stands for the base image is Debian's smallest
system of the same release, made by debootstrap. The steps are read from the Containerfile and run with chroot
in namespaces of their own. Then the service runs as the image's user, without capabilities, on a read-only
root and without a network, and `prove_inside.py` runs the image's health check and locates a photo. With
--unit, a fresh system is booted besides, in which systemd starts, watches and stops the service.

`--mirror`, `--env NAME[=VALUE]` and `--bind HOST:INSIDE` hand a site's own package mirror to the steps, for
example the variable PIP_CERT and the file that it names.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from containerfile import Image, environment, parse

HERE = Path(__file__).resolve().parent
CONTEXT = HERE.parent
SUITES = {"debian:12": "bookworm", "debian:13": "trixie"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START = time.monotonic()


class Roots:
    """The systems that stand for images, in the folder `work`, and how they are entered."""

    def __init__(self, work: Path, mirror: str | None, binds: Sequence[str]) -> None:
        self.work = work
        self._mirror = mirror
        self._binds = ("/etc/resolv.conf:/etc/resolv.conf", *binds)

    def fresh(self, base: str, name: str) -> Path:
        """Return a fresh system of a base image's release."""
        suite = SUITES[base.partition(".")[0].partition("-")[0]]
        made, root = self.work / f"base-{suite}", self.work / name
        if not (made / ".complete").exists():
            say(f"debootstrap {suite}, for {base}")
            shutil.rmtree(made, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", suite, str(made)]
            command += [self._mirror] if self._mirror else []
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (made / ".complete").touch()
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", made, root], check=True)
        return root

    def run(self, root: Path, variables: dict[str, str], command: Sequence[str]) -> None:
        """Run a step of the build, with the site's files where they are asked for; ends all when it fails."""
        mounts = []
        for bind in self._binds:
            host, _, target = bind.partition(":")
            place = under(root, target)
            place.parent.mkdir(parents=True, exist_ok=True)
            if Path(host).is_dir():
                place.mkdir(exist_ok=True)
            else:
                place.touch()
            mounts.append(f"mount --bind -o ro {shlex.quote(host)} {place}")
        done = self._enter(root, variables, command, mounts, ())
        if done.returncode:
            sys.exit(f"{done.stdout}prove.py: the step failed (exit status {done.returncode})")

    def run_closed(
        self, root: Path, variables: dict[str, str], command: Sequence[str], mounts: Sequence[str]
    ) -> str:
        """Run a command on a read-only root that reaches no network; returns what it wrote to stdout."""
        closing = ["ip link set lo up", f"mount --bind {root} {root}", *mounts]
        closing.append(f"mount -o remount,ro,bind {root}")
        done = self._enter(root, variables, command, closing, ("--net",))
        if done.returncode:
            sys.exit(f"prove.py: the trial failed (exit status {done.returncode})")
        return done.stdout

    def _enter(
        self,
        root: Path,
        variables: dict[str, str],
        command: Sequence[str],
        mounts: Sequence[str],
        namespaces: Sequence[str],
    ) -> subprocess.CompletedProcess[str]:
        steps = ["set -e", *mounts, f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        given = [f"{name}={value}" for name, value in variables.items()]
        steps.append("exec " + shlex.join(["chroot", str(root), "env", "-i", *given, *command]))
        line = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", *namespaces]
        return subprocess.run([*line, "sh", "-c", "\n".join(steps)], stdout=subprocess.PIPE, text=True)


def build(image: Image, roots: Roots, given: dict[str, str]) -> tuple[Path, dict[str, str]]:
    """Build all stages; returns the last one's root and variables. `given` are for the steps alone."""
    by_name: dict[str, Path] = {}
    root, variables = roots.work, dict[str, str]()
    for number, stage in enumerate(image.stages):
        root, variables, folder = roots.fresh(stage.base, f"stage{number}"), {"PATH": PATH}, "/"
        by_name[stage.name] = root
        for instruction, rest in stage.steps:
            say(f"[{stage.name or 'image'}] {instruction} {rest}")
            if instruction == "ENV":
                variables |= environment(rest)
            elif instruction == "WORKDIR":
                folder = rest
                under(root, folder).mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                copy(root, folder, shlex.split(rest), by_name)
            else:
                roots.run(root, given | variables, ["sh", "-c", f"cd {folder} && {rest}"])
    return root, variables


def copy(root: Path, folder: str, words: list[str], by_name: dict[str, Path]) -> None:
    """Copy as COPY does: the content of folders, and files."""
    source_root = CONTEXT
    if words[0].startswith("--from="):
        source_root = by_name[words.pop(0).removeprefix("--from=")]
    ignored = shutil.ignore_patterns("__pycache__") if source_root == CONTEXT else None
    *sources, target = words
    to = under(root, os.path.join(folder, target))
    for source in sources:
        path = under(source_root, source)
        if path.is_dir():
            shutil.copytree(path, to, symlinks=True, dirs_exist_ok=True, ignore=ignored)
        else:
            (to if target.endswith("/") else to.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)


def try_service(image: Image, roots: Roots, root: Path, variables: dict[str, str], photo: Path) -> str:
    """Start the service as the image says; returns what `prove_inside.py` found, as JSON."""
    users = [line.split(":") for line in (root / "etc/passwd").read_text().splitlines()]
    uid, gid = next(user[2:4] for user in users if user[2] == image.user)
    shared = roots.work / "shared"
    shutil.rmtree(shared, ignore_errors=True)
    (shared / "keys").mkdir(parents=True)
    os.chown(shared / "keys", int(uid), int(gid))
    shutil.copy(photo, shared / "photo.jpg")
    shutil.copy(HERE / "prove_inside.py", shared)
    plan = {"entrypoint": image.entrypoint, "command": image.command, "healthcheck": image.healthcheck}
    (shared / "plan.json").write_text(json.dumps(plan))
    for mount_point in ("mnt", "etc/geoengine"):
        (root / mount_point).mkdir(exist_ok=True)
    mounts = [
        f"mount --bind -o ro {shared} {root}/mnt",
        f"mount --bind {shared}/keys {root}/etc/geoengine",
        f"mount -t tmpfs tmpfs {root}/tmp",
        f"mount -t tmpfs -o uid={uid},mode=0700 tmpfs {root}/var/cache/geoengine",
    ]
    command = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
    command += ["--bounding-set=-all", "--inh-caps=-all", "python3", "/mnt/prove_inside.py"]
    return roots.run_closed(root, variables, command, mounts)


def try_unit(image: Image, roots: Roots, built: Path, given: dict[str, str], photo: Path) -> str:
    """Boot a fresh system with systemd and the unit; returns what `prove_unit.py` found, as JSON.

    What runs is the virtual environment of the image.
    """
    root, trial = roots.fresh(image.stages[-1].base, "booted"), "/opt/trial"
    packages = "systemd systemd-sysv dbus python3"
    say(f"[unit] {packages}, deploy/geoengine.service")
    install = f"apt-get update && apt-get install --yes --no-install-recommends {packages}"
    roots.run(root, given | {"PATH": PATH}, ["sh", "-c", install])
    shutil.copytree(built / "opt/geoengine", root / "opt/geoengine", symlinks=True)
    under(root, trial).mkdir()
    shutil.copy(photo, under(root, f"{trial}/photo.jpg"))
    shutil.copy(HERE / "prove_unit.py", under(root, trial))
    make_key = "umask 077 && mkdir /etc/geoengine && /opt/geoengine/bin/geoengine serve"
    make_key += f" --keys /etc/geoengine/keys --new-key prove > {trial}/key"
    roots.run(root, {"PATH": PATH}, ["sh", "-c", make_key])
    units = root / "etc/systemd/system"
    shutil.copy(HERE / "geoengine.service", units)
    (units / "trial.service").write_text(f"[Service]\nExecStart=/usr/bin/python3 {trial}/prove_unit.py\n")
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/trial.service").symlink_to("../trial.service")
    boot = ["systemd-nspawn", "--quiet", "--boot", "--private-network", "--register=no", "--keep-unit"]
    booted = subprocess.run([*boot, "--directory", str(root)], stdout=subprocess.PIPE, text=True, timeout=300)
    found = under(root, f"{trial}/found.json")
    if not found.exists():
        sys.exit(f"{booted.stdout}prove.py: the unit failed its trial; see var/log/journal in {root}")
    return found.read_text()


def under(root: Path, path: str) -> Path:
    """Return where a path of a root lies on this machine."""
    return root / path.lstrip("/")


def say(text: str) -> None:
    """Tell what is being done, and when."""
    print(f"{time.monotonic() - START:6.0f} s  {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Build, serve, and print what was found as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("containerfile", nargs="?", type=Path, default=HERE / "Containerfile")
    parser.add_argument("--work", type=Path, required=True, help="folder of the roots: some GB")
    parser.add_argument("--photo", type=Path, help="photo to locate (default: the first of the tests')")
    parser.add_argument("--unit", action="store_true", help="also try the systemd unit; needs systemd-nspawn")
    parser.add_argument("--mirror", help="Debian mirror (default: debootstrap's)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="for the steps")
    parser.add_argument("--bind", action="append", default=[], metavar="HOST:INSIDE", help="for the steps")
    given = parser.parse_args()
    if os.geteuid():
        sys.exit("prove.py: chroot and mount need root")
    given.work.mkdir(parents=True, exist_ok=True)
    image = parse(given.containerfile.read_text())
    roots = Roots(given.work.resolve(), given.mirror, given.bind)
    pairs = (text.partition("=") for text in given.env)
    outer = {name: value if mark else os.environ[name] for name, mark, value in pairs}
    root, variables = build(image, roots, outer)
    measured = subprocess.run(["du", "-sm", root], check=True, capture_output=True, text=True).stdout
    photo = given.photo or min((CONTEXT / "tests/data/photos").glob("*.jpg"))
    found = {"containerfile": given.containerfile.name, "root_mb": int(measured.split()[0])}
    found["service"] = json.loads(try_service(image, roots, root, variables, photo))
    if given.unit:
        found["unit"] = json.loads(try_unit(image, roots, root, outer, photo))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

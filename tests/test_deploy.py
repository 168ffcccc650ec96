"""What deploys the service: images of the project's own parts, pinned packages, a unit that verifies."""

import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGES = {"Containerfile": ["serve", "openvino"], "Containerfile.gpu": ["serve", "gpu"]}
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.11"}

sys.path.insert(0, str(DEPLOY))
from containerfile import environment, parse  # noqa: E402


def pins(name):
    """{package: version} of a file of requirements; each has a hash."""
    text = (DEPLOY / name).read_text()
    found = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))
    assert text.count("==") == len(found)
    assert len(re.findall(r"^[a-z0-9._-]+==\S+ \\\n    --hash=sha256:", text, re.MULTILINE)) == len(found)
    return found


def wanted(extras):
    """The requirements of the project and of extras on Linux."""
    optional = PROJECT["project"]["optional-dependencies"]
    texts = PROJECT["project"]["dependencies"] + [text for extra in extras for text in optional[extra]]
    requirements = map(Requirement, texts)
    return [each for each in requirements if each.marker is None or each.marker.evaluate(LINUX)]


@pytest.mark.parametrize("name", IMAGES)
def test_the_pinned_packages_are_those_that_the_project_asks_for(name):
    found = pins("requirements-gpu.txt" if name.endswith("gpu") else "requirements-cpu.txt")
    for requirement in wanted(IMAGES[name]):
        package = requirement.name.replace("_", "-").lower()
        if package == "onnxruntime-gpu" and not name.endswith("gpu"):
            assert package not in found
            package = "onnxruntime"
        assert requirement.specifier.contains(found[package]), f"run deploy/pin.sh: {requirement}"
    built = pins("requirements-build-gpu.txt" if name.endswith("gpu") else "requirements-build.txt")
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(built[requirement.name])


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_nobody_and_says_how_it_fares(name):
    image = parse((DEPLOY / name).read_text())
    assert image.user == "10001"
    assert image.entrypoint == ["geoengine"]
    assert image.command[:2] == ["serve", "--demo"]
    assert "--keys" in image.command
    assert image.healthcheck == ["python", "/opt/geoengine/health.py"]
    build, final = image.stages
    assert build.base == final.base == "debian:12.15-slim"
    assert not any("pip" in rest or "g++" in rest for _, rest in final.steps)
    installs = [rest for kind, rest in build.steps if kind == "RUN" and " install " in rest and "pip" in rest]
    for words in installs:
        assert "--require-hashes" in words or "--no-index" in words, words


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_made_of_every_package_of_the_project(name):
    text = (DEPLOY / name).read_text()
    copied = set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE))
    assert copied == set(PROJECT["tool"]["scikit-build"]["wheel"]["packages"].values())
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / word).exists() for word in source.split()), source


def test_containerfiles_are_read_as_they_are_written():
    image = parse(
        "# c\nARG B=a:1\nFROM ${B} AS x\nRUN one \\\n # not this\n && two\nENV A=1 B='2 3'\nUSER 5\n"
    )
    assert [(stage.base, stage.name) for stage in image.stages] == [("a:1", "x")]
    assert image.stages[0].steps == [("RUN", "one && two"), ("ENV", "A=1 B='2 3'")]
    assert environment("A=1 B='2 3'") == {"A": "1", "B": "2 3"}
    with pytest.raises(ValueError, match="line 2: ONBUILD is not known"):
        parse("FROM a:1\nONBUILD RUN x\n")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("for_gpus", [False, True])
def test_the_unit_verifies_and_exposes_little(tmp_path, for_gpus):
    unit = (DEPLOY / "geoengine.service").read_text()
    assert "DynamicUser=yes" in unit
    assert "LimitCORE=0" in unit
    there = unit.replace("/opt/geoengine/bin/geoengine", "/bin/true").replace(
        "/opt/geoengine/bin/python", "/bin/true"
    )
    (tmp_path / "geoengine.service").write_text(there)
    if for_gpus:
        (tmp_path / "geoengine.service.d").mkdir()
        shutil.copy(DEPLOY / "geoengine-gpu.conf", tmp_path / "geoengine.service.d" / "gpu.conf")
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "geoengine.service"],
        capture_output=True,
        text=True,
    )
    assert "geoengine.service" not in verified.stderr, verified.stderr
    command = [
        "systemd-analyze",
        "security",
        "--offline=true",
        "--threshold=20",
        tmp_path / "geoengine.service",
    ]
    rated = subprocess.run(command, capture_output=True, text=True)
    assert rated.returncode == 0, rated.stdout[-200:]


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(type(self).status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_health_check_tells_a_service_that_answers_from_others():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Health)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def check(url, *options):
        return subprocess.run(
            [sys.executable, DEPLOY / "health.py", url, *options], capture_output=True, text=True
        )

    try:
        assert check(f"{address}/health").returncode == 0
        _Health.status = 503
        assert check(f"{address}/health").returncode == 1
        threading.Timer(0.5, setattr, (_Health, "status", 200)).start()
        assert check(f"{address}/health", "--wait", "20").returncode == 0
        assert "HTTP 404" in check(f"{address}/other").stderr
    finally:
        _Health.status = 200
        server.shutdown()
        server.server_close()
    gone = check(f"{address}/health")
    assert (gone.returncode, "refused" in gone.stderr) == (1, True)

"""The web page's built files: those of the sources beside them, small, and self-contained."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

SERVICE = Path(__file__).parents[1] / "geoengine" / "service"
STATIC, WEB = SERVICE / "static", SERVICE / "web"
MOST_COMPRESSED = 400_000


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_below(folder):
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.as_posix())


@pytest.fixture(scope="module")
def build():
    return json.loads((STATIC / "build.json").read_text())


def test_the_page_is_built_from_its_sources(build):
    use = WEB.parents[2] / "RESPONSIBLE_USE.md"
    sources = [
        WEB / "build.mjs",
        WEB / "package-lock.json",
        WEB / "package.json",
        use,
        *files_below(WEB / "src"),
    ]
    found = hashlib.sha256("\n".join(map(sha256, sources)).encode()).hexdigest()
    assert build["source"] == found, "the page's sources or RESPONSIBLE_USE.md have changed: run `make page`"


def test_the_built_files_are_as_they_were_built(build):
    found = {path.relative_to(STATIC).as_posix(): sha256(path) for path in files_below(STATIC)}
    del found["build.json"]
    assert found == build["files"], "files in geoengine/service/static have changed: run `make page`"


def test_script_and_style_are_small():
    files = [path for path in files_below(STATIC) if path.suffix in (".js", ".css")]
    sizes = {path.name: len(gzip.compress(path.read_bytes())) for path in files}
    print({name: f"{size / 1000:.1f} KB" for name, size in sizes.items()}, "compressed")
    assert len(sizes) == 2
    assert sum(sizes.values()) <= MOST_COMPRESSED


@pytest.mark.parametrize("name", ["index.html", "responsible-use.html"])
def test_pages_keep_to_the_policy_and_to_this_server(name):
    page = (STATIC / name).read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|https?://", page)
    linked = re.findall(r'(?:href|src)="(/static/[^"]+)"', page)
    assert len(linked) >= 2
    assert all((STATIC / link.removeprefix("/static/")).is_file() for link in linked)
    assert "__" not in page


def test_the_page_says_what_the_responsible_use_file_says():
    text = re.sub(r"<[^>]+>", "", (STATIC / "responsible-use.html").read_text())
    for sentence in (
        "An answer is a hypothesis, not a proof",
        "What it is not for",
        "Answers can be forged.",
    ):
        assert sentence in text
    assert "**" not in text and "`" not in text

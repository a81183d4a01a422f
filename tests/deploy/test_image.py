"""The container image: its recipe read, and carried out where no engine is needed for it."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import proxy
from proxy import settings
from proxy.settings import PREFIX, Settings
from tests.deploy.programs import DEPLOY, ROOT
from tests.live import UPSTREAM_KEY, wait_for
from tests.ports import free_port

DOCKERFILE = DEPLOY / "Dockerfile"

# Every hash is checked, whether or not the file is in the cache; without one each run of the tests would load them anew.
NOT_HERE = {"PIP_NO_CACHE_DIR"}


@dataclass
class Stage:
    """One stage of the recipe: its base, and its instructions in order."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]

    def one(self, instruction: str) -> str:
        (found,) = self.all(instruction)
        return found

    @property
    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for rest in self.all("ENV") for pair in rest.split())


def stages() -> list[Stage]:
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    found: list[Stage] = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found.append(Stage(base, stage))
        elif name:
            found[-1].steps.append((name, rest.strip()))
    return found


BUILD, IMAGE = stages()
HEALTH_COMMAND = json.loads(IMAGE.one("HEALTHCHECK").partition(" CMD ")[2])


def in_context(path: Path) -> bool:
    """Whether a file of the tree goes to the build, by the rules of ``.dockerignore``: the last one that fits decides."""
    name = path.relative_to(ROOT).as_posix()
    parents = ["/".join(name.split("/")[:count]) for count in range(1, name.count("/") + 2)]
    goes = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.lstrip("!")
        anywhere = pattern.removeprefix("**/")
        if any(fnmatch.fnmatchcase(parent.split("/")[-1] if anywhere != pattern else parent, anywhere) for parent in parents):
            goes = line.startswith("!")
    return goes


class Build:
    """The recipe carried out under a directory in place of ``/``, with this interpreter for the base image's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cwd = root

    def inside(self, text: str) -> str:
        """A word of the recipe with the image's paths under the directory."""
        return re.sub(r"(?<![\w.])(?=/(opt|src|var)\b)", str(self.root), text)

    def carry_out(self, stage: Stage) -> None:
        environment = {**os.environ, **{name: value for name, value in BUILD.environment.items() if name not in NOT_HERE}}
        for name, rest in stage.steps:
            if name == "WORKDIR":
                self.cwd = Path(self.inside(rest))
                self.cwd.mkdir(parents=True, exist_ok=True)
            elif name == "COPY":
                self._copy(rest)
            elif name == "RUN":
                words = [self.inside(word) for word in json.loads(rest)]
                if os.geteuid() != 0:
                    words = [word for word in words if not word.startswith(("--owner=", "--group="))]
                words[0] = sys.executable if words[0] == "python" else words[0]
                ran = subprocess.run(words, cwd=self.cwd, env=environment, capture_output=True, text=True, check=False)
                assert ran.returncode == 0, f"{rest}\n{ran.stdout}\n{ran.stderr}"

    def _copy(self, rest: str) -> None:
        words = [word for word in rest.split() if not word.startswith("--")]
        *sources, target = words
        for source in sources:
            if "--from=build" in rest:
                # The stages share one directory: only what has another name there has to move.
                if source != target:
                    shutil.copytree(self.inside(source), self.inside(target))
                continue
            there = ROOT / source
            files = [there] if there.is_file() else [path for path in there.rglob("*") if path.is_file()]
            files = [path for path in files if in_context(path)]
            assert files, f"{source}: .dockerignore lets nothing of it through"
            for path in files:
                place = self.cwd / target / (path.relative_to(there) if there.is_dir() else path.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    build = Build(tmp_path_factory.mktemp("image"))
    build.carry_out(BUILD)
    build.carry_out(IMAGE)
    return build


def environment(build: Build, **more: str) -> dict[str, str]:
    """What a container of the image has, and what its operator gives it."""
    own = {name: build.inside(value) for name, value in IMAGE.environment.items()}
    return {**own, **{PREFIX + name.upper(): value for name, value in more.items()}}


def run(build: Build, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    given = environment(build, **more)
    (entry,) = json.loads(IMAGE.one("ENTRYPOINT"))
    words = [shutil.which(entry, path=given["PATH"]) or entry, *arguments]
    return subprocess.run(words, cwd=build.cwd, env=given, capture_output=True, text=True, timeout=60, check=False)


# As it is written


def test_its_bases_are_pinned_and_the_same() -> None:
    # A virtual environment belongs to the interpreter that made it.
    assert BUILD.base == IMAGE.base
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", BUILD.base)


def test_nothing_in_it_needs_a_shell() -> None:
    for stage in (BUILD, IMAGE):
        for name, rest in stage.steps:
            if name in ("RUN", "CMD", "ENTRYPOINT"):
                assert isinstance(json.loads(rest), list)
    assert "SHELL" not in dict(IMAGE.steps)


def test_everything_is_installed_by_hash_or_without_an_index() -> None:
    installs = [json.loads(rest) for rest in BUILD.all("RUN") if '"install"' in rest and '"pip"' in rest]
    assert len(installs) == 3
    for words in installs:
        assert "--require-hashes" in words or {"--no-index", "--no-deps"} <= set(words)


def test_it_is_nobody_in_particular() -> None:
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", IMAGE.one("USER"))
    owners = {word for rest in IMAGE.all("COPY") for word in rest.split() if word.startswith("--chown=")}
    assert owners == {f"--chown={IMAGE.one('USER')}"}
    # As root nothing else is done after this.
    assert [name for name, _ in IMAGE.steps][IMAGE.steps.index(("USER", IMAGE.one("USER"))) :].count("COPY") == 0


def test_it_listens_where_it_says() -> None:
    given = settings.load(
        {name: value for name, value in IMAGE.environment.items() if name.startswith(PREFIX)}, Path("/nowhere")
    )
    assert str(given.port) == IMAGE.one("EXPOSE")
    assert given.port == Settings.model_fields["port"].default
    assert given.host == "0.0.0.0"
    # The journal and the default database are on the same volume.
    assert given.state_dir.is_relative_to(IMAGE.one("WORKDIR"))


@pytest.mark.parametrize(
    "name",
    [
        ".git/config",
        "secrets/upstream-key",
        ".env",
        "beanmeter.db",
        "tests/live.py",
        "var/journal/x",
        "proxy/__pycache__/app.pyc",
    ],
)
def test_what_is_nobody_s_business_does_not_go_to_the_build(name: str) -> None:
    assert not in_context(ROOT / name)


# As it works


def test_it_is_built_from_what_goes_to_the_build(built: Build) -> None:
    assert run(built, "--version").stdout == f"beanmeter {proxy.__version__}\n"
    # Not the checkout's own code, which is on no path of the image.
    place = run(built, "prices", "--size", "1024x1024", "--json")
    assert place.returncode == 0, place.stderr


@pytest.fixture
def container(built: Build, tmp_path: Path) -> Iterator[tuple[Build, subprocess.Popen[str], str]]:
    """The image's own command, with a key as a file; and its port."""
    port = str(free_port())
    (tmp_path / "key").write_text(UPSTREAM_KEY)
    given = environment(built, port=port, upstream_key_file=str(tmp_path / "key"))
    words = [*json.loads(IMAGE.one("ENTRYPOINT")), *json.loads(IMAGE.one("CMD"))]
    words[0] = shutil.which(words[0], path=given["PATH"]) or words[0]
    process = subprocess.Popen(words, cwd=built.cwd, env=given, stderr=subprocess.PIPE, text=True)
    try:
        yield built, process, port
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_it_serves_is_healthy_and_writes_to_its_volume_alone(container: tuple[Build, subprocess.Popen[str], str]) -> None:
    build, process, port = container

    def tree() -> set[Path]:
        return {path for path in (build.root / "opt").rglob("*") if path.is_file()}

    before = tree()
    assert HEALTH_COMMAND[0] == "beanmeter"
    health = HEALTH_COMMAND[1:]

    def healthy() -> bool | None:
        assert process.poll() is None, process.stderr and process.stderr.read()
        return run(build, *health, port=port).returncode == 0 or None

    wait_for(healthy)
    assert run(build, "ping", port=port).returncode == 0
    assert tree() == before
    assert {path.name for path in build.cwd.iterdir()} == {"beanmeter.db", "beanmeter.db-wal", "beanmeter.db-shm", "state"}
    process.terminate()
    assert process.wait(60) == 0
    assert run(build, *health, port=port).returncode == 1

"""The image cannot be built here, so what can be read is checked: versions, sources, pins, users."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster" / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()
WORDS = {"ARG", "COPY", "ENV", "FROM", "RUN", "SHELL", "USER", "WORKDIR"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction with its arguments; https://docs.docker.com/reference/dockerfile/."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def problems(text: str, ray_version: str) -> list[str]:
    """What is wrong; each line names the instruction."""
    found, user, args = [], "root", {}
    for word, rest in instructions(text):
        if word not in WORDS:
            found.append(f"{word}: not an instruction that is wanted here")
        if word == "ARG":
            name, _, value = rest.partition("=")
            args[name] = value or args[name]
        if word == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda match: args[match[1]], rest)
            if image != f"docker.io/rayproject/ray:{ray_version}-py311-{args['DEVICE']}":
                found.append(f"FROM {image}: not Ray's image of {ray_version} and Python 3.11")
        if word == "USER":
            user = rest
        if word == "COPY":
            flags = [one for one in rest.split() if one.startswith("--")]
            *sources, _ = [one for one in rest.split() if not one.startswith("--")]
            for source in sources:
                if not (ROOT / source).exists():
                    found.append(f"COPY {source}: there is no such file")
                elif f"!{source}" not in IGNORED:
                    found.append(f"COPY {source}: .dockerignore leaves it out")
            if flags != ["--chown=1000:100"]:
                found.append(f"COPY {rest}: not the user's")
        if word == "RUN":
            for command in re.findall(r"pip install [^&]*", rest):
                if "--no-cache-dir" not in command:
                    found.append(f"RUN {command.strip()}: keeps a cache")
                if not re.search(r"--constraint constraints\.txt|--no-deps", command):
                    found.append(f"RUN {command.strip()}: not what constraints.txt pins")
    if user != "1000:100":
        found.append(f"USER {user}: the image does not end as 1000:100")
    if re.search(r"(?i)(password|secret|token|key)=(?!token\b)\S", text):
        found.append("a credential is written out")
    return found


def test_the_image_is_of_the_version_that_is_pinned_and_has_what_it_copies(ray_version):
    assert problems(TEXT, ray_version) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("RAY_VERSION=2.60.0", "RAY_VERSION=2.59.0", "FROM docker.io/rayproject/ray:2.59.0"),
        ("-py311-", "-py312-", "FROM docker.io/rayproject/ray:2.60.0-py312"),
        ("USER 1000:100\n", "", "USER 0:0"),
        ("LICENSE ray_config.yaml", "LICENCE ray_config.yaml", "COPY LICENCE: there is no"),
        (
            "COPY --chown=1000:100 README.md",
            "COPY --chown=1000:100 Makefile README.md",
            "COPY Makefile",
        ),
        ("--constraint constraints.txt --upgrade", "--upgrade", "RUN pip install --no-cache-dir"),
        ("--no-cache-dir --no-deps", "--no-deps", "RUN pip install --no-deps"),
        ("ENV PYTHON", "ENV API_KEY=abc PYTHON", "a credential"),
        ("WORKDIR /home/ray\n", "ADD https://example.com/x .\n", "ADD: not an instruction"),
    ],
)
def test_a_mistake_is_named(ray_version, old, new, told):
    assert old in TEXT
    (line,) = problems(TEXT.replace(old, new), ray_version)
    assert line.startswith(told)


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("no hadolint in this environment")
    done = subprocess.run(
        [hadolint, ROOT / "cluster" / "Dockerfile"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_commands_are_bash():
    for word, rest in instructions(TEXT):
        if word == "RUN":
            done = subprocess.run(["bash", "-n", "-c", rest], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_the_list_of_dependencies_is_read_as_pip_wants_it():
    (script,) = re.findall(r"python -c '([^']*)'", TEXT)
    done = subprocess.run(
        ["python3", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert any(line.startswith("ray[") for line in done.stdout.splitlines())


def test_everything_else_stays_outside():
    assert [line for line in IGNORED if not line.startswith(("#", "!"))] == ["*", "**/__pycache__"]

"""The workflows of GitHub: they name files, targets, versions and jobs that exist, and pin what they use."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Loader(yaml.SafeLoader):
    """YAML 1.2 as GitHub reads it: `on` is a word, and no key is there twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class' own
        letter: [(tag, expression) for tag, expression in found if tag != "tag:yaml.org,2002:bool"]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice: {keys}"
        return super().construct_mapping(node, deep)


def read(name: str) -> dict[str, Any]:
    return yaml.load((FOLDER / f"{name}.yml").read_text(), Loader)


NAMES = sorted(path.stem for path in FOLDER.glob("*.yml"))


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in read(name)["jobs"].values() for step in job.get("steps", [])]


def test_there_are_three():
    assert NAMES == ["matrix", "release", "test"]


@pytest.mark.parametrize("name", NAMES)
def test_jobs_are_whole(name):
    workflow = read(name)
    assert workflow["name"] == name
    assert workflow["on"]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert ("uses" in job) != ("steps" in job)
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
        for step in job.get("steps", []):
            assert ("uses" in step) != ("run" in step)
            assert "uses" not in step or re.fullmatch(r"(?:docker://)?[\w./-]+[@:][\w./-]+", step["uses"])
        if "uses" in job:
            called = read(Path(job["uses"]).stem)
            assert "workflow_call" in called["on"]


@pytest.mark.parametrize("name", NAMES)
def test_what_they_run_exists(name):
    targets = set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    options = (ROOT / "tools" / "matrix.py").read_text()
    for run in (step["run"] for step in steps(name) if "run" in step):
        assert set(re.findall(r"^make ([a-z]+)", run, re.MULTILINE)) <= targets
        for script, rest in re.findall(r"python (tools/[\w.]+)(.*)", run):
            assert (ROOT / script).is_file()
            assert [option for option in re.findall(r"--[a-z]+", rest) if f'"{option}"' not in options] == []


def test_versions_are_those_of_the_project():
    matrix = read("matrix")["jobs"]["wheel"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    (least,) = re.findall(r"^torch>=([\d.]+)$", "\n".join(PROJECT["dependencies"]), re.MULTILINE)
    (locked,) = re.findall(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert matrix["torch"] == [f"torch=={least}.*", locked, "torch"]
    for step in [*steps("test"), *steps("release")]:
        assert re.findall(r"torch==[\d.]+", step.get("run", "")) in ([], [locked])


def test_a_release_is_built_for_its_repository_after_the_matrix():
    jobs = read("release")["jobs"]
    assert set(jobs["publish"]["needs"]) == {"matrix", "build"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}  # what takes the place of a token
    (dist,) = (step for step in jobs["build"]["steps"] if "make dist" in step.get("run", ""))
    assert dist["env"] == {"RECOLLECT_REPOSITORY": "${{ github.server_url }}/${{ github.repository }}"}

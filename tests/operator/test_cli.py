"""`broadbeam render` and `broadbeam explain` as a user runs them: words, exit codes, one line an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import to_yaml
from broadbeam_operator import main
from broadbeam_operator.commands import app
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import manifests

BROADBEAM = str(Path(sys.executable).parent / "broadbeam")
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def written(path: Path, cluster) -> str:
    path.write_text(to_yaml(cluster))
    return str(path)


@pytest.fixture
def refused(tmp_path) -> str:
    wrong = pool("both", parallelism={"data": 3, "nodes": 2}, accelerator={"resource": "cpu", "perNode": 2})
    return written(tmp_path / "refused.yaml", serving_cluster(pools=[wrong]))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_explained(path):
    result = run("explain", str(path))
    assert result.exit_code == 0
    assert "it adds up" in result.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_rendered_as_yaml(path):
    result = run("render", str(path))
    assert result.exit_code == 0
    assert all(each["kind"] for each in yaml.safe_load_all(result.stdout))


def test_what_is_printed_is_what_is_applied(tmp_path):
    cluster = serving_cluster()
    result = run("render", written(tmp_path / "demo.yaml", cluster))
    assert list(yaml.safe_load_all(result.stdout)) == manifests(cluster, Images())


def test_the_namespace_of_the_manifest_wins_over_the_option(tmp_path):
    given = written(tmp_path / "a.yaml", serving_cluster(namespace="mine"))
    assert "namespace: mine" in run("render", given, "-n", "other").stdout
    assert "namespace: other" not in run("render", given, "-n", "other").stdout


def test_explain_shows_the_arithmetic():
    result = run("explain", str(next(path for path in EXAMPLES if path.stem == "deepseek-r1-h200")))
    assert "data 32 x tensor 1 = 32 in each group" in result.stdout
    assert "48 in 6 pods, on at least 6 nodes of 8" in result.stdout


def test_explain_of_a_refused_cluster_names_the_field_and_exits_with_1(refused):
    result = run("explain", refused)
    assert result.exit_code == 1
    assert "refused: spec.pools[both].parallelism" in result.stdout


def test_render_of_a_refused_cluster_prints_lines_and_exits_with_2(refused):
    result = run("render", refused)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"broadbeam: {refused}: spec.pools[both].parallelism")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("a: [", "not YAML", id="no YAML"),
        pytest.param("", "0 documents", id="empty"),
        pytest.param(
            "kind: Pod\napiVersion: v1", 'apiVersion: "v1" is not serving.broadbeam.io', id="another kind"
        ),
        pytest.param("[]", "not a mapping", id="a list"),
    ],
)
@pytest.mark.parametrize("command", ["render", "explain"])
def test_what_is_no_manifest_gets_one_line(tmp_path, command, text, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    result = run(command, str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"broadbeam: {path}:")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_file_gets_one_line():
    result = run("render", "/nowhere/x.yaml")
    assert (result.exit_code, result.stderr) == (2, "broadbeam: /nowhere/x.yaml: No such file or directory\n")


def test_the_version_is_printed():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("broadbeam 0.")


@pytest.mark.parametrize("arguments", [["--help"], ["render", "--help"], ["explain", "--help"]])
def test_help_is_there(arguments):
    assert run(*arguments).exit_code == 0


def operator(*arguments: str):
    return CliRunner().invoke(main.app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--namespace", "a", "--all-namespaces"], "exclude each other", id="both scopes"),
        pytest.param(["--log-level", "loud"], '--log-level: "loud" is not one of', id="log level"),
        pytest.param(["--kubeconfig", "/nowhere"], "kubeconfig /nowhere", id="no kubeconfig"),
    ],
)
def test_the_operator_refuses_wrong_usage_in_one_line(arguments, words):
    result = operator("run", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["render", "explain"])
def test_an_output_that_cannot_be_written_is_one_line(word):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [BROADBEAM, word, str(EXAMPLES[0])], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "broadbeam: standard output: No space left on device\n")


@pytest.mark.parametrize("word", ["render", "explain"])
def test_a_closed_output_is_no_error(word):
    done = subprocess.run(
        ["bash", "-c", '"$@" >&-', "-", BROADBEAM, word, str(EXAMPLES[0])],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_line_without_its_extra_says_which_to_install():
    code = "import sys; sys.modules['typer'] = None; from broadbeam_operator.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "broadbeam: typer is not installed: pip install 'broadbeam[operator]'\n"
    assert (ended.returncode, ended.stderr) == (1, said)


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    result = CliRunner().invoke(app, ["up", str(EXAMPLES[-1])])
    assert result.exit_code == 2
    assert result.stderr == (
        "broadbeam: this user has no home folder: give --cache FOLDER, or set BROADBEAM_CACHE\n"
    )


@pytest.mark.parametrize("name", ["../up", "No", "-a", "a" * 64, "a\n"])
def test_a_namespace_that_is_none_is_refused_before_it_becomes_a_folder(tmp_path, name):
    given = written(tmp_path / "a.yaml", serving_cluster(namespace=name))
    for words in (("render", given), ("up", given), ("render", str(EXAMPLES[0]), "-n", name)):
        result = run(*words)
        assert result.exit_code != 0
        assert f'metadata.namespace: "{name}" must be at most 63 of a-z' in result.stderr

"""The commands of `broadbeam`: render and explain are here; `up` and `demo` run a cluster on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import yaml

from broadbeam_crds.v1alpha1 import ManifestError, ServingCluster, load_manifest
from broadbeam_operator.accept import refusals
from broadbeam_operator.cluster import Object
from broadbeam_operator.explain import Explanation, explain
from broadbeam_operator.images import Images
from broadbeam_operator.local.commands import register
from broadbeam_operator.manifests import manifests
from broadbeam_operator.version import version

REFUSED = 1  # a manifest that is one, and cannot be built
UNUSABLE = 2  # wrong usage, no file, no manifest

DEFAULTS = Images()
EPILOG = """
Examples:

  broadbeam explain examples/deepseek-r1-h200.yaml     (what it will take, and whether it adds up)

  broadbeam render examples/laptop.yaml                (every object the operator would apply)

  broadbeam up examples/laptop.yaml                    (serve it on this machine, until Ctrl-C)

  kubectl apply -f examples/laptop.yaml                (serve it where the operator runs)
"""

app = typer.Typer(
    name="broadbeam",
    help="Disaggregated wide expert-parallel serving: one manifest, on a laptop or in a cluster.",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(help="A ServingCluster in YAML.", show_default=False)]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"broadbeam {version()}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("render")
def render_command(
    file: File,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Where the manifest names none.")
    ] = None,
    runtime_image: Annotated[
        str, typer.Option(help="Image of engines broadbeam and sim.")
    ] = DEFAULTS.runtime,
    router_image: Annotated[str, typer.Option(help="Image of the gateway.")] = DEFAULTS.router,
    vllm_image: Annotated[str, typer.Option(help="Image of engine vllm.")] = DEFAULTS.vllm,
) -> None:
    """Print every object that the operator would apply, as YAML in a stable order.

    The same input gives the same bytes, so `diff` shows what a change to the manifest does.
    """
    cluster = load(file, namespace)
    if wrong := refusals(cluster):
        refuse(file, wrong)
    images = Images(runtime=runtime_image, router=router_image, vllm=vllm_image)
    sys.stdout.write(to_yaml(manifests(cluster, images)))


@app.command("explain")
def explain_command(file: File) -> None:
    """Say in words what the cluster will be: devices, nodes, experts and memory a rank.

    Exits with 1 when the operator would refuse it, and shows the arithmetic that fails.
    """
    found = explain(load(file))
    _show(found)
    if found.refusals:
        raise typer.Exit(REFUSED)


def load(file: Path, namespace: str | None = None) -> ServingCluster:
    """The manifest, or one line and exit 2. A namespace in the manifest wins over the option."""
    try:
        cluster = load_manifest(file)
    except ManifestError as error:
        fail(str(error))
    where = cluster.metadata.namespace or namespace or "default"
    return cluster.model_copy(update={"metadata": cluster.metadata.model_copy(update={"namespace": where})})


def fail(message: str, code: int = UNUSABLE) -> NoReturn:
    typer.echo(f"broadbeam: {message}", err=True)
    raise typer.Exit(code)


def refuse(file: Path, wrong: list[str]) -> NoReturn:
    """One line for each mistake."""
    for message in wrong:
        typer.echo(f"broadbeam: {file}: {message}", err=True)
    raise typer.Exit(UNUSABLE)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, so that configs can be read."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_yaml(objects: list[Object]) -> str:
    plain = [_without_aliases(obj) for obj in objects]
    return yaml.dump_all(plain, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=110)


def _without_aliases(value: object) -> object:
    """Shared parts as copies: YAML would print them as anchors."""
    if isinstance(value, dict):
        return {key: _without_aliases(item) for key, item in value.items()}
    return [_without_aliases(item) for item in value] if isinstance(value, list) else value


def _show(found: Explanation) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(found.headline, style="bold"))
    for paragraph in found.paragraphs:
        console.print(Text(paragraph.title, style="bold cyan"))
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for what, value in paragraph.facts:
            table.add_row(what, Text(value))
        console.print(Padding(table, (0, 0, 0, 2)))
    for message in found.refusals:
        console.print(Text(f"refused: {message}", style="bold red"))
    if not found.refusals:
        console.print(Text("it adds up: the operator would build it", style="green"))


register(app)

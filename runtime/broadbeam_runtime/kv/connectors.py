"""Which connector a rank uses, as its config says."""

from __future__ import annotations

from broadbeam_crds.engine_config import EngineConfig
from broadbeam_runtime.kv.pull import PEER_TIMEOUT_S, PullConnector


def create(
    config: EngineConfig, host: str, port: int, peer_timeout_s: float = PEER_TIMEOUT_S
) -> PullConnector | None:
    """The connector of `config.kv_transfer`, listening on host:port once started; None where none is set.

    `port` is conventions.KV_SIDE_CHANNEL_PORT + the rank's ordinal in its pod; `peer_timeout_s` is how long
    a peer may stay silent.
    """
    transfer = config.kv_transfer
    if transfer is None:
        return None
    if transfer.connector == "nixl":
        from broadbeam_runtime.kv.nixl import NixlTransport

        return PullConnector(NixlTransport(), host, port, transfer.lease_s, peer_timeout_s=peer_timeout_s)
    from broadbeam_runtime.kv.tcp import TcpTransport

    return PullConnector(TcpTransport(host), host, port, transfer.lease_s, peer_timeout_s=peer_timeout_s)


def simulated(config: EngineConfig, host: str, port: int) -> PullConnector | None:
    """The same protocol without the bytes."""
    transfer = config.kv_transfer
    if transfer is None:
        return None
    from broadbeam_runtime.kv.simulated import SimulatedTransport

    transport = SimulatedTransport(transfer.connector, config.sim.transfer_gbit_s * 1e9 / 8)
    return PullConnector(transport, host, port, transfer.lease_s)

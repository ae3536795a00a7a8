"""Names and numbers that more than one room relies on: labels, annotations, ports, paths, environment.

A rank is one engine process on one accelerator. A pod runs `ranks_per_node` of them behind one
supervisor; a group is the pods that share one expert-parallel world.
"""

from __future__ import annotations

API_GROUP = "serving.broadbeam.io"
API_VERSION = "v1alpha1"
KIND = "ServingCluster"
PLURAL = "servingclusters"
FIELD_MANAGER = "broadbeam-operator"

LABEL_CLUSTER = f"{API_GROUP}/cluster"
LABEL_POOL = f"{API_GROUP}/pool"
LABEL_ROLE = f"{API_GROUP}/role"
LABEL_GROUP = f"{API_GROUP}/group"
LABEL_REVISION = f"{API_GROUP}/revision"
LABEL_COMPONENT = f"{API_GROUP}/component"  # "engine" | "gateway"
LABEL_LLMD_ROLE = "llm-d.ai/role"  # so that other endpoint pickers can read our pods
ANNOTATION_RANKS = f"{API_GROUP}/ranks-per-node"
ANNOTATION_NODES = f"{API_GROUP}/nodes"  # pods of the group that a pod was made for
ANNOTATION_CONFIG_HASH = f"{API_GROUP}/config-hash"
GROUP_READY_GATE = f"{API_GROUP}/group-ready"  # pod readiness gate: every rank of the group can serve

# Ports within a pod. Rank i of a pod (i counts from 0 within the pod) adds i where noted.
RANK_HTTP_PORT = 8000  # + i: OpenAI API and /metrics of one rank
SUPERVISOR_PORT = 9000  # /health /readyz /metrics /drain /v1/fault_tolerance/*
KV_SIDE_CHANNEL_PORT = 5600  # + i: KV transfer handshake
KV_EVENTS_PORT = 5557  # + i
KV_REPLAY_PORT = 5657  # + i
COORDINATOR_PORT = 29500  # torch.distributed rendezvous, on node 0 of the group
GATEWAY_PORT = 8080
GATEWAY_METRICS_PORT = 9090

CONFIG_DIR = "/etc/broadbeam"
ENGINE_CONFIG_FILE = f"{CONFIG_DIR}/engine.json"
GATEWAY_CONFIG_FILE = f"{CONFIG_DIR}/gateway.json"
API_KEYS_DIR = "/etc/broadbeam-keys"  # a mounted Secret; every file holds keys, one a line

# Environment of an engine or gateway container; flags of the same name win.
ENV_POD_NAME = "BROADBEAM_POD_NAME"
ENV_POD_IP = "BROADBEAM_POD_IP"
ENV_NAMESPACE = "BROADBEAM_NAMESPACE"
ENV_NODE_INDEX = "BROADBEAM_NODE_INDEX"  # the pod's ordinal in its group
ENV_CACHE = "BROADBEAM_CACHE"  # where models are fetched to and converted; default ~/.cache/broadbeam
# Lines of "address name", read before DNS: how a node without cluster DNS (a laptop) resolves pod names.
ENV_HOSTS_FILE = "BROADBEAM_HOSTS_FILE"

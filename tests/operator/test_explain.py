"""What is said of the examples, number by number, against arithmetic done by hand from the models' sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import load_manifest
from broadbeam_operator.explain import explain

EXAMPLES = Path(__file__).parents[2] / "examples"

# DeepSeek-V3 (and R1): 61 layers of width 7168, of which 58 have experts; 128 heads.
#   attention: 7168*1536 + 1536*128*192 (queries) + 7168*576 + 512*128*256 (keys, values) + 128*128*7168 (out)
#   = 187,105,280 a layer; three dense layers of 3*7168*18432; an expert is 3*7168*2048 = 44,040,192
#   embeddings: 2*129280*7168, norms 123*7168, routers 58*7168*256 = 1,960,670,208
# On every rank, FP8 (1 + 4/16384 bytes with its scales) but for the embeddings, in BF16:
#   (61*187,105,280 + 1,189,085,184 + 58*44,040,192) * 1.000244 + 1,960,670,208*2 = 17.8 GiB
# Experts: 58*18, 58*9 in FP8: 42.8, 21.4 GiB; 58*64, 58*32: 152.3, 76.1 GiB
#   58*128, 58*32 in NVFP4 (1/2 + 1/16 bytes): 171.3, 42.8 GiB; offloaded: 28 layers of 128: 82.7 GiB
# KV of a token: 61*576 = 35,136 bytes in FP8, twice that in BF16.
R1 = {
    "parameters": "671.0 billion, 36.6 billion active for a token",
    "layers": "61 of width 7168",
    "experts": "256 a layer, 8 for a token",
}
# gpt-oss-120b: 36 layers; attention 2880*64*2*(64+8), embeddings 2*201088*2880 + 73*2880 + 36*2880*128, in
#   BF16: 4.0 GiB; 36*16 experts of 3*2880*2880 in MXFP4 (1/2 + 1/32 bytes): 7.1 GiB; KV 36*2*8*64 bytes
# SmolLM2-135M: 30*(576*64*2*(9+3) + 3*576*1536) + 49152*576 + 61*576 = 134,515,008 parameters, 4 bytes each;
#   KV 30*2*3*64*4 bytes
# The tiny DeepSeek: 8,894,720 parameters, of which 3*16 experts of 3*256*128; KV 4*576*4 bytes
SAID = [
    pytest.param("deepseek-r1-h200", "model", R1 | {"longest sequence": "16,384 tokens"}, id="h200 model"),
    pytest.param(
        "deepseek-r1-h200",
        "pool prefill",
        {
            "groups": "1 x 2 pods x 8 NVIDIA-H200 = 16 NVIDIA-H200 in 2 pods",
            "EP degree": "data 16 x tensor 1 = 16 in each group",
            "experts": "(256 + 32 copies) / 16 = 18 a rank, in every layer",
            "weights a rank": "17.8 GiB on every rank + 42.8 GiB of experts = 60.6 GiB",
            "KV cache a rank": "79.4 GiB (what the weights leave) / 35,136 bytes a token = 2,426,365 tokens, "
            "148 sequences of 16,384",
            "memory a rank": "60.6 GiB of 140.0 GiB: fits",
        },
        id="h200 prefill",
    ),
    pytest.param(
        "deepseek-r1-h200",
        "pool decode",
        {
            "groups": "1 x 4 pods x 8 NVIDIA-H200 = 32 NVIDIA-H200 in 4 pods",
            "EP degree": "data 32 x tensor 1 = 32 in each group",
            "experts": "(256 + 32 copies) / 32 = 9 a rank, in every layer",
            "weights a rank": "17.8 GiB on every rank + 21.4 GiB of experts = 39.2 GiB",
            "KV cache a rank": "100.8 GiB (what the weights leave) / 35,136 bytes a token = "
            "3,080,811 tokens, 188 sequences of 16,384",
            "memory a rank": "39.2 GiB of 140.0 GiB: fits",
        },
        id="h200 decode",
    ),
    pytest.param(
        "deepseek-r1-h200", "in all", {"NVIDIA-H200": "48 in 6 pods, on at least 6 nodes of 8"}, id="h200"
    ),
    pytest.param("deepseek-r1-gb200", "model", R1 | {"longest sequence": "8,192 tokens"}, id="gb200 model"),
    pytest.param(
        "deepseek-r1-gb200",
        "pool prefill",
        {
            "groups": "4 x 1 pod x 2 NVIDIA-GB200 = 8 NVIDIA-GB200 in 4 pods",
            "EP degree": "data 2 x tensor 1 = 2 in each group",
            "experts": "256 / 2 = 128 a rank, in every layer",
            "weights a rank": "17.8 GiB on every rank + 171.3 GiB of experts - 82.7 GiB in host memory = "
            "106.4 GiB",
            "KV cache a rank": "78.6 GiB (what the weights leave) / 35,136 bytes a token = 2,403,049 tokens, "
            "293 sequences of 8,192",
            "memory a rank": "106.4 GiB of 185.0 GiB: fits",
        },
        id="gb200 prefill",
    ),
    pytest.param(
        "deepseek-r1-gb200",
        "pool decode",
        {
            "groups": "1 x 2 pods x 4 NVIDIA-GB200 = 8 NVIDIA-GB200 in 2 pods",
            "EP degree": "data 8 x tensor 1 = 8 in each group",
            "experts": "256 / 8 = 32 a rank, in every layer",
            "weights a rank": "17.8 GiB on every rank + 42.8 GiB of experts = 60.6 GiB",
            "KV cache a rank": "124.4 GiB (what the weights leave) / 35,136 bytes a token = "
            "3,801,866 tokens, 464 sequences of 8,192",
            "memory a rank": "60.6 GiB of 185.0 GiB: fits",
        },
        id="gb200 decode",
    ),
    pytest.param(
        # A tray holds four: two prefill pods, or one decode pod.
        "deepseek-r1-gb200",
        "in all",
        {"NVIDIA-GB200": "16 in 6 pods, on at least 4 nodes of 4"},
        id="gb200",
    ),
    pytest.param(
        "gpt-oss-120b-b200",
        "model",
        {
            "parameters": "116.8 billion, 5.1 billion active for a token",
            "layers": "36 of width 2880",
            "experts": "128 a layer, 4 for a token",
            "longest sequence": "131,072 tokens",
        },
        id="gpt-oss model",
    ),
    pytest.param(
        "gpt-oss-120b-b200",
        "pool serve",
        {
            "groups": "1 x 1 pod x 8 NVIDIA-B200 = 8 NVIDIA-B200 in 1 pod",
            "EP degree": "data 8 x tensor 1 = 8 in each group",
            "experts": "128 / 8 = 16 a rank, in every layer",
            "weights a rank": "4.0 GiB on every rank + 7.1 GiB of experts = 11.1 GiB",
            "KV cache a rank": "167.9 GiB (what the weights leave) / 36,864 bytes a token = "
            "4,891,791 tokens, 37 sequences of 131,072",
            "memory a rank": "11.1 GiB of 179.0 GiB: fits",
        },
        id="gpt-oss pool",
    ),
    pytest.param(
        "gpt-oss-120b-b200", "in all", {"NVIDIA-B200": "8 in 1 pod, on at least 1 node of 8"}, id="gpt-oss"
    ),
    pytest.param(
        "laptop",
        "model",
        {
            "parameters": "134.5 million",
            "layers": "30 of width 576",
            "longest sequence": "4,096 tokens",
        },
        id="laptop model",
    ),
    *(
        pytest.param(
            "laptop",
            f"pool {role}",
            {
                "groups": "1 x 1 pod x 1 CPU rank = 1 CPU rank in 1 pod",
                "EP degree": "data 1 x tensor 1 = 1 in each group",
                "weights a rank": "513.1 MiB on every rank",
                "KV cache a rank": "256.0 MiB (as given) / 46,080 bytes a token = 5,825 tokens, "
                "1 sequence of 4,096",
                "memory a rank": "769.1 MiB of 1.5 GiB: fits",
            },
            id=f"laptop {role}",
        )
        for role in ("prefill", "decode")
    ),
    pytest.param("laptop", "in all", {"CPU ranks": "2 in 2 pods"}, id="laptop"),
    pytest.param(
        "tiny-wide-ep",
        "model",
        {
            "parameters": "8.9 million, 4.8 million active for a token",
            "layers": "4 of width 256",
            "experts": "16 a layer, 4 for a token",
            "longest sequence": "2,048 tokens",
        },
        id="tiny model",
    ),
    pytest.param(
        "tiny-wide-ep",
        "pool prefill",
        {
            "groups": "1 x 1 pod x 2 CPU ranks = 2 CPU ranks in 1 pod",
            "EP degree": "data 2 x tensor 1 = 2 in each group",
            "experts": "16 / 2 = 8 a rank, in every layer",
            "weights a rank": "15.9 MiB on every rank + 9.0 MiB of experts = 24.9 MiB",
            "KV cache a rank": "64.0 MiB (as given) / 9,216 bytes a token = 7,281 tokens, "
            "3 sequences of 2,048",
        },
        id="tiny prefill",
    ),
    pytest.param(
        "tiny-wide-ep",
        "pool decode",
        {
            "groups": "1 x 2 pods x 2 CPU ranks = 4 CPU ranks in 2 pods",
            "EP degree": "data 4 x tensor 1 = 4 in each group",
            "experts": "16 / 4 = 4 a rank, in every layer",
            "weights a rank": "15.9 MiB on every rank + 4.5 MiB of experts = 20.4 MiB",
            "KV cache a rank": "64.0 MiB (as given) / 9,216 bytes a token = 7,281 tokens, "
            "3 sequences of 2,048",
        },
        id="tiny decode",
    ),
    pytest.param("tiny-wide-ep", "in all", {"CPU ranks": "6 in 3 pods"}, id="tiny"),
    pytest.param("sim", "model", R1 | {"longest sequence": "8,192 tokens"}, id="sim model"),
    pytest.param(
        "sim",
        "pool prefill",
        {
            "groups": "2 x 1 pod x 4 CPU ranks = 8 CPU ranks in 2 pods",
            "EP degree": "data 4 x tensor 1 = 4 in each group",
            "experts": "256 / 4 = 64 a rank, in every layer",
            "weights a rank": "17.8 GiB on every rank + 152.3 GiB of experts = 170.1 GiB, "
            "were they not simulated",
            "KV cache a rank": "4.0 GiB (as given) / 70,272 bytes a token = 61,119 tokens, "
            "7 sequences of 8,192",
        },
        id="sim prefill",
    ),
    pytest.param(
        "sim",
        "pool decode",
        {
            "groups": "1 x 2 pods x 4 CPU ranks = 8 CPU ranks in 2 pods",
            "EP degree": "data 8 x tensor 1 = 8 in each group",
            "experts": "256 / 8 = 32 a rank, in every layer",
            "weights a rank": "17.8 GiB on every rank + 76.1 GiB of experts = 93.9 GiB, "
            "were they not simulated",
            "KV cache a rank": "4.0 GiB (as given) / 70,272 bytes a token = 61,119 tokens, "
            "7 sequences of 8,192",
        },
        id="sim decode",
    ),
    pytest.param("sim", "in all", {"CPU ranks": "16 in 4 pods"}, id="sim"),
]
SET_DOWN = ("source", "role")  # as the manifest says them


@pytest.mark.parametrize(("example", "title", "facts"), SAID)
def test_an_example_comes_out_as_it_does_by_hand(example: str, title: str, facts: dict[str, str]) -> None:
    found = explain(load_manifest(EXAMPLES / f"{example}.yaml"))

    (paragraph,) = [each for each in found.paragraphs if each.title == title]
    assert {what: value for what, value in paragraph.facts if what not in SET_DOWN} == facts
    assert found.refusals == []


def test_every_example_and_every_paragraph_with_numbers_is_in_the_table() -> None:
    wanted = {
        (path.stem, paragraph.title)
        for path in EXAMPLES.glob("*.yaml")
        for paragraph in explain(load_manifest(path)).paragraphs
        if paragraph.title != "gateway"
    }

    assert {(row.values[0], row.values[1]) for row in SAID} == wanted


@pytest.mark.parametrize(
    ("groups", "nodes", "per_node", "product", "said"),
    [
        pytest.param(4, 1, 2, "NVIDIA-GB200", "8 in 4 pods, on at least 2 nodes of 4", id="two on a tray"),
        pytest.param(4, 1, 3, "NVIDIA-GB200", "12 in 4 pods, on at least 4 nodes of 4", id="one on a tray"),
        pytest.param(1, 2, 8, "NVIDIA-H200", "16 in 2 pods, on at least 2 nodes of 8", id="whole servers"),
        pytest.param(3, 1, 2, "NVIDIA-L40S", "6 in 3 pods", id="servers differ"),
    ],
)
def test_pods_that_leave_room_share_a_node(groups, nodes, per_node, product, said) -> None:
    device = {"perNode": per_node, "product": product}
    chosen = pool("both", groups=groups, data=nodes * per_node, nodes=nodes, accelerator=device, kvCache={})
    model = {"name": "new", "source": "hf://a/new"}

    found = explain(serving_cluster(pools=[chosen], engine="vllm", model=model))

    assert found.paragraphs[-1].facts == [(product, said)]

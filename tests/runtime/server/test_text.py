"""Tokens to text and chat messages to prompts: nothing torn, nothing shown that a stop string swallows."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from broadbeam_runtime.chat_template import ChatTemplate, TemplateError
from broadbeam_runtime.core import Output
from broadbeam_runtime.detokenizer import DeltaBuffer, TextRules, TextStream, WindowDetokenizer, detokenizer
from broadbeam_runtime.openai_responses import TextOffset
from broadbeam_runtime.sim_tokenizer import END, FIRST_BYTE, SimTokenizer
from broadbeam_runtime.tokenizer import HuggingFaceTokenizer, TokenizerError

TEXT = "Ahoy ⛵ čaj 漢字 👩‍👩‍👧 the  wide\tsea\n"


def tokens_of(text: str) -> tuple[int, ...]:
    """One token a byte, so that every character of several bytes is split."""
    return tuple(FIRST_BYTE + byte for byte in text.encode())


def output(tokens: tuple[int, ...], finish: str | None = None, stop_token: int | None = None) -> Output:
    return Output("r", tokens, finish=finish, stop_token_id=stop_token)  # type: ignore[arg-type]


def texts(rules: TextRules, pieces: list[Output]) -> list[str]:
    stream = TextStream(SimTokenizer(), rules)
    shown: list[str] = []
    for piece in pieces:
        delta = stream.push(piece)
        shown.append(delta.text)
        if delta.finish:
            break
    return shown


def test_characters_appear_whole() -> None:
    shown = texts(TextRules(), [output((token,)) for token in tokens_of(TEXT)])
    assert "".join(shown) == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)


def test_an_unfinished_character_shows_at_the_end_alone() -> None:
    half = tokens_of("a漢")[:-1]
    assert texts(TextRules(), [output(half), output((), "length")]) == ["a", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        pytest.param("hello world", ("wor",), "hello ", id="in the middle"),
        pytest.param("hello world", ("xyz", "lo w", "ello"), "h", id="the earliest of several"),
        pytest.param("abababc", ("ababc",), "ab", id="a beginning inside a beginning"),
        pytest.param("hello wo", ("world",), "hello wo", id="a beginning that is never completed"),
        pytest.param("⛵⛵漢", ("⛵漢",), "⛵", id="several bytes a character"),
        pytest.param("stop", ("stop",), "", id="all of it"),
    ],
)
@pytest.mark.parametrize("width", [1, 3, 100], ids=["token by token", "by threes", "at once"])
def test_a_stop_string_is_never_shown(text: str, stop: tuple[str, ...], shown: str, width: int) -> None:
    tokens = tokens_of(text)
    pieces = [output(tokens[at : at + width]) for at in range(0, len(tokens), width)]
    assert "".join(texts(TextRules(stop), [*pieces, output((), "length")])) == shown


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces = [output((token,)) for token in tokens_of("to world")]
    assert texts(TextRules(("world",)), pieces)[3:] == ["", "", "", "", ""]


def test_a_stop_string_can_be_kept_or_put_off() -> None:
    pieces = [output(tokens_of("a. b. c")), output((), "length")]
    assert "".join(texts(TextRules((".",), include_stop=True), pieces)) == "a."
    one_by_one = [output((token,)) for token in tokens_of("a. b. c")]
    assert "".join(texts(TextRules((".",), min_tokens=3), one_by_one)) == "a. b"


def test_the_token_that_ends_a_text_is_counted_but_not_shown() -> None:
    stream = TextStream(SimTokenizer(), TextRules())
    delta = stream.push(output((*tokens_of("hi"), END), "stop", END))
    assert (delta.text, len(delta.token_ids), delta.stop_reason) == ("hi", 3, END)


def test_tokens_after_a_stop_string_are_dropped() -> None:
    delta = TextStream(SimTokenizer(), TextRules(("b",))).push(output(tokens_of("abc")))
    assert (delta.text, len(delta.token_ids), delta.finish, delta.stop_reason) == ("a", 2, "stop", "b")


@pytest.mark.parametrize(
    ("interval", "sizes"), [(1, [1] * 7), (3, [1, 3, 3]), (4, [1, 4, 2]), (100, [1, 6])], ids=str
)
def test_the_first_message_and_the_last_do_not_wait_for_the_interval(interval: int, sizes: list[int]) -> None:
    stream, buffer = TextStream(SimTokenizer(), TextRules()), DeltaBuffer(interval)
    pieces = [output((token,)) for token in tokens_of("abcdef")] + [output(tokens_of("g"), "length")]
    sent = [delta for piece in pieces if (delta := buffer.add(stream.push(piece))) is not None]
    assert [len(delta.token_ids) for delta in sent] == sizes
    assert "".join(delta.text for delta in sent) == "abcdefg"


@pytest.mark.parametrize("text", ["plain", "a⛵漢b", "👩‍👩‍👧 sea"])
def test_an_offset_is_where_a_tokens_text_begins_though_its_character_takes_several(text: str) -> None:
    offset = TextOffset(SimTokenizer(), True)
    whole = text.encode()
    expected = [len(whole[:at].decode(errors="ignore")) for at in range(len(whole))]
    assert [offset.pass_by(token) for token in tokens_of(text)] == expected


def test_tokens_that_are_not_shown_move_no_offset() -> None:
    offset = TextOffset(SimTokenizer(), True)
    assert [offset.pass_by(token) for token in (*tokens_of("a"), END, *tokens_of("bc"))] == [0, 1, 1, 2]


def byte_level(path: str) -> None:
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    fast.train_from_iterator([TEXT], trainer)
    fast.save(path)


def word_pieces(path: str) -> None:
    fast = Fast(models.BPE(byte_fallback=True, unk_token="<unk>"))
    fast.normalizer = None
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[], show_progress=False)
    fast.train_from_iterator(["the wide sea Ahoy"], trainer)
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted(fast.get_vocab())])}
    fast.model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    fast.save(path)


@pytest.mark.parametrize("make", [byte_level, word_pieces])
def test_streamed_text_equals_the_tokenizers_own(make: object, tmp_path: object) -> None:
    make(f"{tmp_path}/tokenizer.json")  # type: ignore[operator]
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    stream = detokenizer(tokenizer, True)
    assert isinstance(stream, WindowDetokenizer) == (make is word_pieces)
    ids = tokenizer.encode(TEXT, False)
    assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == tokenizer.decode(ids, True)


def test_a_tokenizer_file_that_is_cut_short_is_named(tmp_path: object) -> None:
    byte_level(f"{tmp_path}/tokenizer.json")
    with open(f"{tmp_path}/tokenizer.json", "r+b") as file:
        file.truncate(100)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        HuggingFaceTokenizer(str(tmp_path))


def test_a_template_names_tokens_and_variables() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content | tojson }}{% endfor %}{{ style }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": "<é>"}], variables={"style": "!"}) == '<s>user:"<é>"!'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(
            "{{ raise_exception('roles must alternate') }}", "roles must alternate", id="its own complaint"
        ),
        pytest.param("{{ ''.__class__.__mro__ }}", "unsafe", id="an escape from the sandbox"),
        pytest.param("{{ messages.append(1) }}", "not safely callable|unsafe", id="a change to its input"),
        pytest.param("{% for %}", "cannot be compiled", id="no template"),
        pytest.param("{{ messages[0].content.index('x') }}", "substring not found", id="its own failure"),
    ],
)
def test_a_template_that_fails_says_why(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])

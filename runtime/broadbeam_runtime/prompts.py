"""What a request asks about, as token ids: text, ids and chat messages, checked."""

from __future__ import annotations

from typing import Any

from broadbeam_runtime.api_error import ApiError
from broadbeam_runtime.core import ModelInfo
from broadbeam_runtime.openai_api import ChatRequest, CompletionRequest
from broadbeam_runtime.request_checks import check_ids
from broadbeam_runtime.tokenizer import Tokenizer


def of_completion(
    body: CompletionRequest, tokenizer: Tokenizer, model: ModelInfo
) -> tuple[tuple[int, ...], ...]:
    """`prompt` as token ids: a string, token ids, or a list of either."""
    prompt = body.prompt
    if isinstance(prompt, str):
        items: list[Any] = [prompt]
    elif prompt and all(type(item) is int for item in prompt):
        items = [prompt]
    else:
        items = prompt
    prompts = tuple(_prompt(item, body.add_special_tokens, tokenizer, model) for item in items)
    if not prompts or not all(prompts):
        raise ApiError(400, "prompt is empty", "prompt")
    return prompts


def _prompt(item: Any, add_special_tokens: bool, tokenizer: Tokenizer, model: ModelInfo) -> tuple[int, ...]:
    if isinstance(item, str):
        return tuple(encode(item, add_special_tokens, tokenizer, model, "prompt"))
    if isinstance(item, list) and all(type(token) is int for token in item):
        check_ids(item, model.vocab_size, "prompt")
        return tuple(item)
    raise ApiError(400, "prompt must be a string, a list of token ids, or a list of either", "prompt")


def encode(
    text: str, add_special_tokens: bool, tokenizer: Tokenizer, model: ModelInfo, name: str
) -> list[int]:
    """`text` as token ids. What cannot fit the context is refused before the tokenizer spends about a second
    and 160 MB on each megabyte of it."""
    fewest = len(text) // tokenizer.longest_token
    if fewest > model.max_model_len:
        raise ApiError(
            400,
            f"the prompt has {len(text)} characters, that is {fewest} tokens or more, "
            f"but the model's context is {model.max_model_len} tokens",
            name,
            "context_length_exceeded",
        )
    ids = tokenizer.encode(text, add_special_tokens)
    if ids and max(ids) >= model.vocab_size:
        raise ApiError(
            500, f"the tokenizer made token {max(ids)}, but the model knows {model.vocab_size} tokens"
        )
    return ids


def of_chat(body: ChatRequest, tokenizer: Tokenizer, model: ModelInfo) -> tuple[int, ...]:
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError(
            400, "continue_final_message needs add_generation_prompt to be false", "continue_final_message"
        )
    if body.continue_final_message:
        raise ApiError(400, "continue_final_message is not supported yet", "continue_final_message")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    text = render(tokenizer, body.messages, body.add_generation_prompt, variables)
    # The template writes the special tokens itself.
    ids = encode(text, body.add_special_tokens, tokenizer, model, "messages")
    if not ids:
        raise ApiError(400, "the chat template made an empty prompt of the messages", "messages")
    return tuple(ids)


def render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    variables: dict[str, Any] | None = None,
) -> str:
    if tokenizer.chat is None:
        raise ApiError(400, "this model has no chat template, use /v1/completions", "messages")
    if not messages:
        raise ApiError(400, "messages is empty", "messages")
    reserved = {"messages", "tools", "documents", "add_generation_prompt"} & set(variables or {})
    if reserved:
        raise ApiError(
            400, f"chat_template_kwargs must not set {sorted(reserved)[0]}", "chat_template_kwargs"
        )
    plain = [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return tokenizer.chat.render(plain, add_generation_prompt, variables)


def _plain(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with `content` as one string, which is what chat templates take."""
    if not isinstance(message.get("role"), str):
        raise ApiError(400, f"{where}.role must be a string", "messages")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return {**message, "content": content or ""}
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content must be a string or a list of text parts", "messages")
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(400, f"{where}.content: only parts of type text are supported yet", "messages")
    return {**message, "content": "\n".join(str(text) for text in texts)}

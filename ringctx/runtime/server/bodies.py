"""Bodies: what clients may ask, read strictly.

A field that nobody knows is refused. One that OpenAI has and that would change the answer is refused unless it asks for what is done
anyway; one that changes no answer is ignored.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ringctx.config import GenerationConfig
from ringctx.runtime.server.refusal import Refusal, malformed

IGNORED = {
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
"""Fields that change no answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "frequency_penalty": (0,),
    "presence_penalty": (0,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "echo": (False,), "suffix": ("",), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (), "moderation": (),
}  # fmt: skip
"""Fields that would change the answer, and the values that would not."""
SHARED = {"model", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options"}
CHAT = SHARED | {"messages", "max_completion_tokens", "document"}
COMPLETION = SHARED | {"prompt"}
LEAST_TEMPERATURE, LARGEST_TEMPERATURE, LARGEST_SEED, MOST_STOPS = 0.001, 2.0, 2**63 - 1, 16


@dataclass(frozen=True, kw_only=True)
class Ask:
    """An answer that is wanted: to messages, about a document or not, or after a prompt (text, or tokens)."""

    model: str
    generation: GenerationConfig
    messages: tuple[dict[str, str], ...] = ()
    prompt: str | tuple[int, ...] = ""
    document: str | None = None
    stream: bool = False
    with_usage: bool = False


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A body's fields, null left out, and how to refuse what is wrong with one of them."""

    values: dict[str, Any]

    def take(self, name: str, kind: type, words: str, default: Any = None) -> Any:
        """The field's value, or the default if it is absent. Raises Refusal unless it is of this kind."""
        value = self.values.get(name, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < LARGEST_SEED else math.inf
        if name in self.values and type(value) is not kind:
            raise malformed(f"{name} must be {words}.", name)
        return value

    def between(self, name: str, kind: type, least: float, most: float, default: Any) -> Any:
        """A number from least to most."""
        words = f"a {'whole ' * (kind is int)}number from {least:.12g} to {most:.20g}"
        value = self.take(name, kind, words, default)
        if name in self.values and not least <= value <= most:
            raise malformed(f"{name} must be {words}.", name)
        return value


def parse(data: bytes) -> Fields:
    """The JSON object of a body. Raises Refusal if it is none."""
    try:
        value = json.loads(data, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text that a tokenizer takes
    except (ValueError, RecursionError) as error:
        raise malformed(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise malformed("The body must be a JSON object.", code="invalid_json")
    return Fields(values={name: field for name, field in value.items() if field is not None})


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def check_names(fields: Fields, known: set[str]) -> None:
    """Raises Refusal for a field that nobody knows, or that would change the answer in a way nobody here computes."""
    for name, value in fields.values.items():
        if name in known or name in IGNORED:
            continue
        if name in NEUTRAL:
            if not any(type(value) is type(same) and value == same for same in (*NEUTRAL[name], *map(float, _numbers(NEUTRAL[name])))):
                raise malformed(f"{name} is not supported with this value; leave it out.", name, "unsupported_value")
            continue
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"the fields here are {', '.join(sorted(known))}."
        raise malformed(f"There is no field {name!r}; {advice}", name, "unknown_parameter")


def _numbers(values: tuple[Any, ...]) -> list[int]:
    return [value for value in values if type(value) is int]


def chat(fields: Fields, defaults: GenerationConfig, most_tokens: int) -> Ask:
    """What the body of /v1/chat/completions asks. Raises Refusal (400) with a sentence."""
    check_names(fields, CHAT)
    messages = fields.take("messages", list, "a list of messages")
    if not messages:
        raise malformed("messages must be a list of at least one message.", "messages")
    if "max_tokens" in fields.values and "max_completion_tokens" in fields.values:
        raise malformed("max_tokens and max_completion_tokens say the same; give one of them.", "max_tokens")
    document = fields.take("document", str, "the id of a document")
    return replace(
        _shared(fields, defaults, most_tokens),
        messages=tuple(_message(message, f"messages[{n}]") for n, message in enumerate(messages)),
        document=document,
    )


def completion(fields: Fields, defaults: GenerationConfig, most_tokens: int) -> Ask:
    """What the body of /v1/completions asks. Raises Refusal (400) with a sentence."""
    check_names(fields, COMPLETION)
    prompt = fields.values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        prompt = tuple(prompt)
    if not prompt or not isinstance(prompt, (str, tuple)):
        raise malformed(
            "prompt must be one text, or one list of tokens, and not empty; send several prompts in several requests.", "prompt"
        )
    return replace(_shared(fields, defaults, most_tokens), prompt=prompt)


def _shared(fields: Fields, defaults: GenerationConfig, most_tokens: int) -> Ask:
    model = fields.take("model", str, "the name of a model, as /v1/models lists it")
    if model is None:
        raise malformed("model is missing; give the name that /v1/models lists.", "model")
    name = "max_completion_tokens" if "max_completion_tokens" in fields.values else "max_tokens"
    most = fields.between(name, int, 1, most_tokens, min(defaults.max_new_tokens, most_tokens))
    temperature = fields.between("temperature", float, 0, LARGEST_TEMPERATURE, defaults.temperature)
    if 0 < temperature < LEAST_TEMPERATURE:
        raise malformed(f"temperature must be 0 (the likeliest token) or at least {LEAST_TEMPERATURE}.", "temperature")
    top_p = fields.between("top_p", float, 0, 1, defaults.top_p)
    if not top_p:
        raise malformed("top_p must be more than 0; for the likeliest token set temperature to 0.", "top_p")
    seed = fields.between("seed", int, -LARGEST_SEED, LARGEST_SEED, secrets.randbits(62))
    stream = fields.take("stream", bool, "true or false", False)
    generation = replace(
        defaults, max_new_tokens=most, temperature=temperature, top_p=top_p, seed=seed, stop=_stops(fields) or defaults.stop
    )
    return Ask(model=model, generation=generation, stream=stream, with_usage=_with_usage(fields, stream))


def _with_usage(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", dict, "an object", {})
    if options and not stream:
        raise malformed("stream_options means nothing without stream: true.", "stream_options")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation") or type(value) is not bool:
            raise malformed("stream_options takes include_usage: true or false.", "stream_options")
    return bool(options.get("include_usage", False))


def _stops(fields: Fields) -> tuple[str, ...]:
    stop = fields.values.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(one, str) and one for one in stop):
        raise malformed(f"stop must be a text, or a list of at most {MOST_STOPS} texts, none of them empty.", "stop")
    return tuple(stop)


def _message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise malformed(f"{name} must be an object with a role and a content.", name)
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise malformed(f"{name}.role is {role!r}; possible are system, developer, user, assistant.", name)
    for key, value in message.items():
        if key not in ("role", "content", "name", "refusal", "annotations") and value:
            raise malformed(f"{name}.{key} is not supported; a message has a role and a content.", name, "unsupported_value")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise malformed(f"{name}.content must be a text, or a list of parts of type text.", name)
    return {"role": "system" if role == "developer" else role, "content": content}


def document(fields: Fields) -> str:
    """The text of the body of POST /v1/documents. Raises Refusal (400) with a sentence."""
    check_names(fields, {"text"})
    text = fields.take("text", str, "the document's text")
    if not text or not text.strip():
        raise malformed("text is missing or empty; give the document's text.", "text")
    return str(text)


def unknown_model(asked: str, known: str) -> Refusal:
    """Another model was asked for."""
    return Refusal(404, "model_not_found", f"There is no model {asked!r} here; the model is {known!r}.", param="model")


def unknown_document(asked: str) -> Refusal:
    """A document that is not there, or no longer."""
    return Refusal(404, "document_not_found", f"There is no document {asked!r}; POST its text to /v1/documents first.", param="document")

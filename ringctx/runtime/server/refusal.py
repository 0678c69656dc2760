"""Refusal: a request that is not answered, as a status, a sentence and the error object of OpenAI's interface."""

from __future__ import annotations

from typing import Any

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refusal(Exception):
    """status: of HTTP. code: a word for programs. param: the field of the body it is about. retry: seconds to wait before asking again."""

    def __init__(self, status: int, code: str, sentence: str, *, param: str | None = None, retry: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code, self.param, self.retry = status, code, param, retry

    def json(self) -> dict[str, Any]:
        """The body of the reply."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def malformed(sentence: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A body that cannot be right."""
    return Refusal(400, code, sentence, param=param)

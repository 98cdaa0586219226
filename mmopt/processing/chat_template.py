"""The chat template of a model: messages to the text that it was trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """The text around the messages of a conversation.

    user, assistant: what starts the turn of each role, e.g. "USER: " and "ASSISTANT:".
    separator: between a user message and the assistant's turn.
    end: what closes an answer, e.g. "</s>". To become one token id it must be among the marks of the TextProcessor.
    image: the marker that stands for an image inside a message; image_end: what follows it.
    system: in front of a conversation, but not of what is to be painted.
    strip: space at both ends of a message is left out.
    """

    user: str
    assistant: str
    separator: str
    end: str
    image: str
    image_end: str = ""
    system: str = ""
    strip: bool = False

    def begin(self, content: str) -> str:
        """The beginning of a conversation whose first message begins with content."""
        return self.system + self.user + self._marked(content.lstrip() if self.strip else content)

    def go_on(self, content: str) -> str:
        """The rest of a user's message, and the start of the answer."""
        return self._marked(content.rstrip() if self.strip else content) + self.separator + self.assistant

    def _marked(self, content: str) -> str:
        return content.replace(self.image, self.image + self.image_end) if self.image_end else content

    def render(self, messages: list[dict], answer: bool = True, painting: bool = False) -> str:
        """Return the prompt for messages [{"role": "user" | "assistant", "content": str}, ...].

        answer: end with the start of the assistant's turn, so that a model goes on with the answer; the last message
        must then be the user's. painting: the prompt of a picture, of what is in the messages alone.
        Raises ValueError if roles do not alternate from "user" on, or a message is not of that form.
        """
        if not messages:
            raise ValueError("expected at least one message, found none")
        prompt = "" if painting else self.system
        for i, message in enumerate(messages):
            expected = "user" if i % 2 == 0 else "assistant"
            role, content = message.get("role"), message.get("content")
            if role != expected:
                raise ValueError(f"message {i}: expected the role {expected!r}, found {role!r}")
            if not isinstance(content, str):
                raise ValueError(f"message {i}: expected text as content, found {type(content).__name__}")
            if self.strip:
                content = content.strip()
            if role == "user":
                prompt += self.user + self._marked(content) + self.separator
            else:
                prompt += self.assistant + " " + content + self.end
        if answer:
            if messages[-1]["role"] != "user":
                raise ValueError("expected the last message to be the user's, found 'assistant'")
            prompt += self.assistant
        return prompt

    def to_json(self) -> dict:
        """Return the template as a dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: dict) -> ChatTemplate:
        """Inverse of to_json. Raises ValueError if a field is missing or unknown."""
        try:
            return cls(**d)
        except TypeError as error:
            raise ValueError(f"bad chat template: {error}") from error

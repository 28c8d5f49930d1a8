"""Token ids to text as they come: whole characters only, nothing twice, nothing lost, stop texts held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# what decoders put for bytes that are no character, or not yet one
_INCOMPLETE = "�"


class Detokenizer:
    """Texts of token ids that add up to the text of all of them.

    A token's text may depend on the one before it (a space, the bytes of one character), so each piece is the difference of
    two decodings that begin at the same token, and waits until the last character is whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._begin = 0  # the decodings begin here
        self._told = 0  # tokens whose text was returned

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._new()
        if text.endswith(_INCOMPLETE):
            return ""
        self._begin, self._told = self._told, len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back; incomplete bytes as U+FFFD."""
        text = self._new()
        self._begin = self._told = len(self._ids)
        return text

    def _new(self) -> str:
        before = self._decode(self._ids[self._begin : self._told])
        return self._decode(self._ids[self._begin :])[len(before) :]


class StopTexts:
    """Passes text on up to the first stop text; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What can be passed on."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that a stop text begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)

"""TagTokens: looking up a vocabulary, and the one tokenization of a trace."""

from __future__ import annotations

import pytest

from mvkernels import TagTokens
from mvkernels.grammar import TAGS, Kind
from mvkernels.tags import split_pieces


class WordTokenizer:
    """A duck-typed tokenizer whose tokens are given; text is encoded greedily, longest token first."""

    def __init__(self, *words: str) -> None:
        self.vocabulary = {word: i for i, word in enumerate(words)}
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i].replace("Ġ", " ").replace("Ċ", "\n") for i in ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        text = text.replace(" ", "Ġ").replace("\n", "Ċ")
        out = []
        while text:
            word = max((w for w in self.words if text.startswith(w)), key=len)
            out.append(self.vocabulary[word])
            text = text[len(word) :]
        return out


WORDS = ("a", "b", "1", "2", ".", ":", ":a", "1:", "Ċ", "Ġ", "ĊĊ", "aĊ", "č")


def test_kinds_of_a_vocabulary() -> None:
    tags = TagTokens.from_tokenizer(WordTokenizer(*WORDS, *TAGS))
    names = [tags.kind(i).name for i in range(len(WORDS))]
    assert names == ["TEXT"] * 2 + ["INDEX"] * 3 + ["INDEX_END", "TEXT", "INDEX_END"] + ["SPACE"] * 3 + ["TEXT"] * 2
    assert tags.kind(tags.id(Kind.PATH_END)) is Kind.PATH_END
    assert [tags.ids[i] for i in range(12)] == list(range(len(WORDS), len(WORDS) + 12))
    with pytest.raises(ValueError, match="expected the kind of a control tag, got TEXT"):
        tags.id(Kind.TEXT)


def test_a_tokenizer_without_tags_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"got a tokenizer without <Path> </Conclusion>; `mvkernels add-tags`"):
        TagTokens.from_tokenizer(WordTokenizer(*WORDS, *(t for t in TAGS if t not in ("<Path>", "</Conclusion>"))))


def test_pieces_are_cut_where_the_engine_writes() -> None:
    text = "x\n<Goal>\n<Outline>\n1: a\n</Outline>\n</Goal>\n<Path>\n2.1:b</Path>"
    text += "\n<Conclusion>\n\nend 3: z\n</Conclusion>"
    pieces = split_pieces(text)
    assert "".join(pieces) == text
    assert pieces == [
        *("x\n", "<Goal>", "\n", "<Outline>", "\n1:", " a\n", "</Outline>", "\n", "</Goal>", "\n"),
        *("<Path>", "\n2.1:", "b", "</Path>", "\n", "<Conclusion>", "\n", "\nend 3: z\n", "</Conclusion>"),
    ]


def test_encoding_is_what_the_engine_forces() -> None:
    tags = TagTokens.from_tokenizer(WordTokenizer(*WORDS, *TAGS))
    forced = tags.encode("\n<Path>\n1:")
    assert tags.encode("\n<Path>\n1:ab\n") == forced + tags.encode("ab\n")  # not the token `:a`
    opening = tags.encode("\n<Conclusion>\n")
    assert tags.encode("\n<Conclusion>\n\na") == opening + tags.encode("\na")  # not the token of two newlines
    with pytest.raises(ValueError, match="expected a TagTokens with a tokenizer"):
        TagTokens(ids=tuple(range(12))).encode("a")

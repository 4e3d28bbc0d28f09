"""What a reader finds on a page: its texts, key numbers, charts and tables, read as a browser reads the markup."""

import base64
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

HOSTILE = "</article></title><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;"
_FORBIDDEN = frozenset({"script", "img", "iframe", "link", "base", "object", "embed", "form", "image", "use"})
_BLOCKS = frozenset(
    {"p", "dt", "dd", "div", "h1", "h2", "h3", "figcaption", "summary", "th", "td", "li", "title", "desc"}
)


class _Builder(HTMLParser):
    """The tree of a page whose elements are all closed, except for <meta>."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tree = ElementTree.TreeBuilder()

    def handle_starttag(self, tag, attrs):
        self.tree.start(tag, {key: value or "" for key, value in attrs})
        if tag in ("meta", "wbr"):
            self.tree.end(tag)

    def handle_endtag(self, tag):
        self.tree.end(tag)
        if tag in _BLOCKS:
            self.tree.data("\n")

    def handle_data(self, data):
        self.tree.data(data)


class Seen:
    """A page; reading it checks that it is harmless: no script, the policy, nothing from elsewhere."""

    def __init__(self, path: Path):
        page = path.read_text(encoding="utf-8")
        builder = _Builder()
        builder.feed(page)
        builder.close()
        self.root = builder.tree.close()
        self.size = len(page)
        self.text = words(self.root.find("body"))
        metas = [element.attrib for element in self.root.iter("meta")]
        assert page.startswith("<!doctype html>")
        assert not {element.tag for element in self.root.iter()} & _FORBIDDEN
        assert next(one["content"] for one in metas if "http-equiv" in one).startswith("default-src 'none'; style-src")
        keys = {key for element in self.root.iter() for key in element.keys()}  # noqa: SIM118
        assert not [key for key in keys if key.startswith("on") or key in ("src", "style")]
        self.downloads = {one.get("download"): _content(one.get("href")) for one in self.root.iter("a")}
        assert {one.tag for one in self.root.iter() if one.get("href") is not None} <= {"a"}
        style = words(self.root.find("head/style"))
        assert not any(load in style for load in ("url(", "@import", "//"))

    @property
    def key_numbers(self) -> dict[str, str]:
        return {
            words(one.find("dt")): words(one.find("dd")) for one in self.root.iter("div") if one.find("dt") is not None
        }

    @property
    def charts(self) -> dict[str, str]:
        """Heading of each figure -> its numbers in words."""
        return {words(one.find("h3")): words(one.find("svg[@role='img']/desc")) for one in self.root.iter("figure")}

    @property
    def sections(self) -> list[str]:
        return [words(one) for one in self.root.iter("h2")]

    def table(self, first: str) -> dict[str, list[str]]:
        """The table whose first column has this heading: the name of each row -> its cells."""
        for table in self.root.iter("table"):
            header, *rows = [[words(cell) for cell in row] for row in table.iter("tr")]
            if header[0] == first:
                return {row[0]: row[1:] for row in rows}
        raise KeyError(first)

    def of_class(self, name: str) -> list[ElementTree.Element]:
        return [one for one in self.root.iter() if name in one.get("class", "").split()]


def _content(address: str) -> ElementTree.Element:
    """The SVG file that a download's address holds."""
    kind, _, content = address.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(content, validate=True))


def words(element: ElementTree.Element) -> str:
    """The text inside, with single spaces."""
    return " ".join("".join(element.itertext()).split())

"""A reader of HTML that complains about tags that do not nest."""

from html.parser import HTMLParser


VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use", "rect", "circle", "line"}


class Balanced(HTMLParser):
    """Complains about tags that do not nest, and collects ids and what refers to somewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

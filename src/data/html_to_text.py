"""Plain text out of HTML pages.  python3 - FROM TO LIST < html_to_text.py

LIST names one page a line, relative to FROM; the text of a/b.html goes to TO/a/b.txt. Prints one line a page done.
Scripts, styles and navigation go; paragraphs, lists, tables and preformatted text keep their shape.
"""
import html.parser
import pathlib
import re
import sys

DROPPED = {"script", "style", "nav", "noscript", "template", "svg", "head"}
NAVIGATION = re.compile(r"\b(nav(header|footer|bar|igation)?|sidebar|breadcrumbs?)\b", re.I)
PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "pre", "blockquote", "hr"}
LINES = {"br", "div", "li", "dt", "dd", "tr", "section", "article", "header", "footer", "caption", "form", "address"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "wbr"}


class Text(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts = []
        self.newlines = 2  # at the end of what is written: no text yet counts as a blank line
        self.space = False  # a space is due before the next word
        self.pre = 0
        self.dropped, self.depth = None, 0  # the element that is being dropped, and how many of its name are open

    def write(self, text):
        self.parts.append(text)
        self.newlines = len(text) - len(text.rstrip("\n")) + (self.newlines if not text.strip("\n") else 0)
        self.space = False

    def break_to(self, newlines):
        if self.newlines < newlines:
            self.write("\n" * (newlines - self.newlines))
        self.space = False

    def handle_starttag(self, tag, attributes):
        if self.dropped:
            self.depth += tag == self.dropped
            if (self.dropped, tag) == ("head", "body"):  # a head need not be closed
                self.dropped = None
            return
        names = " ".join(value or "" for key, value in attributes if key in ("class", "role", "id"))
        if tag in DROPPED or (tag not in VOID and tag != "body" and NAVIGATION.search(names)):
            self.dropped, self.depth = tag, 1
            return
        if tag in PARAGRAPHS:
            if self.parts[-1:] not in (["- "], ["    "]):  # the first paragraph of an item stays on its line
                self.break_to(2)
        elif tag in LINES:
            self.break_to(1)
        if tag == "li":
            self.write("- ")
        elif tag == "dd":
            self.write("    ")
        elif tag in ("td", "th") and not self.newlines:
            self.write("  ")
        elif tag == "pre":
            self.pre += 1

    def handle_startendtag(self, tag, attributes):
        if tag in VOID or self.dropped:
            if tag in VOID:
                self.handle_starttag(tag, attributes)
            return
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self.dropped:
            self.depth -= tag == self.dropped
            if self.depth == 0 or tag == "body":  # an element that is never closed ends with the page's body
                self.dropped = None
            return
        if tag == "pre":
            self.pre = max(0, self.pre - 1)
        if tag in PARAGRAPHS:
            self.break_to(2)
        elif tag in LINES:
            self.break_to(1)

    def handle_data(self, data):
        if self.dropped:
            return
        if self.pre:
            if data:
                self.write(data)
            return
        words = data.split()
        if not words:
            self.space = self.space or bool(data)
            return
        if (self.space or data[0].isspace()) and not self.newlines and not self.parts[-1].endswith(" "):
            self.write(" ")
        self.write(" ".join(words))
        self.space = data[-1].isspace()


def decode(raw):
    """UTF-8 where it is valid, whatever the page says of itself; else what it says; else Latin-1."""
    said = re.search(rb"charset=[\"']?([\w-]+)", raw[:2048])
    for name in ("utf-8", said.group(1).decode("ascii") if said else "latin-1"):
        try:
            return raw.decode(name)
        except (UnicodeDecodeError, LookupError):
            continue
    return raw.decode("latin-1")


def to_text(raw):
    parser = Text()
    parser.feed(decode(raw).replace("\r\n", "\n").replace("\0", ""))
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def main(source, target, names):
    for name in pathlib.Path(names).read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        path = pathlib.Path(target, name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_text(pathlib.Path(source, name).read_bytes()), encoding="utf-8", errors="replace")
        print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

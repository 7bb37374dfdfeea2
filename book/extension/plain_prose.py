"""Dress plain Markdown: the prose of a notebook has no directives, roles or labels.

A chapter is written so that it reads well wherever its notebook is opened. In the book,

- `**You will learn**`, `**You need**` and the lists under them are cards, side by side;
  the paragraph that begins with `**Reading**` is the line of facts under them;
- a quote that begins with bold words is a note with these words as its title;
- `*Figure 5.2. …*` under a cell is the caption of what the cell shows, and
  `\\tag{5.3}` in an equation its number; "figure 5.2" and "equation 5.3" lead there;
- "(Su et al. 2021)" and "Su et al. (2021)" lead to the bibliography;
- a term of the glossary leads to its entry where a chapter names it first.

A number that doesn't exist or that exists twice, and a paper that references.bib lacks,
are warnings, and fail the build. Headings, links, code and mathematics are left alone.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from docutils import nodes
from pybtex.backends.plaintext import Backend as PlainText
from pybtex.database import Entry
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode
from sphinx_design.shared import PassthroughTextElement, create_component

CHAPTER = re.compile(r"notebooks/(\d\d)_(\w+)")
CARDS = ("You will learn", "You will see", "You need")
TIPS = ("Predict", "With Google's weights")  # the other notes warn of something
TAG = re.compile(r"\s*\\tag\{(.*?)\}")
CAPTION = re.compile(r"(Figure (\S+)\.)\s+")
NUMBERS = re.compile(
    r"\b(equation|figure)s?\s+\d+\.\d+((,|,? and|,? or| to|–)\s*\d+\.\d+)*",
    re.IGNORECASE,
)
NAMES = r"[A-Z][\w’'-]+(?:\s+et\s+al\.|\s+and\s+[A-Z][\w’'-]+)?"
YEAR = r"(?:19|20)\d\d[a-z]?"
LEFT_ALONE = (
    nodes.FixedTextElement,
    nodes.literal,
    nodes.math,
    nodes.reference,
    nodes.title,
    addnodes.pending_xref,
)

logger = logging.getLogger(__name__)


# What can be named: papers and terms


def paper_labels(entries: Iterable[Entry]) -> dict[str, str]:
    """Each paper's key, and how texts cite it: "Su et al. 2021", or "2021a" where two
    papers have the same names and year."""
    labels = {}
    for entry in entries:
        names = [
            " ".join(map(str, one.rich_prelast_names + one.rich_last_names))
            for one in entry.persons["author"]
        ]
        who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        labels[entry.key] = f"{who} {entry.fields['year']}"
    count = Counter(labels.values())
    letters = {label: iter("abcdefgh") for label in count if count[label] > 1}
    for key, label in sorted(labels.items()):
        labels[key] += next(letters[label]) if label in letters else ""
    return labels


class PaperLabels(BaseLabelStyle):
    def format_labels(self, sorted_entries):
        labels = paper_labels(sorted_entries)
        return [labels[entry.key] for entry in sorted_entries]


class PaperStyle(PlainStyle):
    """Pybtex's plain style, with the labels by which texts cite."""

    default_label_style = PaperLabels


def plural(name: str) -> str:
    if re.search(r"[^aeiou]y$", name):
        return name[:-1] + "ies"
    return name + ("es" if re.search(r"(s|x|ch|sh)$", name) else "s")


def glossary_terms(text: str, chapter: str) -> dict[str, tuple[str, str]]:
    """Each form in which a chapter names a term: the term, and its entry's first name.

    Terms are found in the singular and the plural. Comments above an entry may give
    other forms (`.. forms: held-out, held out`), and say of a word with many meanings
    where it is the term (`.. in: rope, attention`) or isn't (`.. not in: weights`).
    """
    body = text.partition("```{glossary}")[2].partition("\n```")[0]
    terms = {}
    for entry in re.split(r"\n\n(?=\S)", body):
        comments = re.findall(r"^\.\. (.*?): (.*)$", entry, re.MULTILINE)
        said = {key: values.split(", ") for key, values in comments}
        names = re.findall(r"^(?!\.\. )\S.*$", entry, re.MULTILINE)
        forms = {form: name for name in names for form in (name, plural(name))}
        if "forms" in said:
            forms = dict.fromkeys(said["forms"], names[0])
        meant = chapter in said.get("in", [chapter])
        meant = meant and chapter not in said.get("not in", [])
        for form, name in forms.items():
            if meant or " " in form:
                terms[form] = terms[form[0].upper() + form[1:]] = (name, names[0])
    return terms


def any_of(phrases: Iterable[str]) -> str:
    """A pattern for phrases, the longest first, which may go on in the next line."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return "|".join(r"\s+".join(map(re.escape, one.split())) for one in longest_first)


# What is dressed


def ancestors(node: nodes.Node) -> Iterator[nodes.Element]:
    while node := node.parent:
        yield node


def box(name: str, classes: str, *children: nodes.Node) -> nodes.container:
    """A component of sphinx-design, such as a card."""
    return create_component(name, classes.split(), children=children)


def merge_texts(document: nodes.document) -> None:
    """Join the texts of a paragraph's lines, and drop those that are empty."""
    for parent in list(document.findall(nodes.TextElement)):
        merged = []
        for child in parent.children:
            if type(child) is nodes.Text and merged and type(merged[-1]) is nodes.Text:
                child = nodes.Text(merged.pop() + child)
            merged += [child] if child != "" else []
        parent[:] = merged


class PlainProse(SphinxTransform):
    """Find the plain forms in a page, and give them what the book adds."""

    default_priority = 420  # after vlm_book's, before the labels are collected (850)

    def apply(self, **kwargs) -> None:
        if self.env.docname == "book/api":  # docstrings have rules of their own
            return
        merge_texts(self.document)
        self.dress_notes()
        if chapter := CHAPTER.fullmatch(self.env.docname):
            self.number = int(chapter[1])
            self.dress_cards()
            self.dress_captions()
            self.number_equations()
        self.link_papers()
        self.link_numbers()
        if chapter:
            self.link_terms(chapter[2])

    def dress_notes(self) -> None:
        for quote in list(self.document.findall(nodes.block_quote)):
            first = quote.children and quote[0]
            if not (first and first.children and isinstance(first[0], nodes.strong)):
                continue
            title = nodes.title("", "", *first.pop(0).children)
            if isinstance(title[-1], nodes.Text):
                title[-1] = nodes.Text(re.sub(r"\.(?=[\"”]?$)", "", title[-1]))
            if not first.children:
                quote.remove(first)
            elif isinstance(first[0], nodes.Text):
                first[0] = nodes.Text(first[0].lstrip())
            kind = "tip" if title.astext().startswith(TIPS) else "warning"
            note = nodes.admonition("", title, *quote.children, classes=[kind])
            quote.replace_self(note)

    def dress_cards(self) -> None:
        row = None
        for paragraph in list(self.document.findall(nodes.paragraph)):
            if not (paragraph.children and isinstance(paragraph[0], nodes.strong)):
                continue
            parent, title = paragraph.parent, paragraph[0].astext()
            place = parent.index(paragraph)
            if title == "Reading":
                parent[place] = box("div", "chapter-facts", paragraph)
            elif title in CARDS and len(paragraph) == 1 and place + 1 < len(parent):
                if row is None:
                    sizes = "sd-row-cols-1 sd-row-cols-md-2 sd-g-3"
                    row = box("grid-row", f"sd-row {sizes}")
                    grid = "sd-container-fluid chapter-cards"
                    parent.insert(place, box("grid-container", grid, row))
                content = paragraph.next_node(descend=False, siblings=True)
                parent.remove(paragraph)
                parent.remove(content)
                lead = PassthroughTextElement("", title)
                head = box("card-title", "sd-card-title", lead)
                body = box("card-body", "sd-card-body", head, content)
                card = box("card", "sd-card sd-sphinx-override sd-w-100", body)
                row += box("grid-item", "sd-col sd-d-flex-row", card)

    def dress_captions(self) -> None:
        for paragraph in list(self.document.findall(nodes.paragraph)):
            caption = CAPTION.match(paragraph.astext())
            if not caption or not isinstance(paragraph[0], nodes.emphasis):
                continue
            parent, text = paragraph.parent, paragraph[0]
            above = parent[max(parent.index(paragraph) - 1, 0)]
            shown = [
                node
                for node in above.findall(nodes.container)
                if node.get("nb_element") == "mime_bundle"
            ]
            if not shown:
                self.warn(f"the cell above shows nothing: {caption[1]}", paragraph)
                continue
            number = nodes.inline("", caption[1], classes=["caption-number"])
            text[0] = nodes.Text(" " + text[0][caption.end() :])
            figure = nodes.figure()
            shown[-1].replace_self(figure)
            figure += [shown[-1], nodes.caption("", "", number, *text.children)]
            parent.remove(paragraph)
            self.name(figure, "figure", caption[2])

    def number_equations(self) -> None:
        for block in self.document.findall(nodes.math_block):
            if tag := TAG.search(block.astext()):
                block[:] = [nodes.Text(TAG.sub("", block.astext()))]
                block["number"] = tag[1]
                self.name(block, "equation", tag[1])

    def name(self, node: nodes.Element, kind: str, number: str) -> None:
        """Make a node known to Sphinx as "equation 5.3"."""
        if not re.fullmatch(rf"{self.number}\.\d+", number):
            self.warn(f"{kind} {number} stands in chapter {self.number}", node)
        node["names"].append(f"{kind} {number}")
        self.document.note_explicit_target(node, node)

    def link_papers(self) -> None:
        for name in self.config.bibtex_bibfiles:
            self.env.note_dependency(str(Path(self.app.srcdir, name)))
        papers = self.env.get_domain("cite").bibdata.data.entries.values()
        labels = set(paper_labels(papers).values())
        authors = {label.rpartition(" ")[0] for label in labels}

        def link(found: re.Match) -> list[nodes.Node]:
            names = " ".join(found["names"].split())
            label = f"{names} {found['year'] or found['bare_year']}"
            if label in labels:
                return [self.reference(found[0], "citation", label, domain="")]
            if names in authors or found["year"] or found["end"]:
                self.warn(f'references.bib has no "{label}"', found.string.parent)
            return []

        self.replace(
            rf"(?<![\w-])(?P<names>{any_of(authors)}|{NAMES})\s+"
            rf"(?:\((?P<year>{YEAR})\)|(?P<bare_year>{YEAR})\b(?=(?P<end>[;)])?))",
            link,
        )

    def link_numbers(self) -> None:
        def link(found: re.Match) -> list[nodes.Node]:
            linked = []
            for text, number in re.findall(r"(.*?)(\d+\.\d+)", found[0], re.DOTALL):
                target = f"{found[1].lower()} {number}"
                if (
                    linked
                ):  # "figures 5.2" is a link, and so is the number in " and 5.3"
                    linked.append(nodes.Text(text))
                    text = ""
                linked.append(self.reference(text + number, "ref", target))
            return linked

        self.replace(NUMBERS, link)

    def link_terms(self, chapter: str) -> None:
        path = Path(self.app.srcdir, "book", "glossary.md")
        self.env.note_dependency(str(path))
        terms = glossary_terms(path.read_text(encoding="utf-8"), chapter)
        linked = set()
        around = {"promise", "chapter-cards", "chapter-facts"}

        def link(found: re.Match) -> list[nodes.Node]:
            """Only in sentences, not in what frames them."""
            term, entry = terms[" ".join(found[0].split())]
            if entry in linked or any(
                isinstance(node, nodes.caption | nodes.thead)
                or around & set(node["classes"])
                for node in ancestors(found.string)
            ):
                return []
            linked.add(entry)
            return [self.reference(found[0], "term", term)]

        self.replace(rf"(?<![\w-])(?:{any_of(terms)})(?![\w-])", link)

    def replace(
        self, pattern: str | re.Pattern, link: Callable[[re.Match], list[nodes.Node]]
    ) -> None:
        """Put what `link` makes of a match into the text, where text is only text."""
        for text in list(self.document.findall(nodes.Text)):
            if any(
                isinstance(node, LEFT_ALONE) or "caption-number" in node["classes"]
                for node in ancestors(text)
            ):
                continue
            new, start = [], 0
            for found in re.finditer(pattern, text):
                if made := link(found):
                    new += [nodes.Text(text[start : found.start()]), *made]
                    start = found.end()
            if new:
                text.parent.replace(text, [*new, nodes.Text(text[start:])])

    def reference(
        self, text: str, kind: str, target: str, domain: str = "std"
    ) -> addnodes.pending_xref:
        """A reference for Sphinx to resolve; it warns where there is no target."""
        return addnodes.pending_xref(
            "",
            nodes.inline("", text, classes=["xref", "std", f"std-{kind}"]),
            refdomain=domain,
            reftype=kind,
            reftarget=target,
            refdoc=self.env.docname,
            refexplicit=True,
            refwarn=True,
        )

    def warn(self, message: str, node: nodes.Node) -> None:
        logger.warning(message, location=node, type="plain")


def find_paper(app: Sphinx, env, node: nodes.Element, text: nodes.Node):
    """Resolve a citation, once the bibliography has been read."""
    for paper in env.get_domain("cite").citations:
        label = paper.formatted_entry.label
        if (node["reftype"], node["reftarget"]) == ("citation", label):
            title = paper.formatted_entry.text.render(PlainText())
            page = paper.bibliography_key.docname
            here = node["refdoc"]
            return make_refnode(app.builder, here, page, paper.citation_id, text, title)
    return None


def setup(app: Sphinx) -> dict:
    register_plugin("pybtex.style.formatting", "paper_labels", PaperStyle)
    app.add_transform(PlainProse)
    app.connect("missing-reference", find_paper)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

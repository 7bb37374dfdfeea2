"""What the book makes of plain Markdown: a book of three pages, built anew."""

import io
import sys
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("sphinx_design", reason="the book's libraries aren't installed")

from bs4 import BeautifulSoup
from docutils import nodes
from docutils.frontend import get_default_settings
from docutils.utils import new_document
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pybtex.database import parse_string
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "book" / "extension"))

from plain_prose import glossary_terms, paper_labels
from vlm_book import FoldUnderTabs, ReadableCells

PAPERS = """
@article{one, author={Shazeer, Noam}, year=2019, title={A}, journal={J}}
@article{two, author={Press, Ofir and Wolf, Lior}, year=2017, title={B}, journal={J}}
@article{many, author={van den Oord, A and B, C and D, E}, year=2017, title={C},
  journal={J}}
@article{team, author={{Gemma Team}}, year=2024, title={D}, journal={J}}
@article{team2, author={{Gemma Team}}, year=2024, title={E}, journal={J}}
"""
GLOSSARY = """# Glossary

```{glossary}

RoPE
rotary position embedding
    One way to say where a {term}`query` stands.

.. in: rope
query
    What a token asks for.

image token
    A place.

seat
    A word that only frames the chapter.

.. forms: held-out, held out
held-out
    Kept away.

.. not in: rope
key
key vector
    What a token is found by.
```
"""
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
    "RU5ErkJggg=="
)


def plot() -> nbformat.NotebookNode:
    output = new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})
    metadata = {"mystnb": {"image": {"alt": "a dot"}}}
    return new_code_cell("plt.show()", outputs=[output], metadata=metadata)


def build(folder: Path, chapters: dict[str, list]) -> tuple[Path, list[str]]:
    """Build a small book, from cells or their Markdown: its HTML, and its warnings."""
    names = [f"notebooks/{name}" for name in chapters]
    pages = "\n".join([*names, "book/glossary", "book/bibliography"])
    files = {
        "index.md": f"# Book\n\n```{{toctree}}\n{pages}\n```\n",
        "book/glossary.md": GLOSSARY,
        "book/bibliography.md": "# Bibliography\n\n```{bibliography}\n:all:\n```\n",
        "references.bib": PAPERS,
    }
    for name, cells in chapters.items():
        cells = [new_markdown_cell(c) if isinstance(c, str) else c for c in cells]
        notebook = new_notebook(cells=cells)
        notebook.metadata["language_info"] = {"name": "python"}
        files[f"notebooks/{name}.ipynb"] = nbformat.writes(notebook)
    for name, text in files.items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    extensions = ["myst_nb", "sphinx_design", "sphinxcontrib.bibtex", "plain_prose"]
    settings = {
        "extensions": extensions,
        "myst_enable_extensions": ["colon_fence", "dollarmath"],
        "bibtex_bibfiles": ["references.bib"],
        "bibtex_default_style": "paper_labels",
        "nb_execution_mode": "off",
        "nitpicky": True,
        "html_theme": "basic",
    }
    warnings = io.StringIO()
    places = [folder / "source", None, folder / "html", folder / "doctrees"]
    with docutils_namespace():
        Sphinx(*places, "html", settings, status=None, warning=warnings).build()
    return folder / "html", warnings.getvalue().splitlines()


ROPE = [
    "# RoPE\n\n> A promise.",
    """**You will learn**

- to ask a query and take a seat

**You need**

- chapter 4

**Reading** 20 minutes · **Runs on** any CPU""",
    """## About the query

A `query` and $query$, [a query](06_attention.ipynb), [a key vector](https://example.org),
then a query, Queries, an image
token and RoPE; what is held out. A key, and a key vector.

| seat |
|---|
| `RoPE` |

> **Predict the shape.** Of what?

> **The usual misreading: "RoPE".** It *adds*.
>
> It doesn't.

> A quote.""",
    plot(),
    "*Figure 5.1. A `dot` in its seat, after Shazeer (2019).*\n\nFigures 5.1 and 6.1.",
    """Press and Wolf (2017) (Shazeer 2019; van den
Oord et al. 2017), the Gemma Team (2024b), in May 2024, `Shazeer (2019)`.

$$
x^2 \\\\
y \\tag{5.1}
$$

Equation 5.1, `equation 5.1`, equation 6.1.""",
]
ATTENTION = [
    "# Attention\n\nA query.",
    plot(),
    "*Figure 6.1. Another.*",
    "$$\na \\tag{6.1}\n$$\n\nIn figure 5.1.",
]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    html, warnings = build(folder, {"05_rope": ROPE, "06_attention": ATTENTION})
    assert not warnings
    return html


def soup(book: Path, page: str) -> BeautifulSoup:
    text = (book / page).read_text(encoding="utf-8")
    return BeautifulSoup(text, "html.parser").select_one("div.body")


@pytest.fixture(scope="module")
def rope(book):
    return soup(book, "notebooks/05_rope.html")


def links(page: BeautifulSoup, pattern: str) -> list[tuple[str, str]]:
    """Each link whose address matches: its text and its address."""
    found = page.select(f"a.reference[href*='{pattern}']")
    return [(" ".join(a.get_text().split()), a["href"]) for a in found]


def test_cards_stand_side_by_side_with_their_facts(rope):
    titles = [title.get_text().strip() for title in rope.select(".sd-card-title")]
    assert titles == ["You will learn", "You need"]
    [row] = rope.select(".chapter-cards .sd-row")
    assert len(row.select(".sd-card ul")) == 2
    assert rope.select_one(".chapter-facts").get_text().startswith("\nReading 20")


def test_a_quote_that_begins_bold_is_a_note(rope):
    tip, warning = rope.select("div.admonition")
    assert "tip" in tip["class"] and "warning" in warning["class"]
    assert tip.select_one(".admonition-title").get_text() == "Predict the shape"
    title = warning.select_one(".admonition-title").get_text()
    assert title == "The usual misreading: “RoPE”"
    assert [p.get_text() for p in warning.select("p")[1:]] == [
        "It adds.",
        "It doesn’t.",
    ]
    assert len(rope.select("blockquote")) == 2  # the promise, and the quote


def test_a_caption_joins_its_figure(rope):
    figure = rope.select_one("figure#figure-5-1")
    assert figure.img["alt"] == "a dot"
    caption = figure.figcaption
    assert caption.get_text().startswith("\nFigure 5.1. A dot in its seat")
    assert caption.select_one(".caption-number").get_text() == "Figure 5.1."
    assert not caption.select(".caption-number a")
    assert len(rope.select("p > em")) == 1  # the caption stands nowhere else


def test_an_equation_shows_the_number_that_is_written(rope):
    equation = rope.select_one("div.math#equation-5-1")
    assert equation.select_one(".eqno").get_text().startswith("(5.1)")
    assert "tag" not in equation.get_text()


def test_numbers_in_the_text_are_links(book, rope):
    assert links(rope, "#figure-") == [
        ("Figures 5.1", "#figure-5-1"),
        ("6.1", "06_attention.html#figure-6-1"),
    ]
    assert links(rope, "#equation-") == [
        ("Equation 5.1", "#equation-5-1"),
        ("equation 6.1", "06_attention.html#equation-6-1"),
    ]
    other = soup(book, "notebooks/06_attention.html")
    assert links(other, "#figure-") == [("figure 5.1", "05_rope.html#figure-5-1")]


def test_papers_are_links_into_the_bibliography(book, rope):
    page = soup(book, "book/bibliography.html")
    entries = {
        one["id"]: one.select_one(".label").get_text()
        for one in page.select("div.citation")
    }
    found = [
        (text, entries[address.partition("#")[2]])
        for text, address in links(rope, "bibliography.html#")
    ]
    assert found == [
        ("Shazeer (2019)", "[Shazeer 2019]"),
        ("Press and Wolf (2017)", "[Press and Wolf 2017]"),
        ("Shazeer 2019", "[Shazeer 2019]"),
        ("van den Oord et al. 2017", "[van den Oord et al. 2017]"),
        ("Gemma Team (2024b)", "[Gemma Team 2024b]"),
    ]
    assert "Noam Shazeer" in rope.select_one("a[href*='bibliography']")["title"]


def test_terms_are_links_where_a_sentence_names_them_first(book, rope):
    assert links(rope, "glossary.html#term-") == [
        ("query", "../book/glossary.html#term-query"),
        ("image token", "../book/glossary.html#term-image-token"),
        ("RoPE", "../book/glossary.html#term-RoPE"),
        ("held out", "../book/glossary.html#term-held-out"),
        ("key vector", "../book/glossary.html#term-key-vector"),
    ]
    assert not links(soup(book, "notebooks/06_attention.html"), "glossary")


def test_what_is_unknown_is_a_warning(tmp_path):
    wrong = [
        "# Wrong\n\nSee equation 5.7, and figure 5.8.",
        "$$\na \\tag{5.1}\n$$",
        "$$\nb \\tag{5.1}\n$$",
        "$$\nc \\tag{6.2}\n$$",
        "*Figure 5.9. Of nothing.*",
        "Shazeer (2020), Shazeer 2021, (Jones et al. 1999), (Noone 2001).",
        "By the Gemma Team (2024).",
    ]
    _, warnings = build(tmp_path, {"05_rope": wrong, "06_attention": ATTENTION})
    expected = [
        "undefined label: 'equation 5.7'",
        "undefined label: 'figure 5.8'",
        'Duplicate explicit target name: "equation 5.1"',
        "equation 6.2 stands in chapter 5",
        "the cell above shows nothing: Figure 5.9.",
        "undefined label: 'figure 5.9'",
        'references.bib has no "Shazeer 2020"',
        'references.bib has no "Shazeer 2021"',
        'references.bib has no "Jones et al. 1999"',
        'references.bib has no "Noone 2001"',
        'references.bib has no "Gemma Team 2024"',
        "undefined label: 'figure 5.1'",  # chapter 6 names it, and it is gone
    ]
    for message in expected:
        assert any(message in line for line in warnings), message
    assert len(warnings) == len(expected), "\n".join(warnings)


def test_papers_of_the_same_names_and_year_have_letters():
    labels = paper_labels(parse_string(PAPERS, "bibtex").entries.values())
    assert labels == {
        "one": "Shazeer 2019",
        "two": "Press and Wolf 2017",
        "many": "van den Oord et al. 2017",
        "team": "Gemma Team 2024a",
        "team2": "Gemma Team 2024b",
    }


def test_the_glossary_says_how_and_where_a_term_is_named():
    rope = glossary_terms(GLOSSARY, "rope")
    assert rope["queries"] == rope["Query"] == ("query", "query")
    assert rope["rotary position embeddings"] == ("rotary position embedding", "RoPE")
    assert rope["held out"] == ("held-out", "held-out") and "held-outs" not in rope
    assert "key" not in rope and "key vectors" in rope
    elsewhere = glossary_terms(GLOSSARY, "attention")
    assert "key" in elsewhere and "query" not in elsewhere


def exported_cell(module: str, code: str, folded: bool = True) -> nodes.container:
    block = nodes.literal_block(code, code)
    source = nodes.container("", block, nb_element="cell_code_source")
    tab = nodes.paragraph("", f"vlm/{module}.py")
    cell = nodes.container("", tab, source, nb_element="cell_code")
    cell["classes"].append("exported")
    if folded:
        cell.update_all_atts(
            {"hide_mode": "input", "prompt_show": "", "prompt_hide": ""}
        )
    return cell


def test_folded_cells_of_one_module_in_a_row_are_one_fold():
    page = new_document("page", get_default_settings())
    page += [exported_cell("hub", "a = 1"), exported_cell("hub", "b = 2")]
    page += [exported_cell("hub", "c = 3"), exported_cell("lora", "d = 4")]
    page += [nodes.paragraph("", "Text."), exported_cell("lora", "e = 5")]
    page += [exported_cell("lora", "f = 6", folded=False)]
    FoldUnderTabs(page).run()
    cells = [cell for cell in page if "exported" in cell["classes"]]
    codes = [next(cell.findall(nodes.literal_block)).astext() for cell in cells]
    assert codes == ["a = 1\n\n\nb = 2\n\n\nc = 3", "d = 4", "e = 5", "f = 6"]
    assert [cell[0].astext() for cell in cells][:2] == ["vlm/hub.py", "vlm/lora.py"]
    folds = [type(cell[1]).__name__ == "HideCodeCellNode" for cell in cells]
    assert folds == [True, True, True, False]


@pytest.mark.parametrize(
    ("directive", "module"),
    [
        ("export", "scenes"),
        ("exporti", "scenes"),
        ("exporti backgrounds", "backgrounds"),
    ],
)
def test_a_tab_names_the_module_that_a_cell_goes_to(directive, module):
    block = nodes.literal_block("", f"#| {directive}\na = 1")
    source = nodes.container("", block, nb_element="cell_code_source")
    cell = nodes.container("", source, nb_element="cell_code")
    reader = ReadableCells(new_document("page", get_default_settings()))
    reader.modules = ["scenes", "backgrounds"]
    reader.tidy(cell)
    assert [part.astext() for part in cell] == [f"vlm/{module}.py", "a = 1"]

"""What the rendered book adds to the notebooks, without touching them.

- `#|` lines (nbdev's directives) are stripped; a cell that has nothing else goes away.
- `#| default_exp rope` becomes a badge that names the modules that the chapter builds,
  and exported cells, folded ones too, get a tab with the file's name. Both link to the
  API page. Folded cells of one module in a row become one.
- Chapter numbers come from file names: `05_rope.ipynb` is chapter 5.
- The API page lists every module that a notebook exports, in the order of the book.
- Scripts and styles come from `book/`, so that no page asks the network for anything.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from myst_nb.sphinx_ import HideInputCells
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

BOOK = Path(__file__).resolve().parent.parent
ROOT = BOOK.parent
DIRECTIVE = re.compile(r"^#\|[ \t]*(\w+)[ \t]*(.*?)[ \t]*$", re.MULTILINE)
CHAPTER = re.compile(r"^notebooks/(\d\d)_(\w+)$")
ABSENT = ("sphinx_thebe", "sphinx_comments")

logger = logging.getLogger(__name__)


def api_link(module: str) -> addnodes.pending_xref:
    """A module's file name, as a reference to the module's section of the API page."""
    return addnodes.pending_xref(
        "",
        nodes.inline("", f"vlm/{module}.py", classes=["std", "std-ref"]),
        refdomain="std",
        reftype="ref",
        reftarget=f"api-{module}",
        refexplicit=True,
        refwarn=True,
    )


def built_modules(notebook: Path) -> list[str]:
    """The modules that a notebook exports: the chapter's own, then its helpers."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = DIRECTIVE.findall("\n".join("".join(c["source"]) for c in cells))
    names = [name for word, name in found if word == "default_exp"]
    names += [name for word, name in found if word == "export" and name]
    return [n for n in dict.fromkeys(names) if (ROOT / "vlm" / f"{n}.py").exists()]


class ReadableCells(SphinxTransform):
    """Strip `#|` lines, drop cells that were only those, and say what is exported."""

    default_priority = 400

    def apply(self, **kwargs) -> None:
        chapter = CHAPTER.match(self.env.docname)
        if not chapter:
            return
        self.modules = built_modules(ROOT / f"{self.env.docname}.ipynb")
        cells = [
            node
            for node in self.document.findall(nodes.container)
            if node.get("nb_element") == "cell_code"
        ]
        for cell in cells:
            self.tidy(cell)

    def tidy(self, cell: nodes.container) -> None:
        sources = [
            block
            for part in cell.children
            if isinstance(part, nodes.container)
            and part.get("nb_element") == "cell_code_source"
            for block in part.findall(nodes.literal_block)
        ]
        if not sources:
            return
        block = sources[0]
        text = block.astext()
        found = dict(DIRECTIVE.findall(text))
        if not found:
            return
        code = DIRECTIVE.sub("", text).strip("\n")
        if "default_exp" in found:
            badge = nodes.paragraph("", classes=["builds-badge"])
            badge += nodes.inline("", "This chapter builds ")
            for number, module in enumerate(self.modules):
                badge += nodes.inline("", ", " if number else "")
                badge += api_link(module)
            cell.replace_self(badge)
        elif not code:
            cell.parent.remove(cell)
        else:
            block.rawsource = code
            block.children = [nodes.Text(code)]
            helpers = [found[word] for word in ("export", "exporti") if word in found]
            if helpers:
                cell["classes"].append("exported")
                tab = nodes.paragraph("", classes=["export-tab"])
                tab += api_link(helpers[0] or self.modules[0])
                cell.insert(0, tab)


class FoldUnderTabs(HideInputCells):
    """Fold exported cells too: under a tab, MyST-NB doesn't see that they have code.

    Folded cells of one module that follow each other become one fold.
    """

    default_priority = HideInputCells.default_priority + 1

    def run(self, **kwargs) -> None:
        cells: list[nodes.container] = []
        for cell in list(self.document.findall(nodes.container)):
            if "exported" not in cell["classes"]:
                continue
            if cells and self.belong_together(cells[-1], cell):
                block, more = (one[1][0] for one in (cells[-1], cell))
                block.rawsource += f"\n\n\n{more.rawsource}"
                block[:] = [nodes.Text(block.rawsource)]
                cell.parent.remove(cell)
            else:
                cells.append(cell)
        tabs = [cell.children.pop(0) for cell in cells]
        super().run(**kwargs)
        for cell, tab in zip(cells, tabs, strict=True):
            cell.insert(0, tab)

    @staticmethod
    def belong_together(first: nodes.container, second: nodes.container) -> bool:
        """Whether nothing but a fold parts two cells: a tab and code, the same tab."""
        return (
            first.next_node(descend=False, siblings=True) is second
            and all(
                c.get("hide_mode") == "input" and len(c) == 2 for c in (first, second)
            )
            and first[0].astext() == second[0].astext()
        )


class ChapterNumber(SphinxTransform):
    """Put the number from the file's name before a chapter's title, and its promise."""

    default_priority = 410

    def apply(self, **kwargs) -> None:
        chapter = CHAPTER.match(self.env.docname)
        title = next(self.document.findall(nodes.title), None)
        if not chapter or title is None:
            return
        number = nodes.inline("", str(int(chapter[1])), classes=["chapter-number"])
        title.insert(0, [number, nodes.Text("\u2002")])
        quote = next(self.document.findall(nodes.block_quote), None)
        if quote is not None and quote.parent is title.parent:
            quote["classes"].append("promise")


def exported_modules() -> list[tuple[str, str, str]]:
    """Every module that a chapter builds: (chapter, name, chapter's title)."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells]
        title = next((s.splitlines()[0][2:] for s in sources if s.startswith("# ")), "")
        found += [(path.stem, name, title) for name in built_modules(path)]
    return found


def fill_api_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Write a section for each module into the API page as it is read."""
    if docname != "book/api":
        return
    sections = [source[0]]
    for stem, name, title in exported_modules():
        app.env.note_dependency(str(ROOT / "notebooks" / f"{stem}.ipynb"))
        sections.append(
            f"(api-{name})=\n## vlm.{name}\n\n"
            f"Chapter {int(stem[:2])}, [{title}](../notebooks/{stem}.ipynb).\n\n"
            f"```{{eval-rst}}\n.. automodule:: vlm.{name}\n   :members:\n```\n"
        )
    source[0] = "\n".join(sections)


def tidy_docstring(app, what, name, obj, options, lines) -> None:
    """The API page says where a module is built; its docstring needn't say so again."""
    if what == "module":
        lines[:] = [
            line for line in lines if not line.startswith("Built in notebooks/")
        ]


def plain_signature(app, what, name, obj, options, signature, returns):
    """Leave only the names in signatures: `jaxtyping.Float[Tensor, "B T"]` is long."""
    clean = [
        re.sub(
            r"\b(?:jaxtyping|torch|pathlib|collections\.abc)\.", "", part or ""
        ).replace("<factory>", "...")  # what isn't Python can't be parsed and linked
        for part in (signature, returns)
    ]
    return clean[0] or None, clean[1] or None


def add_files(app: Sphinx, config) -> None:
    """Serve `book/vendor` and `book/style` (not through `_static`, where Jupyter Book
    would load every script on every page)."""
    config.html_static_path += [str(BOOK / "vendor"), str(BOOK / "style")]
    config.mathjax_path = "mathjax/tex-svg.js"
    config.mathjax3_config = {
        "options": {"enableMenu": False},
        "svg": {"fontCache": "global"},
    }
    config.nb_ipywidgets_js = {"widgets/mathjax-shim.js": {}, "widgets/embed.js": {}}
    address = config.html_theme_options.get("repository_url")
    config.html_theme_options["use_repository_button"] = bool(address)
    if not address:
        config.html_theme_options.pop("repository_url", None)
        config.html_theme_options.pop("launch_buttons", None)


def empty_icon_script(app: Sphinx, exception: Exception | None) -> None:
    """The theme has its icons as a font, and again as a script of 1.5 MB that holds up
    the first paint."""
    for path in Path(app.outdir).glob("_static/vendor/fontawesome/*/js/all.min.js"):
        path.write_text("")


def drop_absent_extensions(app: Sphinx) -> None:
    """Unhook extensions of Jupyter Book's that fetch scripts from elsewhere."""
    for name, listeners in app.events.listeners.items():
        app.events.listeners[name] = [
            one for one in listeners if one.handler.__module__ not in ABSENT
        ]
    app.registry.css_files[:] = [
        (name, attributes)
        for name, attributes in app.registry.css_files
        if name != "sphinx-thebe.css"
    ]


def setup(app: Sphinx) -> dict:
    drop_absent_extensions(app)
    app.connect("config-inited", add_files, priority=100)
    app.connect("source-read", fill_api_page)
    app.connect("autodoc-process-docstring", tidy_docstring)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("build-finished", empty_icon_script)
    app.add_transform(ReadableCells)
    app.add_transform(ChapterNumber)
    app.add_post_transform(FoldUnderTabs)
    app.add_css_file("vlm.css", priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

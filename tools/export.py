"""Write vlm/*.py from the notebooks, as modules that read as if typed by hand.

    python tools/export.py                            every notebook
    python tools/export.py notebooks/05_rope.ipynb    just this one
    python tools/export.py --check                    write nothing, fail if stale

nbdev finds the cells (`#| default_exp rope`, `#| export`, and `#| export packing` for a
small module beside the chapter's own); the `HandWritten` maker below decides how the
module looks: a docstring made of a line that says what it is (a string that begins its
first cell, or the chapter's promise, the `> ` line under its title) and of where it
comes from, one block of imports, then the code, all of it through ruff. A name without
an underscore is public, so there is no `__all__`. A module that defines a function
called `main` ends in the two lines that make `python -m` run it (a notebook can't hold
those: there, `__name__` is always `"__main__"`).
"""

import argparse
import ast
import difflib
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

from nbdev.export import nb_export
from nbdev.maker import ModuleMaker

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PACKAGE = ROOT / "vlm"
HAND_WRITTEN = {"__init__.py"}
WIDTH = 88


class ExportError(Exception):
    """A notebook that can't become a module; the message says which cell, and why."""


def ruff(arguments: list[str], source: str, filename: Path) -> str:
    """Pass source through one ruff command, under the project's own settings."""
    command = [sys.executable, "-m", "ruff", *arguments]
    command += ["--stdin-filename", str(filename), "-"]
    done = subprocess.run(
        command, input=source, capture_output=True, cwd=ROOT, encoding="utf-8"
    )
    if done.returncode:
        raise ExportError(f"ruff can't read {filename.name}:\n{done.stderr}")
    return done.stdout


def is_import(node: ast.stmt) -> bool:
    """Whether a statement belongs to the import block, `if TYPE_CHECKING:` included."""
    if isinstance(node, ast.If):
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
        return name == "TYPE_CHECKING" and all(map(is_import, node.body))
    return isinstance(node, ast.Import | ast.ImportFrom)


def is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def with_relative_imports(source: str, tree: ast.Module) -> str:
    """Turn `from vlm.rope import …` into `from .rope import …`, at any depth."""
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == "vlm" for alias in node.names):
                raise ExportError(
                    "write `from vlm.topic import name`, not `import vlm.topic`"
                )
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ExportError(
                "write `from vlm.topic import name`: a relative import works in the "
                "module but not in the notebook"
            )
        elif isinstance(node, ast.ImportFrom) and node.module == "vlm":
            raise ExportError(
                "exported code imports from the chapter that builds the name: "
                "`from vlm.topic import name`, not `from vlm import name`"
            )
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("vlm."):
            line = lines[node.lineno - 1]
            before, after = line[: node.col_offset], line[node.col_offset :]
            lines[node.lineno - 1] = before + re.sub(r"^from\s+vlm\.", "from .", after)
    return "\n".join(lines)


def take_imports(source: str) -> tuple[dict[str, list[str]], str]:
    """Split a cell into its imports, by place in the module, and the other code."""
    lines = source.splitlines()
    imports, taken = {"future": [], "plain": [], "typing": []}, set()
    for node in ast.parse(source).body:
        if is_import(node):
            span = range(node.lineno - 1, node.end_lineno)
            place = "typing" if isinstance(node, ast.If) else "plain"
            imports["future" if is_future(node) else place] += [
                "\n".join(lines[i] for i in span)
            ]
            taken.update(span)
    rest = "\n".join(line for i, line in enumerate(lines) if i not in taken)
    return imports, rest.strip("\n")


def promise(title_cell: str, notebook: str) -> str:
    """The one `> ` line under a chapter's title."""
    found = [
        line[2:].strip() for line in title_cell.splitlines() if line.startswith("> ")
    ]
    if len(found) != 1:
        raise ExportError(
            f"{notebook}: the cell of the title needs exactly one line that starts "
            "with '> ' (the chapter's promise, which becomes the module's docstring); "
            f"it has {len(found)}"
        )
    return found[0]


def take_docstring(source: str) -> tuple[str | None, str]:
    """Split a cell into the string that it begins with, if any, and the other code."""
    body = ast.parse(source).body
    if not body or not isinstance(body[0], ast.Expr):
        return None, source
    text = getattr(body[0].value, "value", None)
    if not isinstance(text, str):
        return None, source
    return text, "\n".join(source.splitlines()[body[0].end_lineno :])


def docstring(summary: str, notebook: str) -> str:
    """The module's docstring: what it does, and where to read and edit it."""
    source = f"Built in notebooks/{notebook}: edit it there, then run `make export`."
    body = textwrap.fill(summary, WIDTH - 3, break_on_hyphens=False)
    raw = "r" if "\\" in summary else ""
    return f'{raw}"""{body}\n\n{source}\n"""'


class HandWritten(ModuleMaker):
    """nbdev's maker, but what it makes has no markers and one block of imports."""

    results: dict[Path, str] = {}

    def __init__(self, *args, is_new: bool, **options):
        super().__init__(*args, is_new=True, **options)  # its file may not exist yet
        self.is_new = is_new

    def make(self, cells, all_cells=None, lib_path=None):
        notebook = Path(self.nb_path).name
        topic = Path(self.nb_path).stem.partition("_")[2]
        if self.is_new and self.name != topic:
            raise ExportError(
                f"{notebook} says `#| default_exp {self.name}`, but a chapter's module "
                f"has the chapter's name: `#| default_exp {topic}`"
            )
        title = next((c.source for c in cells if c.cell_type == "markdown"), "")
        imports, code = {"future": [], "plain": [], "typing": []}, []
        summary = None
        for cell in (c for c in cells if c.cell_type == "code"):
            try:
                said, source = take_docstring(cell.source)
                summary = summary or said
                relative = with_relative_imports(source, ast.parse(source))
            except SyntaxError as error:
                raise ExportError(
                    f"{notebook}: line {error.lineno} of cell {cell.get('id')} doesn't "
                    f"parse ({error.msg}). Exported cells are plain Python"
                ) from None
            except ExportError as error:
                raise ExportError(
                    f"{notebook}, cell {cell.get('id')}: {error}"
                ) from None
            found, rest = take_imports(relative)
            for place, statements in found.items():
                imports[place] += statements
            if rest:
                code.append(rest)
        if summary is None and not self.is_new:
            raise ExportError(
                f"{notebook}: the first cell that goes to {self.name} must begin with "
                "a string that says what the module is"
            )
        parts = [docstring(summary or promise(title, notebook), notebook)]
        parts += ["\n".join(dict.fromkeys(block)) for block in imports.values()]
        parts += ["\n\n\n".join(code)]
        if any(re.search(r"^def main\(", block, re.MULTILINE) for block in code):
            parts += ['if __name__ == "__main__":\n    raise SystemExit(main())']
        source = "\n\n".join(part for part in parts if part) + "\n"
        # Sort the imports, drop those that only the notebook's other cells use.
        fixes = ["check", "--fix-only", "--exit-zero", "--quiet", "--select", "I,F401"]
        source = ruff(fixes, source, self.fname)
        self.results[self.fname] = ruff(["format", "--quiet"], source, self.fname)


def render(notebooks: list[Path]) -> dict[Path, str]:
    """What each module should hold, by its path. Writes nothing."""
    HandWritten.results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for notebook in notebooks:
            try:
                nb_export(notebook, lib_path=PACKAGE, mod_maker=HandWritten)
            except UserWarning:
                raise ExportError(
                    f"{notebook.name} exports cells but not where to: its first "
                    "code cell should be `#| default_exp topic`"
                ) from None
    return HandWritten.results


def orphans(modules: dict[Path, str]) -> list[Path]:
    """Modules of the package that no notebook builds and that nobody wrote by hand."""
    return [
        path
        for path in sorted(PACKAGE.glob("*.py"))
        if path.name not in HAND_WRITTEN and path not in modules
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if stale"
    )
    options = parser.parse_args()
    everything = not options.notebooks
    paths = [path.resolve() for path in options.notebooks]
    try:
        modules = render(paths or sorted(NOTEBOOKS.glob("[0-9]*.ipynb")))
    except (ExportError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    problems = 0
    for path, wanted in modules.items():
        name = path.relative_to(ROOT)
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found == wanted:
            continue
        if options.check:
            problems += 1
            print(f"{name} is stale: run `make export`", file=sys.stderr)
            old, new = found.splitlines(), wanted.splitlines()
            diff = difflib.unified_diff(
                old, new, "in the tree", "exported", n=1, lineterm=""
            )
            print(*list(diff)[:20], sep="\n", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted, encoding="utf-8", newline="\n")
            print(f"wrote {name}")
    for path in orphans(modules) if everything else []:
        problems += options.check
        print(
            f"{path.relative_to(ROOT)} is built by no notebook: delete it, or give it "
            "a chapter",
            file=sys.stderr,
        )
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

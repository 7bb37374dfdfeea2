"""Draw vlm/assets/examples/scene.png, the picture that `make demo` asks about.

    python tools/make_example.py            write it
    python tools/make_example.py --check    write nothing, fail if it would change

It is the scene of a validation seed, drawn larger than the model sees it: no training
run draws from these seeds, so the embedded model meets it for the first time.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.questions import caption
from vlm.scenes import VALIDATION_SEEDS, make_scene

SCENE = Path(__file__).resolve().parent.parent / "vlm/assets/examples/scene.png"
SEED = 1_000_000_417  # an elephant, a candle, a pig, an owl and a bat
SIDE = 448


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    assert SEED in VALIDATION_SEEDS
    scene = make_scene(SEED, image_size=SIDE)
    if options.check:
        if np.array_equal(np.asarray(Image.open(SCENE)), np.asarray(scene.image)):
            return 0
        print(f"{SCENE.name} is stale: run tools/make_example.py", file=sys.stderr)
        return 1
    SCENE.parent.mkdir(parents=True, exist_ok=True)
    scene.image.save(SCENE, optimize=True)
    print(f"wrote {SCENE}: {caption(scene)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

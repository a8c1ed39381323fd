"""Generate the README's images from fixed prompts and a fixed seed, on a running server.

python -m engines.demo.gallery --url http://127.0.0.1:8000 --out docs/demo.png
"""

import argparse
from pathlib import Path

from PIL import Image

from engines.demo.check import grid, request_picture
from engines.demo.pictures import caption

SEED = 7
COLUMNS = 8
SHOWN = (
    ("red heart", "yellow"),
    ("penguin", "blue"),
    ("rocket", "black"),
    ("strawberry", "white"),
    ("owl", "orange"),
    ("cactus", "pink"),
    ("donut", "green"),
    ("crown", "purple"),
    ("red apple", "blue"),
    ("fox", "white"),
    ("rainbow", "black"),
    ("turtle", "yellow"),
    ("guitar", "green"),
    ("butterfly", "orange"),
    ("snowman", "purple"),
    ("pizza", "pink"),
    ("panda", "red"),
    ("sailboat", "yellow"),
    ("ghost", "purple"),
    ("sunflower", "blue"),
    ("robot", "orange"),
    ("watermelon", "white"),
    ("castle", "pink"),
    ("octopus", "black"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write all images to, at twice their size")
    given = parser.parse_args()
    sheet = grid((request_picture(given.url, caption(*pair), SEED) for pair in SHOWN), columns=COLUMNS)
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(given.out, optimize=True)


if __name__ == "__main__":
    main()

"""Draw the atlas of glyphs from Noto Color Emoji; needed only to change which things the model draws.

python -m engines.demo.atlas --font NotoColorEmoji.ttf
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from engines.demo.pictures import ATLAS, CELL, COLUMNS, concepts

FONT_SIZE = 109  # the only size of the font's bitmaps
BITMAP = (136, 128)

GLYPHS = {
    "dog": "🐶",
    "cat": "🐱",
    "rabbit": "🐰",
    "fox": "🦊",
    "bear": "🐻",
    "panda": "🐼",
    "koala": "🐨",
    "lion": "🦁",
    "cow": "🐮",
    "pig": "🐷",
    "frog": "🐸",
    "monkey": "🐵",
    "penguin": "🐧",
    "owl": "🦉",
    "unicorn": "🦄",
    "bee": "🐝",
    "ladybug": "🐞",
    "butterfly": "🦋",
    "snail": "🐌",
    "turtle": "🐢",
    "octopus": "🐙",
    "crab": "🦀",
    "fish": "🐠",
    "whale": "🐳",
    "elephant": "🐘",
    "snake": "🐍",
    "duck": "🦆",
    "chick": "🐤",
    "red apple": "🍎",
    "banana": "🍌",
    "lemon": "🍋",
    "grapes": "🍇",
    "watermelon": "🍉",
    "strawberry": "🍓",
    "cherries": "🍒",
    "pear": "🍐",
    "pineapple": "🍍",
    "peach": "🍑",
    "avocado": "🥑",
    "carrot": "🥕",
    "corn": "🌽",
    "broccoli": "🥦",
    "mushroom": "🍄",
    "pizza": "🍕",
    "hamburger": "🍔",
    "donut": "🍩",
    "cookie": "🍪",
    "birthday cake": "🎂",
    "ice cream": "🍦",
    "lollipop": "🍭",
    "fried egg": "🍳",
    "cheese": "🧀",
    "popcorn": "🍿",
    "sunflower": "🌻",
    "rose": "🌹",
    "tulip": "🌷",
    "cactus": "🌵",
    "pine tree": "🌲",
    "palm tree": "🌴",
    "maple leaf": "🍁",
    "clover": "🍀",
    "sun": "🌞",
    "moon": "🌙",
    "star": "⭐",
    "rainbow": "🌈",
    "snowflake": "❄️",
    "snowman": "⛄",
    "cloud": "☁️",
    "fire": "🔥",
    "globe": "🌍",
    "volcano": "🌋",
    "red heart": "❤️",
    "balloon": "🎈",
    "gift": "🎁",
    "umbrella": "☂️",
    "key": "🔑",
    "bell": "🔔",
    "book": "📕",
    "pencil": "✏️",
    "clock": "⏰",
    "light bulb": "💡",
    "guitar": "🎸",
    "drum": "🥁",
    "trumpet": "🎺",
    "soccer ball": "⚽",
    "basketball": "🏀",
    "crown": "👑",
    "top hat": "🎩",
    "diamond": "💎",
    "rocket": "🚀",
    "airplane": "✈️",
    "car": "🚗",
    "bus": "🚌",
    "train": "🚂",
    "sailboat": "⛵",
    "house": "🏠",
    "castle": "🏰",
    "tent": "⛺",
    "robot": "🤖",
    "ghost": "👻",
    "pumpkin": "🎃",
    "anchor": "⚓",
}


def draw(char: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return an RGBA image [64, 64] of one glyph, scaled so that its longer side fills the cell."""
    bitmap = Image.new("RGBA", BITMAP)
    ImageDraw.Draw(bitmap).text((0, 0), char, font=font, embedded_color=True)
    tight = bitmap.crop(bitmap.getbbox())
    scale = CELL / max(tight.size)
    small = tight.resize((round(tight.width * scale), round(tight.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return cell


def draw_atlas(font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return an RGBA image of every glyph in the order of concepts.json, ten per row."""
    rows = -(-len(GLYPHS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, thing in enumerate(concepts().things):
        row, column = divmod(index, COLUMNS)
        atlas.paste(draw(GLYPHS[thing], font), (column * CELL, row * CELL))
    return atlas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf with bitmaps (CBDT)")
    font = ImageFont.truetype(parser.parse_args().font, FONT_SIZE)
    draw_atlas(font).save(ATLAS, optimize=True)


if __name__ == "__main__":
    main()

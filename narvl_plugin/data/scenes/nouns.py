"""The nouns of the scenes: their emoji, their plural and their article.

The order matters: the first 40 are the easiest to distinguish, and a run with few nouns uses these. Of nouns with
similar art (whale and dolphin, guitar and banjo, axe and hammer), the list has only one.
"""

import emoji

# noun -> its English name in the `emoji` package, if it differs from the noun.
_EASY = """
dog cat=cat_face apple=red_apple car=automobile bus banana panda frog penguin butterfly
spider turtle elephant lion owl whale=spouting_whale crab giraffe zebra pig=pig_face
sunflower cactus mushroom pizza hamburger donut=doughnut watermelon strawberry carrot pineapple
guitar basketball bicycle rocket umbrella clock=alarm_clock camera chair castle snowman
"""
_MORE = """
balloon gift=wrapped_gift crown heart=red_heart star key bell anchor tree=evergreen_tree rose
tent house train=locomotive airplane helicopter boat=sailboat tractor truck=delivery_truck motorcycle
skateboard
kite drum violin trumpet piano=musical_keyboard hammer wrench pencil book=open_book laptop
television telephone candle bed couch=couch_and_lamp door bathtub toilet mirror ring
dress shirt=t-shirt shoe=running_shoe backpack hat=top_hat scarf sun cloud rainbow leaf=maple_leaf
robot ghost magnet ladder bomb broom bucket basket toothbrush envelope
telescope microscope trophy lock=locked bulb=light_bulb horse=horse_face cow=cow_face rabbit=rabbit_face
mouse=mouse_face fox
bear koala monkey=monkey_face rooster bird duck parrot flamingo peacock raccoon
hedgehog bat unicorn bee=honeybee snail ant scorpion snake octopus fish
shark crocodile gorilla camel=two-hump_camel kangaroo swan dinosaur=sauropod lemon pear kiwi=kiwi_fruit
coconut eggplant avocado onion pepper=hot_pepper croissant pretzel sandwich taco cake=birthday_cake
cookie cupcake candy lollipop teapot cup=hot_beverage glass=wine_glass bottle=baby_bottle volcano tulip
clover=four_leaf_clover ladybug=lady_beetle palm=palm_tree fountain shield glove=boxing_glove
"""
_EMOJI_NAMES = {noun: name or noun for noun, _, name in (entry.partition("=") for entry in (_EASY + _MORE).split())}
_IRREGULAR_PLURALS = {
    "mouse": "mice",
    "fish": "fish",
    "leaf": "leaves",
    "scarf": "scarves",
    "snowman": "snowmen",
}
_SPOKEN_WITH_CONSONANT = {"unicorn"}

NOUNS: tuple[str, ...] = tuple(_EMOJI_NAMES)
"""All nouns, the easiest first."""


def art_file_name(noun: str) -> str:
    """Return the file name of a noun's art: the code points of its emoji in lower-case hex, as in twemoji's files.

    Raises:
        KeyError: for a noun that is not in `NOUNS`.
    """
    characters = emoji.emojize(f":{_EMOJI_NAMES[noun]}:")
    # Twemoji omits the variation selector in its file names.
    return "-".join(f"{ord(character):x}" for character in characters if character != "\ufe0f") + ".png"


def plural(noun: str) -> str:
    """Return the plural of a noun: irregular ones from a table, the others by the spelling rules of English."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def with_article(phrase: str) -> str:
    """Return the phrase with its indefinite article: "a dog", "an apple", "an orange background"."""
    vowel = phrase[0] in "aeiou" and phrase.split()[0] not in _SPOKEN_WITH_CONSONANT
    return f"an {phrase}" if vowel else f"a {phrase}"

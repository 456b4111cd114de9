# SPDX-License-Identifier: Apache-2.0
"""English words from which keys, values and fillers are drawn."""

import random
from functools import cache

__all__ = ["ADJECTIVES", "NOUNS", "distinct_words", "random_key", "random_number", "random_uuid"]

_ADJECTIVES = """
able ample amber ancient arctic autumn avid azure basic bitter bland blank bleak blond blue bold brave brief bright
brisk broad bronze brown calm candid careful casual cheap cheerful chief chilly civil classic clean clear clever close
cloudy clumsy coarse cold common compact copper coral cosy crimson crisp crooked cruel curious curly damp daring dark
dear decent deep dense dim direct distant double dreamy drowsy dry dull dusty eager early earnest easy elegant empty
endless equal exact faint fair faithful false famous fancy fast fatal feeble fertile fierce final fine firm flat
fluffy fond foreign formal fragile frank free fresh friendly frosty frozen full funny gentle genuine giant glad gloomy
golden good grand grave gray greasy great green grim gritty handy happy hard harsh hasty heavy hidden high hollow
honest huge humble hungry icy ideal idle immense indigo inner jagged jolly joyful keen kind large late lavish lazy
lean light likely liquid little lively lonely long loose loud lovely loyal lucky lunar mad major marble mellow merry
mighty mild minor misty mobile modern modest moist moral muddy narrow nasty native natural near neat nervous nimble
noble noisy normal odd old open orange outer oval pale patient perfect plain pleasant polite poor pretty prime private
proud public pure purple quaint quick quiet rapid rare raw ready real red regal remote rich rigid ripe robust rosy
rough round royal rude rural rusty sacred sad safe salty sandy scarce scarlet secret serene severe shallow sharp shiny
short shy silent silky silver simple single sleepy slender slim slow small smart smooth snowy sober soft solar solemn
solid sour spare steady steep stern stiff still stormy stout strange strict strong sturdy subtle sudden sunny super
sweet swift tall tame tart tender tense thick thin thirsty tidy timid tiny tired tough tranquil true upper urban
urgent useful usual vague vain valid vast velvet violet vital vivid warm wary weak weary wet white wide wild windy
wise witty wooden woolly yellow young
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
_NOUNS = """
acorn actor advice airport album alley anchor animal ankle answer apple apron arch arena armor army arrow artist aunt
author avenue award axis bacon badge baker balcony ballad bamboo banana bank banner barber barley barn barrel basin
basket battery beach beacon bean bear beard beaver bedroom beetle bell belt bench berry bicycle bird biscuit blanket
blossom boat bonnet book boot border bottle boulder bowl bracelet branch bread breeze brick bridge broom brush bubble
bucket budget buffalo bugle builder bundle butcher butter button cabbage cabin cactus cake camel camera camp canal
candle cannon canoe canvas captain caravan cargo carpet carrot cart castle cattle cave cellar cement chain chair chalk
channel chapel chart cheese cherry chess chest chicken chimney church cinema circle circus citizen city clay clerk
cliff clinic clock cloth cloud clover coach coast cobweb coffee coin college comet compass copy cottage cotton couch
council country cousin cradle crane crayon cream creek crib cricket crown crystal cup curtain curve cushion dagger
daisy dancer deer dentist desert desk diamond diary dinner doctor dolphin donkey door dragon drawer dress drum duck
eagle ear earth echo editor elbow elephant elm engine envelope errand evening fabric factory falcon family farmer
father feather fence ferry fiddle field finger fire fish flag flame flock flood floor flour flower flute fog forest
fork fortress fountain fox frame friend frog fruit furnace galaxy garden garlic gate gift giraffe glacier glass glove
goat grain granite grape grass guard guest guitar gull hammer hamster harbor harp harvest hat hawk hazel heart hedge
helmet heron hill hinge hobby holiday honey hood hook horse hotel house hunter iceberg inch ink insect island ivory
ivy jacket jaguar jar jelly jewel journal judge juice jungle kettle key kitchen kite kitten knee knife knight knot
ladder lady lake lamp lantern laundry lawyer leaf leather lemon leopard letter lettuce library lily lion lizard
lobster locket lodge lumber magnet maid mango mansion map maple market mason meadow medal melon mermaid meteor milk
mill mirror mitten monkey month moon morning moss moth mother motor mountain mouse mouth muffin museum music mustard
nail napkin needle nephew nest night north notebook novel nurse oak oasis oatmeal ocean office olive onion orchard
orchid organ ostrich otter oven owl oyster paddle page palace panda panther paper parade parcel parrot pastry path
peach peacock pear pebble pelican pencil penguin pepper piano picture pigeon pillow pilot pine pistol planet plate
plum pocket poet pond pony poppy porch potato prairie prince puddle pumpkin puppet puzzle quail queen quilt rabbit
raccoon radio raft rail rain raven reef ribbon rice river robin rocket roof rooster rope rose ruby saddle sailor salad
salmon sandal satin saucer scarf school scissors sculptor season senator shadow shark sheep shelf shell shepherd ship
shoe shovel silk singer sister skate sketch sky sled sleeve slipper snail snow soap soldier song south sparrow spider
spinach spoon spring squirrel stable stadium star statue steam stone stove street student sugar summer sunset swan
table tailor teacher temple tent theater thimble thistle thread throne thumb thunder ticket tiger timber toast tomato
torch tortoise tower tractor trail train treasure tree trumpet tulip tunnel turkey turtle uncle valley vase vessel
village vine violin visitor voyage wagon waiter wallet walnut walrus water wave weasel wedding wheat wheel whistle
widow willow window winter wizard wolf wood wool yacht yard zebra zipper
"""
NOUNS = tuple(_NOUNS.split())


@cache
def _plain() -> tuple[str, ...]:
    return tuple(sorted({*ADJECTIVES, *NOUNS}))


@cache
def _compounds() -> tuple[str, ...]:
    return tuple(sorted({first + second for first in _plain() for second in NOUNS if first != second}))


def distinct_words(generator: random.Random, count: int) -> list[str]:
    """Different words in random order: of the lists if they have enough, else compounds of two ("lemonharbor").

    Raises:
        ValueError: there are not that many.
    """
    words = _plain() if count <= len(_plain()) else _compounds()
    if count > len(words):
        raise ValueError(f"{count} different words were asked for; there are {len(words)}")
    return generator.sample(words, count)


def random_key(generator: random.Random) -> str:
    """An adjective and a noun, such as "misty-harbor"."""
    return f"{generator.choice(ADJECTIVES)}-{generator.choice(NOUNS)}"


def random_number(generator: random.Random, num_digits: int) -> str:
    """A number of so many digits, the first of which is not 0."""
    return str(generator.randrange(10 ** (num_digits - 1), 10**num_digits))


def random_uuid(generator: random.Random) -> str:
    """A UUID of version 4."""
    digits = f"{generator.getrandbits(128):032x}"
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"

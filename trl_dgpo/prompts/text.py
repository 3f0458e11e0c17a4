"""
Prompts for pictures with text, as rows with the columns `prompt` and `text`.

"train" and "test" share no content word and no code: a word belongs to one of them by a hash of its letters, whatever
the seed, the number of prompts or the order of the lists.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Literal


# About as often as in the prompt set of Flow-GRPO (arXiv 2505.05470): phrases of 1, 2, ... 5 words.
_LENGTH_WEIGHTS = (4, 24, 44, 23, 5)
_DIGIT_SHARE = 0.2
_UPPER_SHARE = 0.4
_WORD_SHARE = 1 / 3
_MAX_PROMPTS = 20_000
_DEFAULT_PROMPTS = {"train": _MAX_PROMPTS, "test": 256}


def ocr_prompts(
    split: Literal["train", "test"], num_prompts: int | None = None, seed: int = 0
) -> list[dict[str, str]]:
    """
    Scenes with a quoted phrase to be drawn, for models of the size of SD3.5.

    A phrase has 1 to 5 words; a fifth of the phrases holds a number. All phrases of a set differ. Small words such as
    "the" and "and" occur in both splits, all others in one.

    Args:
        split (`str`):
            `"train"` or `"test"`.
        num_prompts (`int`, *optional*):
            Number of rows, at most 20 000. If not given, 20 000 of `"train"` and 256 of `"test"`.
        seed (`int`, *optional*, defaults to `0`):
            Another seed, another set.

    Returns:
        `list[dict]`: rows such as `{"prompt": 'A mug printed with "OPEN LATE"', "text": "OPEN LATE"}`.

    Raises:
        ValueError: an unknown split, or a number of prompts outside 1 to 20 000.
    """
    num_prompts, rng = _number_and_rng("ocr", split, num_prompts, seed)
    nouns, adjectives, verbs, numbers = (
        [word for word in words if _split_of(word) == split]
        for words in (_NOUNS.split(), _ADJECTIVES.split(), _VERBS.split(), map(str, range(10, 2000)))
    )

    def draw_phrase() -> str:
        forms = _NUMBER_FORMS if rng.random() < _DIGIT_SHARE else _FORMS
        form = rng.choice(rng.choices(forms, weights=_LENGTH_WEIGHTS)[0])
        first, second = rng.sample(nouns, 2)
        return form.format(
            noun=first, noun2=second, adj=rng.choice(adjectives), verb=rng.choice(verbs), number=rng.choice(numbers)
        )

    # Upper or title case is drawn afterwards: phrases that differ in case alone are one phrase to the reward.
    texts = [
        phrase.upper() if rng.random() < _UPPER_SHARE else phrase.title()
        for phrase in _distinct(draw_phrase, num_prompts)
    ]
    return [{"prompt": rng.choice(_SCENES).format(text=text), "text": text} for text in texts]


def tiny_ocr_prompts(
    split: Literal["train", "test"], num_prompts: int | None = None, seed: int = 0
) -> list[dict[str, str]]:
    """
    Prompts of the bundled tiny model: four capital letters on a sign.

    Up to a third are English words, the rest random codes. There is no O and no Q: an OCR engine cannot tell O
    from 0 without context. All texts of a set differ.

    Args:
        split (`str`):
            `"train"` or `"test"`.
        num_prompts (`int`, *optional*):
            Number of rows, at most 20 000. If not given, 20 000 of `"train"` and 256 of `"test"`.
        seed (`int`, *optional*, defaults to `0`):
            Another seed, another set.

    Returns:
        `list[dict]`: rows such as `{"prompt": 'A sign that says "CAFE"', "text": "CAFE"}`.

    Raises:
        ValueError: an unknown split, or a number of prompts outside 1 to 20 000.
    """
    num_prompts, rng = _number_and_rng("tiny", split, num_prompts, seed)
    words = [word for word in _SIGN_WORDS.split() if _split_of(word) == split]
    words = rng.sample(words, min(len(words), int(num_prompts * _WORD_SHARE)))

    def draw_code() -> str:
        while True:
            code = "".join(rng.choices(_SIGN_LETTERS, k=4))
            if _split_of(code) == split:
                return code

    texts = _distinct(draw_code, num_prompts, start=words)
    rng.shuffle(texts)
    return [{"prompt": f'A sign that says "{text}"', "text": text} for text in texts]


def _number_and_rng(kind: str, split: str, num_prompts: int | None, seed: int) -> tuple[int, random.Random]:
    if split not in _DEFAULT_PROMPTS:
        raise ValueError(f'`split` is {split!r}; it must be "train" or "test".')
    if num_prompts is None:
        num_prompts = _DEFAULT_PROMPTS[split]
    if not 1 <= num_prompts <= _MAX_PROMPTS:
        raise ValueError(f"`num_prompts` is {num_prompts}; it must be between 1 and {_MAX_PROMPTS}.")
    return num_prompts, random.Random(f"{kind}/{split}/{seed}")  # strings are hashed the same way in every process


def _split_of(word: str) -> str:
    return "test" if hashlib.sha256(word.lower().encode()).digest()[0] % 4 == 0 else "train"


def _distinct(draw: Callable[[], str], number: int, start: list[str] | None = None) -> list[str]:
    found = dict.fromkeys(start or [])  # a dict keeps the order, a set does not
    while len(found) < number:
        found[draw()] = None
    return list(found)


_FORMS = (
    ("{noun}", "{verb}", "{adj}"),
    ("{adj} {noun}", "{noun} {noun2}", "{verb} {noun}", "the {noun}"),
    ("{verb} the {noun}", "the {adj} {noun}", "{noun} and {noun2}", "{adj} {noun} {noun2}", "{verb} your {noun}"),
    ("{verb} the {adj} {noun}", "{adj} {noun} and {noun2}", "{noun} for the {noun2}", "the {noun} of {noun2}"),
    ("the {adj} {noun} and {noun2}", "{verb} your {noun} and {noun2}", "{adj} {noun} for the {noun2}"),
)
_NUMBER_FORMS = (
    ("{noun}{number}",),
    ("{noun} {number}", "{verb} {number}"),
    ("{adj} {noun} {number}", "{noun} since {number}", "{noun} no {number}"),
    ("{noun} {noun2} since {number}", "the {adj} {noun} {number}", "{verb} your {noun} {number}"),
    ("{noun} and {noun2} since {number}", "{verb} the {adj} {noun} {number}"),
)

_SCENES = (
    'A wooden shop sign above a narrow door that reads "{text}", morning light, photograph',
    'A neon sign in a rainy street at night, glowing letters spell "{text}"',
    'A chalkboard in a small cafe with "{text}" written in white chalk',
    'A paperback on a bedside table, its cover shows the title "{text}"',
    'A road sign beside an empty desert highway that says "{text}"',
    'A white coffee mug on an office desk, printed with "{text}"',
    'A train station departure board that shows "{text}" in yellow letters',
    'A birthday cake with "{text}" written in icing',
    'A concert ticket held between two fingers, the print says "{text}"',
    'A hand-painted banner across a village square that says "{text}"',
    'A vintage travel poster of a harbour with the headline "{text}"',
    'A cotton T-shirt on a hanger, the print on its front reads "{text}"',
    'A brass plate beside a heavy office door, engraved with "{text}"',
    'A cinema marquee at dusk announcing "{text}"',
    'A wine bottle on a kitchen table, its label says "{text}"',
    'A cardboard box in a warehouse stamped with "{text}"',
    'A sandy beach seen from above, "{text}" is drawn in the sand',
    'A food truck in a park with "{text}" painted on its side',
    'A comic panel in which a robot says "{text}" in a speech bubble',
    'A library shelf with a label that reads "{text}"',
    'A stadium scoreboard that shows "{text}" in bright lights',
    'An old map on parchment with the title "{text}"',
    'A laptop screen in a dark room that displays "{text}" in large letters',
    'A garden gate with a small slate sign that reads "{text}"',
    'A magazine on a glass table, the cover line is "{text}"',
    'A brick wall with a mural that spells "{text}" in bold colours',
    'A paper lantern in a night market with "{text}" brushed on it',
    'A fishing boat in a quiet harbour, its name "{text}" is painted on the bow',
    'A museum label under a bronze statue that reads "{text}"',
    'A bakery window with "{text}" in golden letters on the glass',
    'A protest sign held above a crowd that says "{text}"',
    'A vinyl record sleeve with the band name "{text}"',
    'A wooden signpost at a fork of a forest trail, one arm says "{text}"',
    'A newspaper on a park bench with the headline "{text}"',
    'A jar of jam on a breakfast table, the handwritten label says "{text}"',
    'A city bus at its stop, the display above the windscreen shows "{text}"',
    'An astronaut beside a flag on the moon, the flag reads "{text}"',
    'A postcard of a mountain lake with the words "{text}" at the top',
    'A tattoo on a forearm that says "{text}" in fine script',
    'A snow-covered field with a billboard that reads "{text}"',
)

# One list a kind of word; the hash of a word, not its place, decides which split it is in.
_NOUNS = """
account airport almanac anchor apple archive arrow artist autumn avenue bakery balcony ballad banana barrel basket
beacon bicycle blanket blossom bottle branch breeze bridge bucket butter cabin cactus camera campus candle canvas
canyon captain carnival carpet castle cellar chapel cherry circus citadel clinic clover coast coffee college comet
compass concert copper coral corner cottage cotton cousin cradle creek cricket crystal curtain dancer daughter desert
diamond dinner doctor dolphin dragon dream driver eagle echo ember engine evening falcon family feather festival fiddle
field flame flower forest fortune fountain friend galaxy gallery garden ginger glacier glove granite guitar hammer
harbor harvest haven heaven honey horizon horse hotel house island jacket jasmine journey jungle kettle kitchen ladder
lagoon lantern laundry legend lemon letter library lighthouse lilac linen lizard lobster lounge magnet mango maple
marble market meadow melody memory mirror monkey moon morning mountain museum music needle number nursery oasis ocean
olive onion orange orchard orchestra otter owl palace panda paper parade parrot pastry peach pearl pebble pencil pepper
piano picnic pilot pioneer planet poem pony portrait potato prairie puzzle quarry queen rabbit railway rainbow raven
record ribbon river road robin rocket salmon sandal saturn scarf school season shadow shelter silver singer sister sky
smoke snow soldier spirit spring square stable station storm story street studio summer sunrise sunset surfer table
tailor teacher temple theater thunder ticket tiger timber tower tractor traffic trail train travel treasure tunnel
turtle umbrella uncle valley velvet village violin voyage wagon walnut water weather wedding whale wheel whisper
willow window winter wizard wolf wonder workshop writer yogurt zebra zipper
"""
_ADJECTIVES = """
amber ancient bold brave brief bright broken calm careful cheerful clever cosmic crimson curious daily dancing double
eager early eastern electric emerald endless faithful famous final first fresh frozen gentle giant glowing golden grand
green happy hidden hollow humble hungry indigo infinite jolly kind last lazy little lively local lonely lost lucky
magic midnight mighty misty modern narrow noble northern open painted patient perfect pink polished proud purple quick
quiet rapid rare restless royal rustic sacred salty scarlet secret shiny silent simple sleepy slow smiling southern
special spicy steady sunny sweet tender tiny tranquil tropical true twisted velvety wandering warm western wild winding
wise wooden yellow young
"""
_VERBS = """
admire answer ask bake become believe blend borrow bring build carry catch celebrate change choose clean climb collect
count cover create cross dance deliver discover draw drive embrace enjoy enter escape explore feed find finish fix fly
follow forget gather give greet grow guard guide hear help hold honor hope imagine improve invite join keep kiss laugh
lead learn leave listen live love make mend move need notice offer order pack paint pick plant play praise protect
read reach recycle remember repair rescue respect return ride save search see sell send serve share sing skip smile
stop study support swim taste teach thank touch trust try turn unlock value visit wait walk want wash watch welcome
win wish
"""

_SIGN_LETTERS = "ABCDEFGHIJKLMNPRSTUVWXYZ"
_SIGN_WORDS = """
ABLE ACHE AIDE ALAS AREA ARMY ARTS AUNT BABY BACK BAKE BALL BAND BANK BARK BARN BASE BATH BEAD BEAK BEAM BEAN BEAR BEAT
BEEF BELL BELT BEND BEST BIKE BILL BIRD BITE BLUE BRAG BRIM BULB BULL BUMP BURN BUSH BUSY CAFE CAGE CAKE CALF CALL CALM
CAMP CANE CAPE CARD CARE CART CASE CASH CAST CAVE CELL CENT CHAI CHAT CHEF CHIN CHIP CITY CLAM CLAP CLAY CLIP CLUB CLUE
CRAB CREW CUBE CURE CURL CUTE DALE DAMP DARE DARK DASH DATE DAWN DEAL DEAR DEEP DEER DELI DENT DESK DIAL DICE DIET DIME
DINE DISH DIVE DRAW DRUM DUCK DUEL DUNE DUSK DUST EACH EARN EAST EASY EDGE ELSE EPIC EVEN EVER FACE FACT FADE FAIR FALL
FAME FARM FAST FEAR FEED FERN FILM FIND FINE FIRE FISH FIVE FLAG FLAT FLEA FLUX FREE FUEL FULL FUND GAIN GALA GAME GATE
GAZE GEAR GEMS GERM GIFT GIRL GIVE GLAD GLEE GLUE GRAB GRAY GREY GRID GRIN GRIP GULF GURU HAIL HAIR HALF HALL HAND HARE
HARP HAWK HAZE HEAL HEAR HEAT HELP HERB HERD HERE HIGH HIKE HILL HINT HIVE HUGE HULL HUNT HUSH IDEA INCH INKS IRIS ITEM
JADE JAZZ JEEP JEST JULY JUMP JUNE JURY JUST KALE KEEN KEEP KELP KEYS KICK KIND KING KITE KIWI KNEE LACE LADY LAKE LAMB
LAMP LAND LANE LARK LASH LATE LAVA LAWN LAZY LEAF LEAN LEAP LEFT LENS LIFE LIFT LIKE LILY LIME LINE LINK LIST LIVE LUCK
LUNG LURE LUSH MAIL MAIN MALT MANE MANY MARS MASK MAST MATH MAZE MEAL MEAN MEET MELT MENU MICE MILD MILE MILK MILL MIND
MINE MINT MIST MULE MUSE MYTH NAME NAVY NEAR NEAT NECK NEST NEWS NEXT NICE NINE PACE PACK PAGE PAIR PALE PALM PARK PART
PAST PATH PAVE PEAK PEAR PEAS PEEL PERK PIER PINE PINK PIPE PLAN PLAY PLEA PLUG PLUM PLUS PREP PULL PUMP PURE RACE RAFT
RAIL RAIN RAMP RANK RARE READ REAL REEF RENT REST RICE RICH RIDE RING RIPE RISE RISK RUBY RUGS RULE RUSH SAFE SAGE SAIL
SALE SALT SAND SAVE SEAL SEAM SEAT SEED SELF SHED SHIP SILK SING SITE SIZE SKIN SLED SLIM SNAP SPUN STAR STAY STEM STEP
SURF SWAN SWIM TAIL TAKE TALE TALK TALL TAME TANK TAPE TAXI TEAL TEAM TENT TERM TEST TEXT THIN TIDE TILE TIME TINY TIRE
TREE TREK TRIM TRIP TRUE TUBE TUNA TUNE TURN TWIN UNIT VASE VAST VEIL VERY VEST VIBE VIEW VINE VISA WAKE WALK WALL WARM
WASH WAVE WEAR WEEK WELL WEST WIDE WILD WIND WINE WING WINK WISE WISH WRAP YARD YARN YEAR ZEAL ZEST
"""

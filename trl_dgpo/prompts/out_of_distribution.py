"""Prompts unlike those that are trained on, written for this package."""

from typing import Literal


def ood_prompts(split: Literal["test"] = "test", num_prompts: int | None = None) -> list[dict[str, str]]:
    """
    A small set to see what training on another task has cost.

    Its eleven categories are those of DrawBench (arXiv 2205.11487), eight prompts each; all prompts are our own. Score
    them with rewards that need no target, such as PickScore or the aesthetic score, before and after.

    Args:
        split (`str`, *optional*, defaults to `"test"`):
            There is no other.
        num_prompts (`int`, *optional*):
            Number of rows, spread evenly over the categories. All 88 if not given.

    Returns:
        `list[dict]`: rows such as `{"prompt": "A violet taxi in the snow.", "tag": "color"}`.

    Raises:
        ValueError: another split, or a number of prompts outside 1 to 88.
    """
    if split != "test":
        raise ValueError(f'`split` is {split!r}; the out-of-distribution prompts are for evaluation: only "test".')
    rows = [
        {"prompt": prompt, "tag": tag} for tag, prompts in _PROMPTS.items() for prompt in prompts.strip().splitlines()
    ]
    if num_prompts is None:
        num_prompts = len(rows)
    if not 1 <= num_prompts <= len(rows):
        raise ValueError(f"`num_prompts` is {num_prompts}; it must be between 1 and {len(rows)}.")
    return [rows[i * len(rows) // num_prompts] for i in range(num_prompts)]


# One prompt a line.
_PROMPTS = {
    "color": """
A violet taxi in the snow.
A turquoise lemon on a white plate.
An orange piano beside a grey curtain.
A pair of boots, the left one yellow and the right one blue.
A brown swan on a pink lake.
A green bicycle with red tyres and a silver bell.
A black rose in a golden jug.
A crimson owl on a purple branch.
""",
    "conflict": """
A fish that waters a garden with a hose.
A candle with a flame of ice.
A snail that overtakes a racing car.
A bakery where loaves of bread sell people.
A lighthouse at the bottom of a swimming pool.
A snowman sunbathing in a desert.
A violin that plays a musician.
A mouse chasing three frightened cats.
""",
    "count": """
Four umbrellas on an empty beach.
Two snowmen and three sledges.
Five matches beside one candle.
A table with exactly seven coins on it.
Three owls and one squirrel on the same branch.
Six paper boats on a pond.
One glove and two hats on a bench.
Nine windows in the front of a brick house, all of them lit.
""",
    "description": """
A round wooden tool with a thin string, which climbs up and down as the hand above it rises and falls.
A small glass bulb between two cones, in which sand runs from the upper half into the lower one.
A long-legged bird that stands on one foot and gets its colour from the shrimps it eats.
A narrow boat of dark wood with a raised bow, moved by one man with one oar through a city without streets.
A metal pot with a spout and a handle that whistles when what is in it boils.
A black and white board game on which two small armies of sixteen face each other.
A soft instrument that breathes in and out between two hands, with keys on one side and buttons on the other.
A house of snow blocks, round like half a ball, with a tunnel to crawl in by.
""",
    "relation": """
A child lifts a father who lifts a suitcase.
A cat that looks at a dog that looks at the moon.
The larger of two cups is empty, the smaller one is full.
A photograph of a painter who paints a photographer.
A knight without a helmet beside a helmet without a knight.
A tall man with a short shadow next to a short man with a tall shadow.
A room in which every chair but one is upside down.
The dog that is not wearing a scarf is asleep.
""",
    "misspelling": """
A ligthouse in a strom.
An elphant with an umberlla.
A bycicle leaning on a wooden fense.
Sevral penguns on an icebreg.
A casel on top of a montain.
An astronawt eating spagetti.
A buterfly on a sunflowr.
A knihgt rideing a whtie horse.
""",
    "position": """
A lamp to the right of a globe.
A tractor below a kite.
A teapot on top of a pile of books.
A fox under a wooden bridge.
A bowl of cherries in front of a mirror.
A ladder between two apple trees.
A drum to the left of a trumpet.
A key inside a bottle.
""",
    "rare word": """
A quincunx of standing stones.
A lacustrine village at dawn.
A tintinnabulating tram.
A gibbous moon above an esker.
A farrier at his anvil.
A gallimaufry of buttons.
A sarabande in a ballroom.
An ouroboros of wrought iron.
""",
    "community": """
An office meeting of garden gnomes, seen through the webcam of a laptop.
My grandmother's kitchen, but everything in it is made of knitted wool.
Security camera footage of a raccoon that returns a stolen bicycle.
A dragon who retired and now runs a small tea room, cosy, rainy afternoon.
The box art of a 1990s video game about competitive ironing.
A medieval tapestry of people waiting for a delayed train.
A nature documentary about wild vacuum cleaners in the savannah.
A cutaway drawing of a submarine run by hamsters.
""",
    "text": """
A bakery with a sign that says "Fresh at Six".
A rusty gate with the words "Beware of the Goose".
A birthday balloon on which "Forty Again" is printed.
A train ticket to "Nowhere".
A robot that holds a card with "Will Compute for Oil".
The word "QUIET" made of pillows.
A mountain hut with "2962 m" painted over its door.
Fireworks that spell "Encore" above a river.
""",
    "invention": """
An armchair in the shape of a pineapple.
A tortoise whose shell is a greenhouse.
A cathedral built of playing cards, in morning light.
A teacup full of a thunderstorm, oil painting.
A hedgehog librarian, pencil drawing with watercolour.
A stained-glass window of a space station.
A coat sewn out of maps, fashion photograph.
A city on the back of a whale, woodcut.
""",
}

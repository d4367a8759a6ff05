"""Captions with references, and what the COCO caption evaluation says of them."""

# The hypothesis, then its references. Written for the tests, with what tokenizers trip over: clitics, hyphens, times,
# prices, abbreviations, quotes, brackets; and empty, short, long, repeated and unrelated hypotheses.
EXAMPLES = [
    ("A dog barks at a cat.", "A dog is barking at a cat.", "The dog barks loudly at the cat", "A cat is barked at."),
    ("a man can't open the door", "A man cannot open the door; it's locked.", "Someone tries to open a locked door."),
    ("Rain falls on a tin roof", "Rain is falling on a tin roof, and thunder rolls.", "Heavy rain hits a metal roof!"),
    ("two people talk in a T-shirt shop", "Two people are talking in a shop that sells t-shirts.", "People talk."),
    ("A train leaves at 10:30 a.m.", "The 10:30 a.m. train leaves the station.", "A train is leaving the station"),
    ("a woman pays $5.99 for coffee", "A woman buys coffee for $5.99.", "She pays five dollars for a coffee."),
    ("Mr. Brown walks his dogs", "Mr. Brown is walking three dogs in the park.", "An old man's dogs pull him along."),
    ('he says "hello" and waves', 'A man says "Hello!" and waves his hand.', "A man greets somebody (off camera)."),
    ("the the the the the", "The cat sits on the mat.", "There is a cat on the mat."),
    ("", "Birds sing in the morning.", "Several birds are singing."),
    ("guitar", "A person plays the guitar.", "Somebody is playing an acoustic guitar on a stage."),
    (
        "a red car drives down a long road past a field of tall green corn while a plane flies over it in the blue sky",
        "A red car drives down a road.",
        "A car is driving past a corn field.",
    ),
    ("a child plays with a ball", "A child plays with a ball", "A child plays with a ball"),
    ("a cat sleeps on a sofa", "Water is poured into a glass.", "Somebody fills a glass with water at a sink."),
    ("someone's phone rings; they're not home", "A phone's ringing and no one's home.", "The phone rings, and rings."),
    ("a crowd claps and cheers!!", "A crowd is clapping and cheering.", "An audience applauds...", "People cheer!"),
    ("water drips (slowly) from a tap", "Water drips slowly from a tap (in a kitchen).", "A tap is dripping."),
    ("a 3-year-old blows out candles", "A 3-year-old blows out the candles on a cake.", "A child has its birthday."),
    ("an engine starts and/or stops", "An engine starts, then stops.", "A car's engine won't start.", "Engine noise"),
    (
        "a chef cuts onions in a kitchen",
        "A chef is cutting onions.",
        "A cook chops vegetables in a kitchen.",
        "The chef cuts onions on a wooden board in a restaurant's kitchen.",
        "Cutting onions",
        "Someone cooks.",
    ),
    ("a horse runs across a field", "A horse gallops across a field."),
    ("a boy throws a ball to a dog and the dog brings it back", "A dog brings a ball back to a boy, who throws it."),
    ("the dog barks at the cat", "A dog barks at a cat", "a dog barks at a cat"),
    ("dogs bark — and it’s loud…", "Dogs bark – it’s loud.", "“Loud” dogs bark."),
    ("a man's gonna jump from 20ft, isn't he?", "A man is gonna jump 20ft into the U.S. team's pool.", "A man jumps."),
]

# Made with pycocoevalcap 1.2 and Java 17: PTBTokenizer().tokenize, then Bleu(4), Rouge(), Cider() and Meteor()
# .compute_score(references, hypotheses) over all examples; rounded to 9 digits. Its Cider() computes CIDEr-D.
VALUES = {
    "bleu_1": 0.711759809,
    "bleu_2": 0.546345248,
    "bleu_3": 0.381315689,
    "bleu_4": 0.262055838,
    "rouge_l": 0.567622729,
    "cider_d": 2.01536116,
    "meteor": 0.320755756,
}
_ITEMS = {
    "bleu_1": """
        1 0.714285714 0.833333333 0.558376335 0.833333333 1 0.329286982 0.439049309 0.327492301 0 0.0183156389
        0.4 1 0.333333333 0.441248451 0.5 0.687289279 1 0.8 1 0.833333333 0.785714286 0.666666666 0.833333333
        0.606365758
    """,
    "bleu_2": """
        0.894427191 0.597614304 0.707106781 0.42646697 0.707106781 0.577350269 0.212553833 0.425107665
        8.18730753e-09 0 1.83156389e-05 0.316227766 1 8.16496581e-09 0.235857218 0.316227766 0.449936449
        0.866025403 0.632455532 0.912870929 0.707106781 0.549725206 0.516397779 0.707106781 0.38944546
    """,
    "bleu_3": """
        0.584803548 0.414913267 0.629960525 2.87226736e-06 5e-06 4.05480133e-06 2.02183935e-06 0.404367871
        2.6349195e-11 0 1.83156389e-06 0.259086063 1 2.55436477e-11 2.01505433e-06 2.92401774e-06 0.28516544
        0.793700526 0.510872955 0.693361274 0.5 2.93114083e-06 0.405480133 0.5 0.241302997
    """,
    "bleu_4": """
        9.03602003e-05 6.50059326e-05 0.537284966 7.88173989e-09 1.42872021e-08 1.13621937e-08 6.90094097e-09
        0.367012461 1.65425818e-12 0 5.79191356e-07 0.22067731 1 1.53525978e-12 6.16454273e-09 9.55442792e-09
        4.22537306e-05 0.707106781 9.03602003e-05 9.55442792e-05 8.03428419e-05 6.91718423e-09 6.86589048e-05
        8.03428419e-05 3.47863516e-05
    """,
    "rouge_l": """
        0.758706468 0.570093458 0.598039216 0.85915493 0.333333333 0.571428571 0.407572383 0.590799031
        0.357771261 0 0.297560976 0.486887115 1 0.257383966 0.321052632 0.5 0.61409396 0.679287305 0.8
        0.68411215 0.833333333 0.468030691 0.666666667 0.924242424 0.611018364
    """,
    "cider_d": """
        2.18150491 1.61697533 2.11571591 1.64559884 2.05762596 2.08355233 0.815352418 2.26308005 0.18262608 0
        0.839561942 0.0326132007 10 0.00254100479 1.20537477 0.455686111 2.10638134 2.14937948 1.75864077
        1.15367497 3.93477412 2.81068608 4.1490535 3.63261489 1.19101506
    """,
    "meteor": """
        0.435660286 0.292050336 0.291844986 0.35773482 0.40358545 0.357388202 0.203061479 0.321702083
        0.0730593607 0 0.12244898 0.393940021 1 0.0445682451 0.232066233 0.337570624 0.358582312 0.397744534
        0.359150122 0.362370088 0.393224917 0.408598669 0.398058052 0.511955618 0.303055702
    """,
}
ITEMS = {name: [float(value) for value in values.split()] for name, values in _ITEMS.items()}

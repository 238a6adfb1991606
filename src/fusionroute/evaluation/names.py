"""Names of systems that more than one module knows. Imports nothing."""

OURS = "fusionroute"
FINETUNED = "finetuned"  # what the paper's win rates are against
ALPHA = "alpha:"  # and a number
VARIANT = "variant:"  # and the name of another collection with the same experts
SELECTION = "sequence-selection"  # runs no model of its own: it picks among the experts' answers
COLLAB = "collab"  # has an engine of its own
MERGES = ("task-arithmetic", "dare", "ties")
ORACLE = "oracle"  # of the experts, the one that does best on the prompt, in hindsight

"""Texts of an evaluation's page: titles and explanations of plots, families and metrics."""

CAPTIONS = {
    "loss-by-length": (
        "Loss by length of the window",
        "The mean loss of all tokens in windows of each length, and perplexity, its exponential. A model that "
        "gains from more context falls; one that cannot read past its trained context rises behind the dashed line.",
    ),
    "loss-by-position": (
        "Loss by position",
        "The same loss, by where the token stands inside the longest windows: at position p the model has read p "
        "tokens. A point is the mean over a range of positions. The first, where little was read, may lie above the "
        "plot.",
    ),
    "retrieval-by-length": (
        "Retrieval by length",
        "The mean of the families' scores. 100 means that every answer asked for was given.",
    ),
    "retrieval-families": (
        "Retrieval by family of tasks",
        "The same score, each family by itself; its intervals are in the table.",
    ),
    "retrieval-by-depth": (
        "Retrieval by depth",
        "A map for each model and each family whose answer lies in one place: the score by length of the context (to "
        "the right) and by where in it the answer lies: 0% is the start of the context, 100% its end, next to the "
        "question. Grey fields were not measured.",
    ),
    "noise-perplexity": (
        "Loss under noise",
        "Gaussian noise on the attention scores of one kind of heads; the other kind is left as it is. The steeper the "
        "rise, the more the model rests on the heads that got the noise.",
    ),
    "noise-retrieval": (
        "Retrieval under noise",
        "The same noise; the steeper the fall, the more retrieval rests on the heads that got it.",
    ),
    "distance-attention": (
        "Attention by distance",
        "How much of their attention heads give to keys in each range of distances, the mean over queries, heads and "
        "layers. Ranges grow with distance.",
    ),
}
"""Title and explanation of each plot."""

BESIDE = {
    "loss-by-length": "Right: the difference to {first} in the same documents; below 0 is better.",
    "retrieval-by-length": "Right: the difference to {first} in the same examples; above 0 is better.",
}
"""What is explained too where there are several models."""

FAMILIES = {
    "single": "one key in a long text, and its value asked for",
    "multikey": "many keys, the value of one asked for",
    "multivalue": "one key with several values, all asked for",
    "multiquery": "several keys, the values of all asked for",
    "tracking": "variables assigned to one another; asked for all that hold one value",
    "common_words": "a list of words; asked for those that occur often",
    "frequent_words": "made-up words of very unequal counts; asked for the most frequent",
}
"""What the families of retrieval tasks ask, after RULER (arXiv 2404.06654)."""

TASKS: dict[str, tuple[str, str]] = {
    "longppl": (
        "Perplexity over key tokens",
        "Perplexity and loss over the tokens that a long context makes much likelier and likely (LongPPL, arXiv "
        "2410.23771): the same tokens for all models, found by the first one or the one that the task names. Gain is "
        "what the long context takes off the loss of all tokens that have more to read than in the shortest length, by "
        "their position in the window too: where it rises, context that far back is used.",
    ),
    "recall": (
        "Associative recall",
        "Pairs of key and value among sentences, and a question for each: whether the value is predicted behind it "
        "(MQAR, arXiv 2312.04927). The score is the share of values whose tokens are all the most likely ones, the "
        "loss that of these tokens; parts are numbers of pairs. Distances are from where the value stood before.",
    ),
    "induction": (
        "Induction",
        "Random words, of which runs come again at a distance (arXiv 2209.11895): whether the words of a run are "
        "predicted behind its first one. Score, loss and distance are those of associative recall.",
    ),
    "ruler": (
        "RULER",
        "RULER's tasks in its own wording (arXiv 2404.06654), without question answering. The score is its string "
        "match: the share of what was asked for that occurs in the answer.",
    ),
    "graphwalks": (
        "Walks in a graph",
        "A graph is listed edge by edge, and nodes near one of them are asked for (after OpenAI's GraphWalks). The "
        "score is F1 of the sets of nodes.",
    ),
    "mrcr": (
        "One of several same requests",
        "A conversation has the same request several times, each time with another answer, and one of the answers is "
        "asked for again behind a code (after OpenAI's MRCR). The score is the share of matching characters; 0 without "
        "the code. Other words behind it get 28.",
    ),
}
"""Title and explanation of tasks that have a section of the general form; others are called by their name."""

METRICS = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "score": "Score",
    "exact": "Exact answers",
    "rouge_l": "ROUGE-L",
    "key_tokens": "Key tokens",
    "gain": "Gain",
}
UNITS = {
    "loss": "nats per token",
    "score": "0 to 100",
    "attention": "%",
    "exact": "%",
    "rouge_l": "0 to 100",
    "key_tokens": "%",
    "gain": "nats per token",
}

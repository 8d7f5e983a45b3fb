"""Texts of the evaluation page: titles and descriptions of plots, tasks, families and metrics."""

CAPTIONS = {
    "loss-by-length": (
        "Loss by window length",
        "Mean loss of all tokens in windows of each length, and perplexity, its exponential. The loss decreases if a "
        "model uses the additional context, and increases after the dashed line if it does not extrapolate beyond its "
        "training context length.",
    ),
    "loss-by-position": (
        "Loss by position",
        "The same loss, by the position of the predicted token in the longest windows: at position p the model has a "
        "context of p tokens. Each point is the mean over a range of positions. The first points, with little context, "
        "may be outside the plot.",
    ),
    "retrieval-by-length": (
        "Retrieval by length",
        "Mean score of all task families. A score of 100 means that all answers are correct.",
    ),
    "retrieval-families": (
        "Retrieval by task family",
        "The same score for each family; the intervals are in the table.",
    ),
    "retrieval-by-depth": (
        "Retrieval by depth",
        "A heat map for each model and each family whose answer has a single position: the score by context length (x) "
        "and by the depth of the answer in the context (y), from 0% (start) to 100% (end, next to the question). Grey "
        "cells were not measured.",
    ),
    "noise-perplexity": (
        "Loss under noise",
        "Loss with Gaussian noise on the attention scores of one group of heads; the other group is unchanged. The "
        "steeper the increase, the more the model depends on the heads with noise.",
    ),
    "noise-retrieval": (
        "Retrieval under noise",
        "The same noise; the steeper the decrease, the more retrieval depends on the heads with noise.",
    ),
    "distance-attention": (
        "Attention by distance",
        "Attention weight on the keys in each range of distances, as the mean over queries, heads and layers. The "
        "width of the ranges doubles with the distance.",
    ),
}
"""Title and description of each plot."""

DIFFERENCES = {
    "loss-by-length": "Right: difference to {first} on the same documents; below 0 is better.",
    "retrieval-by-length": "Right: difference to {first} on the same examples; above 0 is better.",
}
"""Descriptions of the panels with differences, which exist if there are multiple models."""

FAMILIES = {
    "single": "the value of one key in a long text",
    "multikey": "the value of one of many keys",
    "multivalue": "all values of one key",
    "multiquery": "the values of multiple keys",
    "tracking": "all variables with the same value, through a chain of assignments",
    "common_words": "the most common words of a list",
    "frequent_words": "the most frequent random words, with counts by Zipf's law",
}
"""Descriptions of the families of retrieval tasks, after RULER (arXiv 2404.06654)."""

TASKS: dict[str, tuple[str, str]] = {
    "longppl": (
        "Perplexity over key tokens",
        "Perplexity and loss over key tokens, which are much more likely with a long context than with a short one and "
        "likely with the long one (LongPPL, arXiv 2410.23771). The key tokens are the same for all models; the first "
        "model, or the model given in the task's name, identifies them. Gain is the decrease of the loss by the long "
        "context, over all tokens with more context than the shortest length, also by position in the window: where "
        "it increases, the model uses context at that distance.",
    ),
    "recall": (
        "Associative recall",
        "Pairs of key and value among sentences, and a query for each key, after which the value is predicted (MQAR, "
        "arXiv 2312.04927). The score is the share of values whose tokens are all top-1 predictions; the loss is over "
        "the same tokens. Parts are numbers of pairs. Distances are in tokens from the first occurrence of the value.",
    ),
    "induction": (
        "Induction",
        "Random words with repeated runs (arXiv 2209.11895): the words of the repetition after its first word are "
        "predicted. Score, loss and distance are as in associative recall.",
    ),
    "ruler": (
        "RULER",
        "RULER's tasks with RULER's prompts (arXiv 2404.06654), without question answering. The score is RULER's "
        "string match: the share of the expected strings that occur in the answer.",
    ),
    "graphwalks": (
        "Graph walks",
        "The context lists the edges of a graph, and the answer is the set of nodes at a distance from a given node "
        "(after OpenAI's GraphWalks). The score is the F1 of the sets of nodes.",
    ),
    "mrcr": (
        "Multi-round co-reference resolution",
        "A conversation contains the same request multiple times with different answers; the model must repeat one of "
        "the answers after a code (after OpenAI's MRCR). The score is the share of matching characters, and 0 without "
        "the code. Unrelated words after the code score 28.",
    ),
}
"""Title and description of tasks with a generic section; other tasks get their name as the title."""

METRICS = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "score": "Score",
    "exact": "Exact match",
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

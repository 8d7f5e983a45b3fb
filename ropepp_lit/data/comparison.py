"""Compare a checkpoint with a recipe: architecture, tokenizer, special ids, held-out documents and data position.

Both sides are the plain values that a checkpoint stores (:mod:`ropepp_lit.checkpoint`). All commands use the same
comparison, but handle differences in different ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ropepp_lit.data.conversations import template_of
from ropepp_lit.data.manifest import Manifest
from ropepp_lit.text.identity import opening_of, same_tokenizer

ARCHITECTURE, TOKENIZER, SPECIAL_IDS, HELD_OUT = "architecture", "tokenizer", "special ids", "held-out documents"
CHAT_TEMPLATE = "chat template"


def compare(stored: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """Compare a checkpoint's values with those of a recipe.

    Args:
        stored: Entry `ropepp_lit` of a checkpoint.
        ours: The same keys for a recipe's model and data. Values that either side does not have are not compared.

    Returns:
        A description of the form `name old → new` for each kind of difference (:data:`ARCHITECTURE`, …).
    """
    differences = {}
    if "architecture" in ours:
        old, new = _flatten(stored["architecture"]), _flatten(ours["architecture"])
        differences[ARCHITECTURE] = _changes(old, new, list(old | new))
    if stored.get("tokenizer") and ours.get("tokenizer"):
        if same_tokenizer(stored["tokenizer"], ours["tokenizer"]):
            old, new = (
                {"opening": opening_of(entry), "eos_token_id": entry["eos_token_id"]} for entry in (stored, ours)
            )
            differences[SPECIAL_IDS] = _changes(old, new, list(old))
        else:
            differences[TOKENIZER] = "other tokens"
    templates = template_of(stored), template_of(ours)
    if None not in templates and templates[0] != templates[1]:
        differences[CHAT_TEMPLATE] = "other turns"
    if stored.get("held_out") and ours.get("held_out"):
        digests = set(stored["held_out"].values())
        differences[HELD_OUT] = ", ".join(name for name, digest in ours["held_out"].items() if digest not in digests)
    return {kind: text for kind, text in differences.items() if text}


def identity_of(
    manifests: Mapping[str, Manifest], weights: list[float], *, context_length: int, seed: int, too_long: str
) -> dict[str, Any]:
    """Return the values that determine the order of samples. A position is only valid for data of the same identity.

    Sources are identified by the checksums of their chunks, and in `sources` as in earlier versions.

    Args:
        manifests: Manifests of the training sets, by name.
        weights: Weight of each training set.
        context_length: See :class:`~ropepp_lit.data.token_data.TokenData`.
        seed: See there.
        too_long: See there; only used for conversations.
    """
    sets = list(zip(manifests.values(), weights, strict=True))
    is_packed = any(manifest.marks_trained_tokens for manifest, _ in sets)
    return {
        "names": list(manifests),
        "contents": [[manifest.splits["train"].digest, weight / sum(weights)] for manifest, weight in sets],
        "context_length": context_length,
        "seed": seed,
        **({"too_long": too_long} if is_packed else {}),
        "sources": [[manifest.fingerprint, weight] for manifest, weight in sets],
    }


def continued_at(state: dict[str, Any], identity: dict[str, Any]) -> tuple[int, str]:
    """Return the sample at which a run resumes.

    Args:
        state: Position stored in a checkpoint, from :meth:`~ropepp_lit.data.loader.TrainLoader.state_dict`.
        identity: Identity of the run's data, from :attr:`~ropepp_lit.data.token_data.TokenData.identity`.

    Returns:
        The number of the sample; and if the stored position is not valid, so that the run restarts at sample 0, the
        reason, else an empty string.
    """
    old, reasons = state.get("identity"), []
    if old is None:
        return 0, "the checkpoint stores the position of another loader"
    for key in ("context_length", "seed", "too_long"):
        if key in old and key in identity and old[key] != identity[key]:
            reasons.append(f"data.{key} is {identity[key]} instead of {old[key]}")
    if "contents" not in old:  # from a version that identified sources by paths and times of files
        if old["sources"] != identity["sources"]:
            reasons.append("the checkpoint is of an earlier version and does not store the contents of its data")
    elif len(old["contents"]) != len(identity["contents"]):
        reasons.append(f"data.source has {len(identity['contents'])} sources instead of {len(old['contents'])}")
    else:
        rows = zip(identity["names"], old["contents"], identity["contents"], strict=True)
        for name, (old_digest, old_share), (digest, share) in rows:
            if old_digest != digest:
                reasons.append(f"the training documents of {name} have different contents")
            elif old_share != share:
                reasons.append(f"the weight of {name} is {share:g} instead of {old_share:g}")
    return (0, "; ".join(reasons)) if reasons else (state["samples"], "")


def _changes(old: dict[str, Any], new: dict[str, Any], names: Any) -> str:
    changed = (name for name in names if old.get(name) != new.get(name))
    return ", ".join(f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}" for name in changed)


def _flatten(architecture: dict[str, Any]) -> dict[str, Any]:
    """Flatten an architecture to values by their keys in a recipe."""
    flat = {f"model.decoder.{name}": value for name, value in architecture["decoder"].items()}
    for part in ("positions", "frequencies"):
        flat[f"model.{part}"] = architecture[part]["class_path"].rpartition(".")[2]
        flat |= {f"model.{part}.{name}": value for name, value in architecture[part]["init_args"].items()}
    return flat

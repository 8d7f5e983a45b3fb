"""Sets of conversations: whether they go together, what is said of them, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ropepp_lit.data.packing import PackedPlan, TooLong
from ropepp_lit.data.shards import Manifest
from ropepp_lit.errors import UsageError

TEMPLATE = "chat_template"


def check_conversations(
    train: Mapping[str, Manifest],
    validation: Sequence[tuple[str, Manifest]],
    *,
    intra_document_masking: bool,
    too_long: TooLong,
) -> None:
    """Check that sets can be read together.

    Args:
        train: The manifest of each training set.
        validation: Each further validation set's name and manifest.
        intra_document_masking: See :class:`~ropepp_lit.data.token_data.TokenData`.
        too_long: See there.

    Raises:
        UsageError: conversations would see each other, or were rendered by several templates; some sets hold pairs of
            answers and others do not, or pairs would be cut.
    """
    templates: dict[str, str] = {}
    first, ours = next(iter(train.items()))
    for name, manifest in [*train.items(), *validation]:
        if manifest.holds_pairs != ours.holds_pairs:
            pairs, other = (name, first) if manifest.holds_pairs else (first, name)
            raise UsageError(
                f"data: {pairs} holds pairs of answers and {other} does not; name sets of one kind for training and "
                "validation"
            )
        if manifest.holds_pairs and too_long == "cut":
            raise UsageError(
                f"data.too_long: {name} holds pairs of answers, which cannot be compared when they are cut; use drop"
            )
        if manifest.marks_trained_tokens and not intra_document_masking:
            raise UsageError(
                f"data.intra_document_masking: false lets the conversations that are packed in one row see each other, "
                f"and {name} holds conversations; set it to true"
            )
    for name, manifest in train.items():
        if manifest.chat_template is not None:
            templates.setdefault(manifest.chat_template, name)
    if len(templates) > 1:
        one, other = list(templates.values())[:2]
        raise UsageError(
            f"data.source: {other} was rendered by another chat template than {one}, and a model has one; prepare one "
            "of them again with the template of the other (--chat_template)"
        )


def name_of_documents(manifest: Manifest) -> str:
    """What a packed set's documents are called."""
    return "pairs of answers" if manifest.holds_pairs else "conversations"


def left_out_line(name: str, plan: PackedPlan, manifest: Manifest, too_long: TooLong) -> str | None:
    """What became of conversations that are longer than the context; None where none is.

    Args:
        name: Of the split and its source.
        plan: Of the split.
        manifest: Of the set.
        too_long: What was asked for.
    """
    lengths, kind = plan.lengths, name_of_documents(manifest)
    if not lengths.too_long:
        return None
    count = plan.documents + lengths.too_long if too_long == "drop" else plan.documents + lengths.untrained
    line = f"data: {name}: {lengths.too_long:,} of {count:,} {kind} are longer than data.context_length "
    line += f"{plan.places - 1:,} (the longest has {lengths.longest:,} tokens) and are "
    if too_long == "drop":
        return f"{line}left out" + ("" if manifest.holds_pairs else "; data.too_long cut keeps their beginnings")
    left = f"; {lengths.untrained:,} of them keep no trained token and are left out" if lengths.untrained else ""
    return f"{line}cut to their beginnings{left}"


def packing_line(name: str, plan: PackedPlan, manifest: Manifest, *, rows_per_step: float) -> str:
    """How the conversations of a training set are packed, and how much of them is trained.

    Args:
        name: Of the set.
        plan: Of its training split.
        manifest: Of the set.
        rows_per_step: Rows that an optimizer step reads of it, on average.
    """
    train, left_out = manifest.splits["train"], manifest.splits["train"].documents - plan.documents
    return (
        f"{name}: {plan.documents:,} {name_of_documents(manifest)} in {plan.samples_per_pass:,} rows, "
        f"{plan.padding:.1%} padding"
        + (f", {left_out:,} left out" if left_out else "")
        + f"; {train.trained_tokens / train.tokens:.1%} of the set's tokens are trained; "
        f"all are read once in {plan.samples_per_pass / rows_per_step:,.1f} steps"
    )


def chat_settings(manifests: Sequence[Manifest]) -> dict[str, str]:
    """The entries `tokenizer_config` and `generation_config` of a checkpoint (JSON) that conversations decide.

    Args:
        manifests: Of the training sets.

    Returns:
        The chat template, and the tokens that end an assistant's turn beside the one that ends a document; empty where
        no set holds conversations.
    """
    found: dict[str, str] = {}
    if template := next((m.chat_template for m in manifests if m.chat_template is not None), None):
        found["tokenizer_config"] = json.dumps({TEMPLATE: template})
    ends = [token for manifest in manifests for token in manifest.end_of_turn]
    if ends:
        found["generation_config"] = json.dumps(
            {"eos_token_id": list(dict.fromkeys([manifests[0].eos_token_id, *ends]))}
        )
    return found


def merge_settings(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the model that a run began with, with those of its conversations in them.

    Args:
        base: The entries `tokenizer_config` and `generation_config` (JSON or None) of a checkpoint, and others.
        data: What the data store, with what :func:`chat_settings` returned. The template replaces the base's; tokens
            that end a text are those of both.
    """
    merged = dict(base)
    for key in data.keys() & {"tokenizer_config", "generation_config"}:
        old, new = json.loads(base.get(key) or "{}"), json.loads(data[key])
        if key == "generation_config":
            ends = old.get("eos_token_id")
            ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
            new["eos_token_id"] = list(dict.fromkeys([*ends, *new["eos_token_id"]]))
        merged[key] = json.dumps({**old, **new})
    return merged


def template_of(entry: Mapping[str, Any]) -> str | None:
    """The chat template that a checkpoint or data store; of several the one named `default`."""
    template = json.loads(entry.get("tokenizer_config") or "{}").get(TEMPLATE)
    if isinstance(template, list):
        return next((each["template"] for each in template if each.get("name") == "default"), None)
    return template


def notes_on_special_ids(manifests: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    """A line where documents open or close with other tokens than those of the first manifest.

    Bounds of documents do not depend on these tokens; what opens prompts and ends generated text does.
    """
    first, ours = manifests[0]
    for name, manifest in manifests[1:]:
        for key in ("opening", "eos_token_id"):
            theirs, expected = getattr(manifest, key), getattr(ours, key)
            if theirs != expected:
                yield (
                    f"Note: {key} is {theirs} in {name} and {expected} in {first}; prompts and generated text follow "
                    f"{first}."
                )
        if None not in (manifest.chat_template, ours.chat_template) and manifest.chat_template != ours.chat_template:
            yield f"Note: {name} was rendered by another chat template than {first}."
